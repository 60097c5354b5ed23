"""Compare runs: final and best top-1, keys that differ, where the metrics of two runs first differ,
and whether the weights of their last common checkpoint are the same.

For more runs, it lists those that are the same. Learning rates and values that depend on the clock
or the machine do not count, nor do different configurations alone.
"""

import argparse
from pathlib import Path

from tetdist.apps.cli.common import program, run_command
from tetdist.apps.reports import compare
from tetdist.apps.reports.run_status import find_runs
from tetdist.config.flags import Parser
from tetdist.errors import UserError
from tetdist.storage.files import check_writable, explaining


def main(arguments: list[str] | None = None) -> int:
    """Return the exit status: 0 the same, 1 different, 2 a user error."""
    options = parse_arguments(arguments)
    return run_command(lambda: show(options), interrupted="interrupted")


def show(options: argparse.Namespace) -> int:
    """Print the comparison, and draw the plot if asked; return the exit status."""
    if options.plot:
        check_writable("--plot", options.plot)
    named = find_runs(options.runs)
    folders = [folder for folder in named if compare.has_metrics(folder)]
    if len(folders) < 2:
        known = f"only the run {folders[0]}" if folders else "no run"
        raise UserError(f"there is {known} with metrics; name two or more that have some")
    for folder in sorted({*named} - {*folders}):
        print(f"Left out: {folder} has no metrics yet.")
    runs = compare.read_runs(folders)
    same, text = compare.compare(runs)
    print(text)
    if options.plot:
        with explaining(options.plot):
            compare.plot(runs, options.plot)
        print(f"wrote {options.plot}")
    return 0 if same else 1


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = Parser(
        prog=program("compare_runs"),
        description="Compare runs: results, configuration, metrics and weights.",
        epilog="Exit status: 0 the same metrics and weights, 1 different ones, 2 a user error.",
    )
    parser.add_argument(
        "runs",
        nargs="+",
        metavar="RUN",
        help="run folder, name of a run in runs/, or folder of runs",
    )
    parser.add_argument(
        "--plot", metavar="FILE.png", type=Path, help="draw the curves of all runs into one PNG"
    )
    options = parser.parse_intermixed_args(arguments)
    if options.plot and options.plot.suffix != ".png":
        parser.error(f"--plot must end in .png, unlike {options.plot}")
    return options
