"""Command-line interface of slurm: submit, status, cancel, resume."""

import argparse
import math
import sys
from pathlib import Path
from typing import Any

from tetdist import order
from tetdist.apps.reports.reference import find_reference
from tetdist.apps.reports.run_status import find_runs, read_status
from tetdist.apps.slurm import history, jobs, status
from tetdist.apps.slurm.cluster import ClusterSection, cluster_file, gather
from tetdist.config import loading
from tetdist.config.flags import Parser, add_import, positive
from tetdist.config.key_parser import KeyParser
from tetdist.config.loading import Draft
from tetdist.config.schema import RunConfig
from tetdist.datasets.index import check_indexed
from tetdist.errors import UserError, typed
from tetdist.tracking.trackers import check_names
from tetdist.wording import meant

# Commands that take a run, with their descriptions.
RUN_COMMANDS = {
    "status": "Show a run's state, progress, restarts and their reasons.",
    "cancel": "Cancel a run's job; a training run saves first. `resume` continues it.",
    "resume": "Resubmit a run from its newest checkpoint, with the code of its last submission.",
}
PROGRAM = typed("slurm").removeprefix("python ")


class SubmitParser(KeyParser):
    """The parser of slurm, which names the key of the job for a flag of sbatch."""

    def meant(self, flag: str) -> str:
        word = flag.strip("-")
        if word == "benchmark":
            return "give --images-per-s X instead, which bench and status of a run print"
        keys = {key.replace("_", "-"): f"cluster.{key}" for key in ClusterSection.model_fields}
        keys |= {"mem": "cluster.mem_gb", "job-name": "name", "gres": "cluster.sbatch.gres"}
        if word not in keys and "did you mean" in (hint := super().meant(flag)):
            return hint
        return f"write {keys.get(word, f'cluster.sbatch.{word}')}=VALUE, without -- (docs/slurm.md)"


def parse_arguments(arguments: list[str]) -> argparse.Namespace:
    """Parse the command (``submit`` if none is named) and its flags."""
    first = "".join(arguments[:1])
    command = first if first in RUN_COMMANDS else "submit"
    # A key such as resume=must is near to a command, too.
    if command == "submit" and "=" not in first and (near := meant(first, RUN_COMMANDS, "")):
        submit_parser().error(f"there is no command {first}; {near}")
    rest = arguments[1:] if first == command else arguments
    parser = submit_parser() if command == "submit" else _run_parser(command)
    options = parser.parse_intermixed_args(rest)
    options.command = command
    if isinstance(parser, KeyParser):
        parser.require_config(options)
    if command == "submit" and not options.dry_run and (options.images or options.print_config):
        flag = "images" if options.images else "print-config"
        parser.error(f"--{flag} needs --dry-run, with which nothing is submitted")
    rate = options.images_per_s if command == "submit" else None
    if rate is not None and not 0 < rate < math.inf:
        parser.error(f"--images-per-s must be above 0, not {rate:g}")
    return options


def submit_parser() -> KeyParser:
    parser = SubmitParser(
        prog=PROGRAM,
        description="Submit a run to a Slurm cluster once; it requeues itself until finished.",
        epilog="Other commands: status [RUN], cancel RUN, resume RUN (each with --help). Further "
        "settings of the job: cluster.cpus_per_task=8, cluster.sbatch.exclusive=true, ...; "
        "~/.config/tetdist/cluster.yaml may hold all of them (docs/slurm.md).",
    )
    parser.add_config()
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="override a key of the configuration"
    )
    add_import(parser)
    parser.add_argument(
        "--after",
        metavar="RUN",
        action="append",
        default=[],
        help="start after this queued run is finished, never if it fails; may be repeated",
    )
    _add_cluster_flags(parser)
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="print plan and batch script; needs no Slurm, writes nothing",
    )
    parser.set_defaults(assumes_gpus=0)
    text = "with --dry-run: also print the whole configuration"
    parser.add_argument("--print-config", action="store_true", help=text)
    parser.add_argument(
        "--images",
        type=positive,
        metavar="N",
        help="plan for N training images and 1000 classes, without the data (needs --dry-run); "
        "validation images are in proportion to ImageNet's",
    )
    parser.add_argument(
        "--images-per-s",
        type=float,
        metavar="X",
        help="training speed of one process at the run's T, for the plan's hours; bench, "
        "check_gpu and status of a run print it",
    )
    return parser


def _run_parser(command: str) -> argparse.ArgumentParser:
    parser = Parser(prog=f"{PROGRAM} {command}", description=RUN_COMMANDS[command])
    about = "run or study: its folder, or its name in runs/"
    many = "*" if command == "status" else 1
    parser.add_argument("runs", metavar="RUN", nargs=many, help=about)
    if command == "resume":
        parser.add_argument("--new-code", action="store_true", help="use the current code instead")
        _add_cluster_flags(parser)
    return parser


def _add_cluster_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("the job").add_argument
    add("--nodes", type=positive, metavar="N", help="number of nodes (default: 1)")
    add("--gpus-per-node", type=int, metavar="G", help="one process each; 0: train on the CPU")
    add("--cpus-per-task", type=positive, metavar="N", help="CPU cores of each process")
    for name in ("partition", "account", "qos"):
        add(f"--{name}", metavar=name[0].upper(), help=f"sbatch's --{name}; default: the cluster's")
    add("--constraint", metavar="C", help="features that the nodes must have")
    add("--time", metavar="T", help="time limit of a job: 24:00:00, 2-00, ...")
    setup = "shell command to run before the processes start; may be repeated"
    add("--setup", action="append", metavar="CMD", help=setup)


def run(options: argparse.Namespace) -> int:
    """Run the parsed command, and return its exit status."""
    if options.command == "submit":
        _submit(options)
        return 0
    if options.command == "status":
        return status.show(options.runs)
    folders = status.find(*options.runs)
    from tetdist.apps.slurm import submit

    match options.command:
        case "cancel":
            # From the last run to the first: Slurm itself removes the dependents of a cancelled
            # job, and their histories would not record it.
            for run_dir in reversed(folders):
                print(submit.cancel(run_dir))
        case "resume":
            for run_dir in folders:
                if status.is_finished(run_dir):
                    print(f"{run_dir} is finished: nothing to do")
                    continue
                cluster = cluster_of(history.settings_of(run_dir), options)
                print(submit.resume(run_dir, cluster, new_code=options.new_code))
    return 0


def _submit(options: argparse.Namespace) -> None:
    """Check a run, and submit it or print its plan."""
    draft = loading.draft(options.config, options.overrides, options.imports)
    cluster = check_draft(draft, options)
    if not options.dry_run:
        jobs.check_here("use --dry-run to see the job")
    config = draft.completed()
    # Imported after these checks, because torch takes seconds.
    from tetdist.apps.slurm import plan, submit

    run = submit.prepare(config, cluster, options.after, options.images)
    if options.dry_run:  # the runs to wait for may not be submitted yet
        print(submit.dry_run(run, options, options.after))
        return
    needed = [one for name in options.after for one in find_runs([name])]
    after = [one for one in needed if read_status(one).state != "finished"]
    submit.refuse_if_finished(run)
    submitted = submit.submit(run, after=after)
    print(plan.describe(run, options.images_per_s))
    print(submit.summary(submitted, run.config))


def check_draft(draft: Draft, options: argparse.Namespace) -> ClusterSection:
    """Return the settings of a run's job, after all checks that need no torch."""
    config, batch = draft.config, draft.config.batch
    cluster = cluster_of(config.cluster, options, batch.global_ // batch.micro)
    if options.dry_run:
        _check_images(config, options.images)
    else:
        check_indexed(config, draft.data_command)
    order.rank_micro_batches(0, cluster.processes, batch.global_, batch.micro)
    if config.reference is not None:
        find_reference(config.reference)
    check_names(config.tracking.trackers)
    return cluster


def _check_images(config: RunConfig, images: int | None) -> None:
    """Refuse a plan without data if it does not know their number."""
    if config.data.kind == "events" and images is not None:
        raise UserError("--images does not apply to recordings, whose index the plan reads")
    if images is None and not Path(config.data.root).is_dir():
        raise UserError(
            f"data.root: there is no folder {config.data.root}; set data.root=FOLDER, or give the "
            "plan the number of training images: --images N (ImageNet: 1281167)"
        )


def cluster_of(
    section: dict[str, Any], options: argparse.Namespace, micro_batches: int = 8
) -> ClusterSection:
    """Combine the cluster's settings from all places; the number of GPUs is required.

    A plan may lack it, and assumes 8, 4, 2 or 1: as many as can share the micro-batches of a step.
    """
    flags = {name: vars(options).get(name) for name in ClusterSection.model_fields}
    facts = gather(section, {name: value for name, value in flags.items() if value is not None})
    if facts.gpus_per_node is None and getattr(options, "dry_run", False):
        assumed = math.gcd(8, micro_batches // facts.nodes)
        if options.assumes_gpus != assumed:  # once for all runs of a study that are alike
            print(f"without --gpus-per-node, the plan assumes {assumed}", file=sys.stderr)
        options.assumes_gpus = assumed
        return facts.model_copy(update={"gpus_per_node": assumed})
    if facts.gpus_per_node is None:
        raise UserError(
            "the number of GPUs a node is missing; give --gpus-per-node G (0: train on the CPU) or "
            f"gpus_per_node: G in {cluster_file()}"
        )
    return facts
