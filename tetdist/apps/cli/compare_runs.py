"""Compare two runs: where their metrics first differ, by how much, and whether they saw the same
samples. Or list several: the result of each, mean and spread over seeds, their curves in one
figure. Or compare a run on ImageNet with a published training curve.

Two values differ if |a - b| is more than the tolerance times the larger of |a| and |b|; NaN equals
NaN. Values that depend on the clock or the machine do not count.

Exit status: 0 the same, 1 different values, steps or samples (a different configuration alone does
not count), 2 a user error. More than two runs are only listed: 0 or 2. With --reference: 1 if a
run is behind.
"""

import argparse
import math
import sys
from dataclasses import asdict
from pathlib import Path

from tetdist.apps.cli.common import program, run_command, write_result
from tetdist.storage.files import check_writable, explaining
from tetdist.tables import aligned


def main(arguments: list[str] | None = None) -> int:
    """Return the exit status: 0 the same, 1 different, 2 a user error."""
    options = parse_arguments(arguments)
    return run_command(lambda: show(options), interrupted="interrupted")


def show(options: argparse.Namespace) -> int:
    """Compare two runs, or list several side by side; return the exit status."""
    from tetdist.apps.reports.compare import compare

    if options.json:
        check_writable("--json", options.json)
    if options.plot:
        from tetdist.apps.reports import style

        style.new_figure(1, 1)  # fails now, before the work, if matplotlib is missing
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
    write_result(options.json, found)
    return status


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog=program("compare_runs"),
        description="Compare two runs: where they first differ, and by how much. Or list several.",
        epilog="Exit status: 0 the same (or more than two), 1 different, or behind a --reference, "
        "2 a user error.",
    )
    parser.add_argument(
        "runs",
        nargs="+",
        type=Path,
        metavar="RUN",
        help="a run folder, its metrics.jsonl, or a folder of run folders, such as a study's",
    )
    parser.add_argument(
        "--tolerance",
        type=tolerance,
        default=0.0,
        metavar="R",
        help="relative difference up to which values count as the same (default: 0, bitwise)",
    )
    parser.add_argument("--json", metavar="FILE", type=Path, help="also write the result as JSON")
    parser.add_argument(
        "--plot", metavar="FILE.png", type=Path, help="draw the curves of all runs in one PNG"
    )
    parser.add_argument(
        "--reference",
        metavar="NAME",
        help="compare with this published training on ImageNet, such as sew34; an unknown name "
        "lists them",
    )
    options = parser.parse_args(arguments)
    options.runs = runs_in(options.runs)
    if len(options.runs) < 2 and not options.reference:
        parser.error("a single run needs something to compare with: a second run, or --reference")
    if (len(options.runs) > 2 or options.reference) and options.tolerance:
        parser.error("--tolerance applies to a comparison of two runs; leave it out")
    if options.plot and options.plot.suffix != ".png":
        parser.error(f"--plot must end in .png, unlike {options.plot}")
    return options


def tolerance(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} must be a number of at least 0, such as 1e-6")
    return value


def runs_in(paths: list[Path]) -> list[Path]:
    """Expand folders of runs to their runs; skip other files if there are more than two paths.

    A study's folder also has logs and a report, which `runs/STUDY/*` matches.
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
            print(f"skipped {path}: not a run", file=sys.stderr)
    return found
