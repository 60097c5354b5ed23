"""Command-line interface of slurm: submit, status, cancel, resume."""

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tetdist.config.flags import add_import, positive
from tetdist.config.overrides import joined
from tetdist.errors import UserError, typed

if TYPE_CHECKING:
    from tetdist.apps.slurm.cluster import ClusterSection
    from tetdist.apps.slurm.submit import Prepared

# Commands that take a run, with their descriptions.
RUN_COMMANDS = {
    "status": "Show a run's state, progress, restarts and their reasons.",
    "cancel": "Cancel a run's job; a training run saves first. `resume` continues it.",
    "resume": "Resubmit a run from its newest checkpoint, with the code of its last submission.",
}
PROGRAM = typed("slurm").removeprefix("python ")
# GPUs a node that a dry run assumes if none are given.
ASSUMED_GPUS = 8


def parse_arguments(arguments: list[str]) -> argparse.Namespace:
    """Parse the command (``submit`` if none is named) and its flags."""
    command = arguments[0] if arguments[:1] and arguments[0] in RUN_COMMANDS else "submit"
    rest = arguments[1:] if arguments[:1] == [command] else arguments
    parser = _submit_parser() if command == "submit" else _run_parser(command)
    options = parser.parse_intermixed_args(rest)
    options.command = command
    if command == "submit" and not options.config:
        parser.error("--config is missing; give a YAML file, or its name in configs/")
    if command == "submit" and options.images and not options.dry_run:
        parser.error("--images applies to --dry-run only; a run counts the images of its data")
    return options


def _submit_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=PROGRAM,
        description="Submit a run to a Slurm cluster once; it requeues itself until finished.",
        epilog="Other commands: status RUN, cancel RUN, resume RUN (each with --help). Settings of "
        "the cluster may be stored in ~/.config/tetdist/cluster.yaml; see docs/slurm.md.",
    )
    parser.add_argument("--config", metavar="NAME", help="YAML file, or its name in configs/")
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="override a key of the configuration"
    )
    add_import(parser)
    parser.add_argument(
        "--sweep",
        nargs="+",
        metavar="key=a,b",
        default=[],
        help="submit a run for every combination as one job array: seed=0,1,2 loss.kind=sdt,tet",
    )
    parser.add_argument(
        "--after",
        metavar="RUN",
        action="append",
        default=[],
        help="start after this queued run is finished, never if it fails; may be repeated",
    )
    _add_cluster_flags(parser)
    how = parser.add_mutually_exclusive_group()
    how.add_argument(
        "--dry-run",
        action="store_true",
        help="print plan, batch script and configuration; needs no Slurm, writes nothing",
    )
    how.add_argument("--follow", action="store_true", help="after submitting, follow the log")
    how.add_argument(
        "--local",
        type=positive,
        metavar="N",
        help="run the same job on this machine in N processes, without Slurm",
    )
    parser.add_argument(
        "--images",
        type=positive,
        metavar="N",
        help="plan for N training images and 1000 classes, without the data (needs --dry-run)",
    )
    speed = parser.add_mutually_exclusive_group()
    speed.add_argument(
        "--images-per-s",
        type=float,
        metavar="X",
        help="training speed of one process, for the plan's hours",
    )
    speed.add_argument(
        "--benchmark",
        metavar="FILE",
        help="the same, as measured: file of bench or check_gpu (--json FILE), or a run's folder",
    )
    return parser


def _run_parser(command: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=f"{PROGRAM} {command}", description=RUN_COMMANDS[command])
    parser.add_argument("run", metavar="RUN", help="run or sweep: its folder, or its name in runs/")
    if command == "resume":
        parser.add_argument("--new-code", action="store_true", help="use the current code instead")
        _add_cluster_flags(parser)
    if command != "cancel":
        parser.add_argument("--follow", action="store_true", help="follow the log")
    return parser


def _add_cluster_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("the job")
    group.add_argument("--nodes", type=positive, metavar="N")
    group.add_argument(
        "--gpus-per-node", type=int, metavar="G", help="one process each; 0: train on the CPU"
    )
    group.add_argument("--partition", metavar="P")
    group.add_argument("--account", metavar="A")
    group.add_argument("--qos", metavar="Q")
    group.add_argument("--constraint", metavar="C", help="features that the nodes must have")
    group.add_argument("--time", metavar="T", help="time limit of a job: 24:00:00, 2-00, ...")
    group.add_argument(
        "--setup",
        action="append",
        metavar="CMD",
        help="shell command to run before the processes start; may be repeated",
    )


def run(options: argparse.Namespace) -> int:
    """Run the parsed command.

    Returns:
        Exit status: 0 success, 1 a followed run did not finish, 130 --follow was interrupted.
    """
    command = {"submit": submit, "status": status, "cancel": cancel, "resume": resume}
    return command[options.command](options)


def submit(options: argparse.Namespace) -> int:
    from tetdist.apps.slurm import plan, speed
    from tetdist.apps.slurm import status as show
    from tetdist.apps.slurm import submit as submission
    from tetdist.config import loading as configuration

    base = configuration.load(options.config, options.overrides, options.imports)
    cluster = cluster_of(base.cluster, options)
    if options.local:
        if options.after:
            raise UserError("--after cannot be combined with --local; leave out one of them")
        cluster = cluster.model_copy(update={"nodes": 1, "tasks_per_node": options.local})
    sweep: dict[str, list[str]] = {base.name: []}
    if options.sweep:
        if options.local or options.follow:
            raise UserError("--sweep cannot be combined with --local or --follow; leave out one")
        sweep = submission.sweep_of(base.name, options.sweep)
    job_name = base.name if len(sweep) == 1 else f"{base.name}_sweep"
    runs: list[Prepared] = []
    for name, overrides in sweep.items():
        own = joined([*options.overrides, *overrides], [f"name={name}"])
        config = configuration.load(options.config, own, options.imports) if options.sweep else base
        data = submission.assumed_indexes(config, options.images) if options.dry_run else None
        runs.append(submission.prepare(config, cluster, options.after, data))
    found = speed.speed_of(
        runs[0].config,
        cluster,
        runs[0].frames,
        images_per_s=options.images_per_s,
        benchmark=options.benchmark,
    )
    if options.dry_run:
        print(submission.dry_run(runs, job_name, found, options.after))
        return 0
    if options.local:
        return submission.run_here(runs[0])
    after = [run for name in options.after for run in show.find(name)]
    left = submission.unfinished(runs)
    submissions = submission.submit(left, job_name, after=after, sweep=runs)
    print(plan.describe(runs[0].plan, found))
    for run, done in zip(left, submissions, strict=True):
        submission.log_summary(done, run.config)
    return _follow(runs[0].config.run_dir) if options.follow else 0


def resume(options: argparse.Namespace) -> int:
    runs = _runs_of(options)
    for run_dir in runs:
        _resume(run_dir, options)
    return _follow(runs[0]) if options.follow else 0


def _runs_of(options: argparse.Namespace) -> list[Path]:
    from tetdist.apps.slurm import status as show

    runs = show.find(options.run)
    if options.follow and len(runs) > 1:
        raise UserError(
            f"--follow takes one run, and {options.run} is a sweep of {len(runs)}; name one of them"
        )
    return runs


def _resume(run_dir: Path, options: argparse.Namespace) -> None:
    from tetdist.apps.slurm import history, jobs
    from tetdist.apps.slurm import status as show
    from tetdist.apps.slurm import submit as submission

    earlier = show.submission_of(run_dir)
    if show.is_finished(run_dir):
        print(f"{run_dir} is finished: nothing to do")
        return
    jobs.refuse_if_queued(run_dir)
    config = submission.config_of(earlier)
    cluster = cluster_of(earlier.cluster, options)
    # A run that began once need not wait: its predecessors were finished then.
    after = [Path(path) for path in earlier.after] if not history.saved_step(run_dir) else []
    run = submission.prepare(config, cluster, after)
    code = None if options.new_code else Path(earlier.code)
    (done,) = submission.submit([run], config.name, code, after)
    submission.log_summary(done, config)


def status(options: argparse.Namespace) -> int:
    from tetdist.apps.slurm import status as show

    runs = _runs_of(options)
    if options.follow:
        return _follow(runs[0])
    print("\n\n".join(map(show.describe, runs)))
    return 0


def cancel(options: argparse.Namespace) -> int:
    from tetdist.apps.slurm import history, jobs
    from tetdist.apps.slurm import status as show
    from tetdist.apps.slurm import submit as submission
    from tetdist.apps.slurm.history import JobEvent

    # Cancel from the last run to the first: Slurm itself removes the dependents of a cancelled job,
    # and their histories would not record it.
    for run_dir in reversed(show.find(options.run)):
        job = show.submission_of(run_dir)
        state = jobs.state_of(job)
        if not state.is_queued:
            print(f"{run_dir} is not queued: job {job.job} is {state.name} ({state.text})")
            continue
        jobs.cancel(job.job)
        # If the job is requeuing itself now, its next start reads this line and exits.
        history.note(run_dir, JobEvent("cancelled", job.job, step=history.saved_step(run_dir)))
        # A training process updates MLflow itself, but there may be none yet.
        history.announce(submission.config_of(job), "KILLED", {})
        print(f"cancelled job {job.job}; `{typed('slurm', 'resume', run_dir)}` continues the run")
    return 0


def cluster_of(section: dict[str, Any], options: argparse.Namespace) -> "ClusterSection":
    """Combine the cluster's settings from all places; the number of GPUs is required."""
    from tetdist.apps.slurm import cluster

    of_job = ("partition", "account", "qos", "constraint", "time", "setup")
    names = ("nodes", "gpus_per_node", *of_job)
    flags = {name: value for name in names if (value := getattr(options, name)) is not None}
    facts = cluster.gather(section, flags)
    if facts.gpus_per_node is None and getattr(options, "dry_run", False):
        print(f"without --gpus-per-node, the plan assumes {ASSUMED_GPUS}", file=sys.stderr)
        facts = facts.model_copy(update={"gpus_per_node": ASSUMED_GPUS})
    if facts.gpus_per_node is None and not getattr(options, "local", None):
        raise UserError(
            "the number of GPUs a node is missing; give --gpus-per-node G (0: train on the CPU) or "
            f"gpus_per_node: G in {cluster.cluster_file()}"
        )
    return facts


def _follow(run_dir: Path) -> int:
    from tetdist.apps.slurm import status as show

    try:
        return show.follow(run_dir)
    except KeyboardInterrupt:
        again = typed("slurm", "status", run_dir, "--follow")
        print(f"\nthe job continues; `{again}` follows it again")
        return 130
