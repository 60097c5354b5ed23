"""Compare two runs: where their metrics part, by how much, and whether they saw the same samples.
Or see several: what each reached, the mean and spread over seeds, their curves in one figure.
Or see whether a run on ImageNet is on the way that a published training took.

    python tools/compare_runs.py runs/one runs/two
    python tools/compare_runs.py one/metrics.jsonl two/metrics.jsonl --tolerance 1e-6
    python tools/compare_runs.py runs/tet_* runs/sdt_* --plot tet_sdt.png
    python tools/compare_runs.py runs/STUDY --plot study.png
    python tools/compare_runs.py runs/sew34_t4 --reference sew34

Of two runs, values that depend on the clock or the machine (time, samples_per_s, data_wait,
eta_s, gpu_memory, gpu_energy, seconds) are left out.
Two values differ when |a - b| is more than the tolerance times the larger of |a| and |b|; NaN
equals NaN. Of two folders the configurations are compared too, and the samples-RANK.jsonl files
where both have them.

Exit status: 0 the same, 1 different (in values, in steps or in samples; another configuration alone
is no difference), 2 a mistake of the user's. More than two runs are shown, not judged: 0, or 2.
With --reference: 1 if a run is behind.
"""

import argparse
import math
import sys
from dataclasses import asdict
from pathlib import Path

from tetdist.apps.cli.common import answer, program
from tetdist.storage.files import check_writable, explaining
from tetdist.tables import aligned


def main(arguments: list[str] | None = None) -> int:
    """Exit status: 0 the same, 1 different, 2 a mistake in what was asked."""
    options = parse_arguments(arguments)
    return answer(lambda: show(options), interrupted="interrupted")


def show(options: argparse.Namespace) -> int:
    """Compare two runs, or show several side by side; the exit status."""
    from tetdist.apps.reports.compare import compare, write_json

    if options.json:
        check_writable("--json", options.json)
    if options.plot:
        from tetdist.apps.reports import style

        style.new_figure(1, 1)  # says before the work if matplotlib is missing
    is_pair = len(options.runs) == 2 and not options.reference
    if is_pair:
        a, b = options.runs
        found, text = compare(a, b, options.tolerance)
        status = 0 if found["same"] else 1
        print(text)
    if options.plot or not is_pair:
        from tetdist.apps.reports import reference, runs_table

        published = reference.find_reference(options.reference) if options.reference else None
        records = runs_table.read_records(options.runs, curves=options.plot is not None)
        if published is not None:
            verdicts = [reference.verdict(record, published) for record in records]
            print(reference.report(verdicts, published))
            found = {"verdicts": [asdict(verdict) for verdict in verdicts]}
            status = int(any(verdict.on_the_way is False for verdict in verdicts))
        elif not is_pair:
            found, status = runs_table.as_dict(records), 0
            for table in runs_table.tables(found):
                print(aligned(table, right=range(1, len(table[0]))), end="\n\n")
        if options.plot:
            with explaining(options.plot):
                reference.plot(records, published, options.plot)
    if options.json:
        write_json(options.json, found)
    return status


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog=program("compare_runs"),
        description="Compare two runs: where they part, and by how much. Or see more side by side.",
        epilog="Exit status: 0 the same (or more than two), 1 different, or behind a --reference, "
        "2 a mistake in what was asked.",
    )
    parser.add_argument(
        "runs",
        nargs="+",
        type=Path,
        metavar="RUN",
        help="a run folder, its metrics.jsonl, or a folder of run folders, as a study's",
    )
    parser.add_argument(
        "--tolerance",
        type=tolerance,
        default=0.0,
        metavar="R",
        help="relative difference up to which values count as the same (default: 0, to the bit)",
    )
    parser.add_argument("--json", metavar="FILE", type=Path, help="write the result there, too")
    parser.add_argument(
        "--plot", metavar="FILE.png", type=Path, help="draw the curves of all runs into one PNG"
    )
    parser.add_argument(
        "--reference",
        metavar="NAME",
        help="a published training on ImageNet, such as sew34; an unknown name lists them",
    )
    options = parser.parse_args(arguments)
    options.runs = runs_in(options.runs)
    if len(options.runs) < 2 and not options.reference:
        parser.error("one run alone cannot be compared; name two or more, or --reference sew34")
    if (len(options.runs) > 2 or options.reference) and options.tolerance:
        parser.error("--tolerance is for two runs, which are compared value by value")
    if options.plot and options.plot.suffix != ".png":
        parser.error(f"--plot: {options.plot} does not end in .png")
    return options


def tolerance(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 0 on, such as 1e-6")
    return value


def runs_in(paths: list[Path]) -> list[Path]:
    """The runs that are meant: each run in a folder of runs; among many paths only possible runs.

    A study's folder has logs and a report beside its runs, which `runs/STUDY/*` lists, too.
    """
    found: list[Path] = []
    for path in paths:
        inside = sorted(file.parent for file in path.glob("*/metrics.jsonl"))
        is_one = (path / "metrics.jsonl").exists() or path.suffix == ".jsonl" or not path.exists()
        if inside and not is_one:
            found += inside
        elif is_one or len(paths) <= 2:
            found.append(path)
        else:
            print(f"{path} is no run, and left out", file=sys.stderr)
    return found
