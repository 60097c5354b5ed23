"""Run a study (several configurations with several seeds) and write its report.

A file with the section `search` is a search for the values of keys, by successive halving on
held-out training data. The same command continues a stopped study.
"""

import argparse
import logging
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from tetdist.apps.cli.common import program, run_command
from tetdist.config.flags import add_import, positive
from tetdist.errors import UserError
from tetdist.wording import counted

if TYPE_CHECKING:
    from tetdist.apps.studies.plan import StudyRun


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog=program("study"),
        description="Run a study and write its report. The same command continues a stopped one.",
        epilog="Exit status: 0 all done, 1 runs failed, 2 a user error, 130 stopped.",
    )
    parser.add_argument("study", metavar="STUDY", help="YAML file, or its name in configs/studies/")
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="key=value",
        help="override a key of the configuration in all runs: data.root=..., batch.micro=64",
    )
    add_import(parser)
    parser.add_argument(
        "--output", metavar="DIR", type=Path, help="folder of runs and report; default: runs/STUDY"
    )
    parser.add_argument(
        "--jobs", metavar="N", type=positive, default=1, help="runs trained at once, sharing cores"
    )
    parser.add_argument(
        "--only",
        metavar="ENTRY",
        action="append",
        help="train only this entry, and those whose weights it needs; may be repeated",
    )
    parser.add_argument(
        "--report-only", action="store_true", help="write the report, train nothing"
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="list the runs to train and their epochs, then stop"
    )
    parser.add_argument(
        "--pages",
        metavar="DIR",
        type=Path,
        help="also write the report as a page into DIR, and the summary of all its pages into "
        "DIR.md; with --report-only and no finished run, from the numbers of the earlier page",
    )
    parser.add_argument(
        "--again",
        action="store_true",
        help="also resubmit runs that failed or were cancelled (needs --slurm)",
    )
    parser.add_argument(
        "--slurm",
        nargs=argparse.REMAINDER,
        metavar="FLAG",
        help="submit all runs to Slurm instead, or print their state; flags of "
        f"{program('slurm')} follow: --gpus-per-node, --partition, --time, ..., --dry-run. A run "
        "that needs another's weights, as its start or teacher, waits for it. Once all are "
        "finished, the same command without --slurm evaluates and reports",
    )
    options = parser.parse_intermixed_args(arguments)
    if options.pages and options.pages.is_file():
        parser.error(f"--pages takes a folder, such as docs/results, not the file {options.pages}")
    if options.slurm is not None and options.dry_run:
        parser.error("--dry-run must follow --slurm: --slurm ... --dry-run")
    if options.slurm is not None and options.report_only:
        parser.error("--report-only submits nothing; leave out --slurm")
    if options.again and options.slurm is None:
        parser.error("--again needs --slurm; without it, failed runs are always retried")
    return options


def main(arguments: list[str] | None = None) -> int:
    options = parse_arguments(arguments)
    logging.basicConfig(level=logging.ERROR, format="%(message)s")
    logging.getLogger("tetdist.tracking").setLevel(logging.WARNING)  # MLflow does not answer
    return run_command(lambda: study(options), interrupted="stopped; the same command continues")


def study(options: argparse.Namespace) -> int:
    from tetdist.apps.studies import numbers, plan, report, search, tracking
    from tetdist.apps.studies.local import catch_up, refuse_if_at_work, work

    file = plan.find(options.study)
    if search.is_search(file):
        return search_for(options, file)
    section = plan.read(file)
    output = options.output or Path("runs") / file.stem
    runs = plan.runs_of(section, output, options.overrides, options.imports)
    chosen = choose(runs, options.only)
    for warning in plan.replaced(section, options.overrides):
        print(warning, file=sys.stderr)
    for run in runs:
        plan.check_folder(run)
    if options.dry_run:
        print(planned(chosen))
        return 0
    if options.slurm is not None:
        from tetdist.apps.studies import slurm

        return slurm.submit(file.stem, chosen, output, options.slurm, options.again)
    failed: dict[str, str] = {}
    if not options.report_only:
        left = [run for run in chosen if run.next_command()]
        plan.check_inputs(left)
        if any((run.folder / "slurm").exists() for run in left):
            from tetdist.apps.studies import slurm

            slurm.refuse_if_queued(left)
        refuse_if_at_work(left)
        untrained = [run for run in left if not plan.is_trained(run)]
        parent = tracking.Parent(file.stem, untrained, output)
        failed = work(chosen, options.jobs, parent)
        catch_up(file.stem, chosen, output, options.jobs)
    found = numbers.gather(section, runs)
    targets = [output / "report.md", *page_of(options, file)]
    if options.report_only and not found.entries and targets[-1].with_suffix(".json").is_file():
        del targets[0]
        earlier = targets[0].with_suffix(".json")
        found = numbers.recorded(earlier, section, output, options.overrides)
    return conclude(options, file, targets, partial(report.write, found), failed)


def search_for(options: argparse.Namespace, file: Path) -> int:
    from tetdist.apps.studies import search, search_report, tracking
    from tetdist.apps.studies.local import catch_up, refuse_if_at_work, work

    for flag, given in (("--slurm", options.slurm is not None), ("--only", bool(options.only))):
        if given:
            raise UserError(f"{flag}: {file} is a search, which does not support it; omit {flag}")
    output = options.output or Path("runs") / file.stem
    found = search.Search(search.read(file), output, options.overrides, options.imports)
    found.check_inputs()
    print(f"budget: {found.budget()}")
    if options.dry_run:
        print(search_report.candidates_as_text(found))
        return 0
    failed: dict[str, str] = {}
    standing = found.standing()
    while not options.report_only and not failed and (left := found.left_to_do(standing)):
        refuse_if_at_work(left)
        failed = work(left, options.jobs, tracking.Parent(file.stem, left, output))
        if standing.winner is None:
            # In a search, a run with non-finite values is a result, not a failure.
            failed = {name: why for name, why in failed.items() if search.NOT_FINITE not in why}
            standing = found.standing()
    if not options.report_only:
        catch_up(file.stem, found.runs_of(standing), output, options.jobs)
    targets = [output / "report.md", *page_of(options, file)]
    write = partial(search_report.write, found, standing)
    return conclude(options, file, targets, write, failed)


def page_of(options: argparse.Namespace, file: Path) -> list[Path]:
    """Return the page of a study's file, if there is one."""
    return [options.pages / f"{file.stem}.md"] if options.pages else []


def conclude(
    options: argparse.Namespace,
    file: Path,
    targets: list[Path],
    write: Callable[[Path, str], None],
    failed: dict[str, str],
) -> int:
    """Write the report, print the failed runs with their reasons, and return the exit status."""
    from tetdist.apps.studies import summary

    print("writing the report and its figure", file=sys.stderr)
    for target in targets:
        write(target, command(options, file))
        print(f"the report is {target}")
    if options.pages:
        print(f"the summary is {summary.write(options.pages)}")
    for name, reason in failed.items():
        print(f"failed: {name}: {reason}", file=sys.stderr)
    return 1 if failed else 0


def planned(runs: "list[StudyRun]") -> str:
    """Describe the untrained runs and their epochs."""
    from tetdist.apps.studies import plan

    left = [run for run in runs if not plan.is_trained(run)]
    epochs = {run.name: sum(phase.epochs for phase in run.own_phases) for run in left}
    lines = [f"{name}: {counted(number, 'epoch')}" for name, number in epochs.items()]
    total = f"{len(left)} of {counted(len(runs), 'run')} to train"
    return "\n".join([*lines, f"{total}, {counted(sum(epochs.values()), 'epoch')} in total"])


def command(options: argparse.Namespace, file: Path) -> str:
    """Return the command of the study, which its report quotes."""
    from tetdist.apps.studies import plan

    words = (str(file), *options.overrides, *plan.import_flags(options.imports))
    return str(plan.Command("study", words))


def choose(runs: "list[StudyRun]", entries: list[str] | None) -> "list[StudyRun]":
    """Return the runs of some entries, and the runs that they need."""
    if entries is None:
        return runs
    known = list(dict.fromkeys(run.entry for run in runs))
    for entry in entries:
        if entry not in known:
            raise UserError(f"--only: there is no entry {entry}; choose from {', '.join(known)}")
    chosen: set[str] = set()
    # Iterate in reverse, because a run comes after those that it needs.
    for run in reversed(runs):
        if run.entry in entries or run.name in chosen:
            chosen |= {run.name, *(needed.name for needed in run.needs)}
    return [run for run in runs if run.name in chosen]
