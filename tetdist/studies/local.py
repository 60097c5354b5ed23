"""Run a study, several configurations with several seeds, and report what came out.

    python tools/study.py tet_vs_sdt_digits
    python tools/study.py STUDY.yaml --jobs 2 --append-to docs/results.md
    python tools/study.py STUDY.yaml --slurm --gpus-per-node 1 --time 4:00:00

Every run is a call of tetdist/train.py. The same command goes on after a stop: runs that are
finished are left alone, others continue where they were saved. On a cluster it also says how they
are, and leaves alone what is queued.
"""

import argparse
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tetdist.studies.plan import Run
    from tetdist.studies.tracking import Parent

LOOK_EVERY = 0.2  # seconds between two looks at the processes


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="tools/study.py",
        description="Run a study and write its report. The same command continues a stopped one.",
        epilog="Exit status: 0 all asked for is done, 1 runs failed, 2 a mistake in what was asked "
        "for, 130 stopped.",
    )
    parser.add_argument("study", metavar="STUDY", help="a YAML file, or one in configs/studies/")
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="key=value",
        help="override a key of the configuration in all runs: data.root=..., batch.micro=64",
    )
    parser.add_argument(
        "--output", metavar="DIR", type=Path, help="folder of runs and report; runs/STUDY"
    )
    parser.add_argument(
        "--jobs", metavar="N", type=int, default=1, help="runs side by side, which share the cores"
    )
    parser.add_argument(
        "--only",
        metavar="ENTRY",
        action="append",
        help="train this entry only, and what it begins with; may be repeated",
    )
    parser.add_argument("--report-only", action="store_true", help="train nothing")
    parser.add_argument(
        "--append-to",
        metavar="FILE.md",
        type=Path,
        help="put the report there, too, in place of the study's earlier one",
    )
    parser.add_argument(
        "--again",
        action="store_true",
        help="with --slurm: submit also what was submitted before and has failed or was cancelled",
    )
    parser.add_argument(
        "--slurm",
        nargs=argparse.REMAINDER,
        metavar="FLAG",
        help="submit all runs at once instead, or say how they are; what follows are flags of "
        "launch/slurm.py: --gpus-per-node, --partition, --time, ..., --dry-run. A run that begins "
        "with another's weights, or learns from it, waits for that one. Once all are finished, "
        "the same command without it evaluates and reports",
    )
    options = parser.parse_intermixed_args(arguments)
    if options.jobs < 1:
        parser.error("--jobs must be at least 1")
    if options.append_to and options.append_to.suffix != ".md":
        parser.error(f"--append-to takes a Markdown file, FILE.md, not {options.append_to}")
    if options.slurm is not None and options.report_only:
        parser.error("--report-only submits nothing: leave out --slurm")
    if options.again and options.slurm is None:
        parser.error("--again goes with --slurm; here, runs that failed are always tried again")
    return options


def main(arguments: list[str] | None = None) -> int:
    options = parse_arguments(arguments)
    logging.basicConfig(level=logging.ERROR, format="%(message)s")
    logging.getLogger("tetdist.tracking").setLevel(logging.WARNING)  # MLflow does not answer
    try:
        from tetdist.errors import UserError
    except ModuleNotFoundError as error:
        return fail(f"the package {error.name} is not installed; pip install 'tetdist[train]'")
    try:
        return study(options)
    except UserError as error:
        return fail(str(error))
    except ModuleNotFoundError as error:
        return fail(f"the package {error.name} is not installed; pip install 'tetdist[train]'")
    except KeyboardInterrupt:
        print("stopped; the same command goes on where it was", file=sys.stderr)
        return 130


def fail(text: str) -> int:
    print(f"error: {text}", file=sys.stderr)
    return 2


def study(options: argparse.Namespace) -> int:
    from tetdist.studies import plan, report, tracking

    file = plan.find(options.study)
    section = plan.read(file)
    output = options.output or Path("runs") / file.stem
    runs = plan.runs_of(section, output, options.overrides)
    chosen = choose(runs, options.only)
    for run in runs:
        plan.check_folder(run)
    failed: dict[str, str] = {}
    if options.slurm is not None:
        from tetdist.studies import slurm

        return slurm.submit(file.stem, chosen, output, options.slurm, options.again)
    if not options.report_only:
        left = [run for run in chosen if run.next_command()]
        plan.check_inputs(left)
        if any((run.folder / "slurm").exists() for run in left):
            from tetdist.studies import slurm

            slurm.refuse_if_queued(left)
        untrained = [run for run in left if not plan.is_trained(run)]
        parent = tracking.Parent(file.stem, untrained, output)
        failed = work(chosen, options.jobs, parent)
    report.write(section, file.stem, runs, output / "report.md", command(options, file))
    print(f"the report is {output / 'report.md'}")
    if options.append_to:
        report.write(section, file.stem, runs, options.append_to, command(options, file))
        print(f"and in {options.append_to}")
    for name, reason in failed.items():
        print(f"failed: {name}: {reason}", file=sys.stderr)
    return 1 if failed else 0


def command(options: argparse.Namespace, file: Path) -> str:
    """The command that makes the study, for its report, wherever that was asked for."""
    from tetdist.studies import plan

    words = [sys.executable, "tools/study.py", str(file).removeprefix(f"{plan.PROJECT}/")]
    words += options.overrides
    if options.output:
        words += ["--output", str(options.output)]
    if options.jobs > 1:
        words += ["--jobs", str(options.jobs)]
    for entry in options.only or []:
        words += ["--only", entry]
    return plan.shown(words)


def choose(runs: "list[Run]", entries: list[str] | None) -> "list[Run]":
    """The runs of some entries, and those that they need."""
    from tetdist.errors import UserError

    if entries is None:
        return runs
    known = list(dict.fromkeys(run.entry for run in runs))
    for entry in entries:
        if entry not in known:
            raise UserError(f"--only: there is no entry {entry}; there are {', '.join(known)}")
    chosen: set[str] = set()
    # From the end, because a run comes after those that it needs.
    for run in reversed(runs):
        if run.entry in entries or run.name in chosen:
            chosen |= {run.name, *(needed.name for needed in run.needs)}
    return [run for run in runs if run.name in chosen]


# --- on this machine ------------------------------------------------------------------------------


def work(runs: "list[Run]", jobs: int, parent: "Parent") -> dict[str, str]:
    """Train and evaluate what is not done yet, some runs at a time.

    Returns:
        The runs that failed, and why.
    """
    from tetdist.studies.plan import is_trained

    waiting = [run for run in runs if run.next_command() is not None]
    progress = Progress(len(runs), len(waiting))
    running: dict[Run, Child] = {}
    failed: dict[str, str] = {}
    with progress, ended_at_exit(running):
        while waiting or running:
            for run in list(waiting):
                lost = [needed.name for needed in run.needs if needed.name in failed]
                if lost:
                    waiting.remove(run)
                    failed[run.name] = f"not started, because {lost[0]} failed"
                    progress.end(f"{run.name}: {failed[run.name]}")
                elif len(running) < jobs and all(map(is_trained, run.needs)):
                    waiting.remove(run)
                    if not is_trained(run):
                        parent.tell(run, "SCHEDULED")
                    running[run] = Child(run, jobs)
            run = first_to_end(running)
            if run is None:
                continue
            child = running.pop(run)
            reason = child.failure()
            if reason is None and (more := run.next_command()) is not None:
                running[run] = Child(run, jobs, more)
                continue
            if reason is not None:
                failed[run.name] = reason
                if not is_trained(run):
                    parent.tell(run, "FAILED")
            progress.end(f"{run.name}: {reason or outcome(run)}")
    return failed


class Child:
    """A process that trains or evaluates a run; what it prints goes to the run's log."""

    def __init__(self, run: "Run", jobs: int, command: list[str] | None = None) -> None:
        self.run = run
        self.command = command or run.next_command()
        assert self.command is not None
        run.log.parent.mkdir(parents=True, exist_ok=True)
        threads = max(1, len(os.sched_getaffinity(0)) // jobs)
        with run.log.open("ab") as log:
            self.process = subprocess.Popen(
                self.command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                # Away from the terminal's Ctrl-C, which is passed on once, as SIGTERM.
                start_new_session=True,
                env={"OMP_NUM_THREADS": str(threads)} | os.environ,
            )

    def failure(self) -> str | None:
        """Why it ended without having done what it was for; None: it has done it."""
        status = self.process.returncode
        if status == 0 and self.run.next_command() != self.command:
            return None
        if status == 0 and self.command == self.run.train_command:
            folder = self.run.folder
            return f"{folder / 'metrics.jsonl'} lacks evaluations; remove {folder} to train it anew"
        said = [line for line in self.run.log.read_text(errors="replace").splitlines() if line]
        return f"exit status {status}: {said[-1] if said else 'it said nothing'} ({self.run.log})"


@contextmanager
def ended_at_exit(running: "dict[Run, Child]") -> Iterator[None]:
    """Whatever happens, no child is left behind: each saves and ends."""
    # A stop by a batch system or `kill` is one by Ctrl-C.
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
        children = [child.process for child in running.values()]
        try:
            for process in children:
                process.terminate()
            for process in children:
                process.wait()
        except KeyboardInterrupt:  # A second one is meant.
            for process in children:
                process.kill()
            raise


def first_to_end(running: "dict[Run, Child]") -> "Run | None":
    """Wait until a process ends; None if there is none."""
    while running:
        for run, child in running.items():
            if child.process.poll() is not None:
                return run
        time.sleep(LOOK_EVERY)
    return None


def outcome(run: "Run") -> str:
    from tetdist.studies.plan import lines

    last = lines(run, "val")[-1]
    return f"top-1 {last['top1']:.2f} %, best {last['best_top1']:.2f} %"


class Progress:
    """Runs done, with rate and time left: a bar on a terminal, a line a run elsewhere."""

    def __init__(self, total: int, left: int) -> None:
        from tqdm import tqdm

        self.total, self.left, self.done_here = total, left, 0
        self.started = time.monotonic()
        self.on_terminal = sys.stderr.isatty()
        self.bar = tqdm(
            total=total,
            initial=total - left,
            unit="run",
            dynamic_ncols=True,
            disable=not self.on_terminal,
        )
        if left < total:
            self.say(f"{total - left} of {total} runs are done already")

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.close()

    def end(self, text: str) -> None:
        self.left -= 1
        self.done_here += 1
        self.bar.update()
        seconds = (time.monotonic() - self.started) / self.done_here * self.left
        eta = f"; about {seconds / 60:.0f} min left" if self.left and not self.on_terminal else ""
        self.say(f"[{self.total - self.left}/{self.total}] {text}{eta}")

    def say(self, text: str) -> None:
        self.bar.write(text, file=sys.stderr)
        sys.stderr.flush()
