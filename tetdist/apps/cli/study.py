"""Run a study (several configurations with several seeds) and write its report.

The same command continues a stopped study.
"""

import argparse
import logging
import sys
from pathlib import Path

from tetdist.apps.cli.common import program, run_command
from tetdist.apps.slurm import command, jobs
from tetdist.apps.studies import plan
from tetdist.apps.studies.plan import StudyRun
from tetdist.config.flags import add_import, import_flags, positive
from tetdist.config.key_parser import KeyParser
from tetdist.config.loading import CONFIGS_DIR, Draft
from tetdist.datasets.index import check_indexed
from tetdist.errors import UserError
from tetdist.wording import counted, meant


class StudyParser(KeyParser):
    """The parser of study, which names the place of flags that belong to slurm."""

    def meant(self, flag: str) -> str:
        if flag in command.submit_parser()._option_string_actions and flag != "--config":
            return f"write flags of {program('slurm')} after --slurm"
        return super().meant(flag)


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = StudyParser(
        prog=program("study"),
        description="Run a study and write its report. The same command continues a stopped one.",
        epilog="Exit status: 0 all done, 1 runs failed, 2 a user error, 130 stopped.",
    )
    parser.add_argument("study", metavar="STUDY", help="YAML file, or its name in configs/studies/")
    parser.add_argument(
        "overrides",
        nargs="*",
        default=[],
        metavar="key=value",
        help="override a key of the configuration in all runs: data.root=..., batch.micro=64",
    )
    add_import(parser)
    parser.add_argument(
        "--output", metavar="DIR", type=Path, help="folder of runs and report; default: runs/STUDY"
    )
    parser.add_argument(
        "--jobs", metavar="N", type=positive, default=1, help="runs at once, spread over the GPUs"
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
        "--slurm",
        nargs=argparse.REMAINDER,
        metavar="FLAG",
        help="submit all runs to Slurm instead; flags of "
        f"{program('slurm')} follow: --gpus-per-node, --partition, --time, ..., --dry-run. A run "
        "that needs another's weights, as its start or teacher, waits for it. Once all are "
        "finished, the same command without --slurm evaluates and reports",
    )
    options = parser.parse_intermixed_args(arguments)
    if options.slurm is not None and options.dry_run:
        parser.error("--dry-run must follow --slurm: --slurm ... --dry-run")
    if options.slurm is not None and options.report_only:
        parser.error("--report-only submits nothing; leave out --slurm")
    return options


def main(arguments: list[str] | None = None) -> int:
    options = parse_arguments(arguments)
    logging.basicConfig(level=logging.ERROR, format="%(message)s")
    logging.getLogger("tetdist.tracking").setLevel(logging.WARNING)  # MLflow does not answer
    return run_command(lambda: study(options), interrupted="stopped; the same command continues")


def study(options: argparse.Namespace) -> int:
    file = find(options.study)
    section = plan.read(file)
    output = options.output or Path("runs") / file.stem
    if unknown := [one for one in options.only or () if one not in section.entries]:
        hint = meant(unknown[0], section.entries)
        raise UserError(f"--only: there is no entry {unknown[0]}; {hint}")
    slurm_options = None
    if options.slurm is not None:
        slurm_options = parse_slurm(options.slurm, section.config)
        options.overrides += slurm_options.overrides

    def check(entry: str, draft: Draft) -> None:
        # Runs that are finished need no data.
        if draft.config.run_dir.exists() or entry not in (options.only or section.entries):
            return
        if slurm_options is not None:
            command.check_draft(draft, slurm_options)
        elif not options.dry_run and not options.report_only:
            check_indexed(draft.config, draft.data_command)

    try:
        runs = plan.runs_of(section, output, options.overrides, options.imports, check)
    except UserError as error:
        raise UserError(f"{file}: {error}") from error
    firsts: dict[str, str] = {}
    for run in runs[: len(section.entries)]:  # those of the first seed
        trained = f"{run.config.model_copy(update={'name': ''})!r} {run.section.average}"
        if (other := firsts.setdefault(trained, run.entry)) != run.entry:
            print(f"warning: entries.{run.entry} trains the same as {other}", file=sys.stderr)
    chosen = choose(runs, options.only)
    # Imported after these checks, because torch takes seconds.
    from tetdist.apps.studies import numbers, report, slurm
    from tetdist.apps.studies.local import refuse_if_at_work, work
    from tetdist.tracking.mlflow_logger import ui_command

    for run in runs:
        plan.check_folder(run)
    if options.dry_run:
        left = [run for run in chosen if not plan.is_trained(run)]
        lines = [f"{run.name}: {run.length}" for run in left]
        print(*lines, f"{len(left)} of {counted(len(chosen), 'run')} to train", sep="\n")
        plan.check_inputs(left)
        return 0
    if slurm_options is not None:
        return slurm.submit(chosen, output, slurm_options)
    failed: dict[str, str] = {}
    if not options.report_only:
        left = [run for run in chosen if run.next_command()]
        plan.check_inputs(left)
        slurm.refuse_if_queued(left)
        refuse_if_at_work(left)
        failed = work(chosen, options.jobs)
    words = (str(file), *options.overrides, *import_flags(options.imports))
    results = numbers.gather(runs[0].study, runs, str(plan.Command("study", words)), failed)
    report.write(results, output / "report.md")
    print(report.summary(results), f"the report is {output / 'report.md'}", sep="\n")
    tracked = [run for run in runs if (run.folder / "mlflow_run_id").exists()]
    for uri, folder in {run.config.tracking_uri: run.folder for run in tracked}.items():
        if uri:
            print(f"curves in MLflow: {ui_command(uri, folder, of_all=True)}")
    if failed:
        print(f"failed: {', '.join(failed)}; the logs are in {output / 'logs'}", file=sys.stderr)
    return 1 if failed else 0


def parse_slurm(flags: list[str], config_name: str) -> argparse.Namespace:
    """Parse the flags after --slurm; a machine without Slurm takes those for a plan only."""
    own = ("--output", "--jobs", "--only", "--report-only")
    if misplaced := [flag for flag in flags if flag in own]:
        raise UserError(f"--slurm: write {misplaced[0]}, a flag of the study, before --slurm")
    options = command.parse_arguments(["--config", config_name, *flags])
    if options.after:
        raise UserError("--slurm: --after applies to single runs, not to a study; omit it")
    for override in options.overrides:
        if not override.startswith("cluster."):
            raise UserError(
                f"--slurm: only flags and cluster.key=value may follow it; write {override} before "
                "it, so that it is part of the study"
            )
    if not options.dry_run:
        jobs.check_here("leave out --slurm to train here, or add --dry-run to see the jobs")
    return options


def find(name: str) -> Path:
    """Find the file of a study: a path, or a name (with or without .yaml) in configs/studies/."""
    folder = CONFIGS_DIR / "studies"
    # A recipe is found, too, and refused when it is read.
    for path in (Path(name), folder / name, folder / f"{name}.yaml", CONFIGS_DIR / name):
        if path.is_file():
            return path
    known = sorted(path.stem for path in folder.glob("*.yaml"))
    give = f"give a file, or the name of one in {folder}"
    raise UserError(f"there is no study {name!r}; {meant(Path(name).stem, known, give)}")


def choose(runs: list[StudyRun], entries: list[str] | None) -> list[StudyRun]:
    """Return the runs of some entries, and the runs that they need."""
    if entries is None:
        return runs
    chosen: set[str] = set()
    # Iterate in reverse, because a run comes after those that it needs.
    for run in reversed(runs):
        if run.entry in entries or run.name in chosen:
            chosen |= {run.name, *(needed.name for needed in run.needs)}
    return [run for run in runs if run.name in chosen]
