"""Runs of a study on a Slurm cluster: submitted at once, each to start after those it needs."""

import argparse
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tetdist.apps.slurm import command, history, status
from tetdist.apps.slurm import submit as submission
from tetdist.apps.slurm.cluster import ClusterSection
from tetdist.apps.slurm.history import Submission
from tetdist.apps.slurm.jobs import State, cancel, is_here, states_of
from tetdist.apps.studies.plan import StudyRun, check_inputs, is_trained
from tetdist.apps.studies.tracking import Parent
from tetdist.config import loading as configuration
from tetdist.config.schema import RunConfig
from tetdist.errors import UserError, typed
from tetdist.wording import counted

Word = Literal[
    "finished", "running", "queued", "new", "submitted", "failed", "cancelled", "held back"
]

# States that a run does not leave by itself, as the reason why its dependents do not start.
LOST: dict[Word, str] = {
    "failed": "failed",
    "cancelled": "was cancelled",
    "held back": "does not start either",
}


@dataclass(frozen=True)
class Standing:
    """State of a run in the study, and a text with details; ``submitted``: by this command."""

    word: Word
    text: str


def submit(study: str, runs: list[StudyRun], output: Path, flags: list[str], again: bool) -> int:
    """Submit the runs that are neither finished nor queued, and print the state of each.

    Each run comes after those that it needs; ``again`` also submits failed and cancelled ones.

    Returns:
        Exit status: 0 all are finished, running or queued; 1 some failed, or depend on such.
    """
    if read_flags(flags, runs[0].arguments[1]).dry_run:
        return dry_run(runs, flags)
    if not is_here():
        raise UserError(
            "there is no Slurm here (no sbatch on the PATH); run this on a login node, or leave "
            "out --slurm to train here, or add --dry-run to see the jobs"
        )
    found = query(runs)
    standings = decide(found, again)
    left = {run: job_of(run, flags) for run in runs if standings[run].word == "new"}
    check_inputs(list(left))
    for run in runs:
        if run in left:
            continue
        if standings[run].word == "held back" and history.newest_submission(run.folder):
            history.announce(run.config, "KILLED", {})
        print(f"{run.name}: {standings[run].text}")
    for run in left:
        # Cancel an old job that waits for a failed run.
        if found[run].word == "queued" and (submitted := history.newest_submission(run.folder)):
            cancel(submitted.job)
    if left:
        standings |= send_all(study, left, output)
    return log_summary(standings, output)


def read_flags(flags: list[str], config_name: str) -> argparse.Namespace:
    """Parse the flags after --slurm."""
    options = command.parse_arguments(["--config", config_name, *flags])
    if options.config != config_name or options.after:
        flag = "after" if options.after else "config"
        raise UserError(f"--slurm: --{flag} applies to single runs, not to a study; omit it")
    for override in options.overrides:
        if not override.startswith("cluster."):
            raise UserError(
                f"--slurm: only flags and cluster.key=value may follow it; write {override} before "
                "it, so that it is part of the study"
            )
    return options


def dry_run(runs: list[StudyRun], flags: list[str]) -> int:
    """Print the jobs of all unfinished runs; this needs no Slurm."""
    statuses = [0]
    for run in runs:
        if is_trained(run):
            print(f"# === {run.name}: finished")
            continue
        after = [needed for needed in run.needs if not is_trained(needed)]
        print(f"# === {run.name}{_starts_after(after)}", flush=True)
        dependency = [word for needed in after for word in ("--after", str(needed.folder))]
        arguments = [*run.arguments, *dependency, *flags]
        statuses.append(command.run(command.parse_arguments(arguments)))
    return max(statuses)


def _starts_after(needed: list[StudyRun]) -> str:
    return f", starts after {', '.join(run.name for run in needed)}" if needed else ""


# --- states of the runs ---------------------------------------------------------------------------


def query(runs: list[StudyRun]) -> dict[StudyRun, Standing]:
    """Return the states of the runs.

    Slurm is asked before their folders are read, because a run may end in between.
    """
    submissions = {run: history.newest_submission(run.folder) for run in runs}
    states = states_of([one for one in submissions.values() if one])
    return {
        run: standing_of(run, submitted, states.get(submitted.job) if submitted else None)
        for run, submitted in submissions.items()
    }


def refuse_if_queued(runs: list[StudyRun]) -> None:
    """Refuse to train runs here that Slurm will train."""
    if not is_here():
        return
    for run, standing in query(runs).items():
        if standing.word in ("queued", "running") and not is_trained(run):
            raise UserError(
                f"{run.name} is {standing.text}; wait for it, cancel it with "
                f"`{typed('slurm', 'cancel', run.folder)}`, or report the finished runs with "
                "--report-only"
            )


def standing_of(run: StudyRun, submitted: Submission | None, state: State | None) -> Standing:
    """Return the state of a run, given its newest job and that job's state."""
    if submitted is not None and state is not None and state.is_queued:
        text = f"{state.name} as job {submitted.job} ({state.text})"
        if state.name == "PENDING":
            return Standing("queued", text)
        return Standing("running", text)
    if is_trained(run):
        return Standing("finished", "finished")
    if submitted is None or state is None:
        return Standing("new", "not submitted")
    events = history.since_submission(history.history(run.folder))
    kinds = {event.kind for event in events}
    if "cancelled" in kinds:
        return Standing("cancelled", f"cancelled, job {submitted.job}")
    if state.name in ("CANCELLED", "unknown") and "started" not in kinds:
        # Most likely it left the queue because the run that it waited for failed, which does not
        # count as its own failure.
        if submitted.after:
            return Standing("new", "not submitted")
        return Standing("cancelled", f"cancelled in the queue, job {submitted.job}")
    reason = status.failure_of(events, submitted) or f"{state.name}, {state.text}"
    return Standing(
        "failed",
        f"failed, job {submitted.job}: {reason.splitlines()[-1]} (log: {submitted.log_file})",
    )


def decide(standings: dict[StudyRun, Standing], again: bool) -> dict[StudyRun, Standing]:
    """Decide which runs to submit: return the states with ``new`` for exactly these runs.

    A run that waits for a failed job leaves the queue a moment later; it is treated as if it had
    already left.
    """
    decided: dict[StudyRun, Standing] = {}
    for run, standing in standings.items():
        if again and standing.word in LOST:
            standing = Standing("new", "not submitted")
        if standing.word == "queued" and any(decided[n].word == "new" for n in run.needs):
            standing = Standing("new", "not submitted")
        lost = [needed for needed in run.needs if decided[needed].word in LOST]
        if standing.word in ("new", "queued") and lost:
            reason = f"{lost[0].name} {LOST[decided[lost[0]].word]}"
            standing = Standing("held back", f"does not start, because {reason}")
        decided[run] = standing
    return decided


# --- submission -----------------------------------------------------------------------------------


def job_of(run: StudyRun, flags: list[str]) -> tuple[RunConfig, ClusterSection]:
    """Return the configuration of the run and the cluster's settings."""
    options = command.parse_arguments([*run.arguments, *flags])
    config = configuration.load(options.config, options.overrides, options.imports)
    return config, command.cluster_of(config.cluster, options)


def send_all(
    study: str, left: dict[StudyRun, tuple[RunConfig, ClusterSection]], output: Path
) -> dict[StudyRun, Standing]:
    """Submit the runs, each after those that it needs, all with one copy of the code.

    Raises:
        UserError: A run is refused; the runs before it are submitted.
    """
    code = submission.copy_code(history.next_submission(output) / "code")
    parent = Parent(study, list(left), output)
    standings: dict[StudyRun, Standing] = {}
    try:
        for run, facts in left.items():
            standings[run] = send(run, *facts, code)
            parent.announce(run, None)
            print(f"{run.name}: {standings[run].text}", flush=True)
    except UserError as error:
        done = len(standings)
        rest = f"; {done} of {counted(len(left), 'run')} {'was' if done == 1 else 'were'} submitted"
        rest += "; the same command submits the others"
        raise UserError(f"{run.name}: {error}{rest if done else ''}") from error
    return standings


def send(run: StudyRun, config: RunConfig, cluster: ClusterSection, code: Path) -> Standing:
    """Submit one run."""
    after = [needed for needed in run.needs if not is_trained(needed)]
    folders = [needed.folder for needed in after]
    prepared = submission.prepare(config, cluster, folders)
    done = submission.submit(prepared, code, folders)
    return Standing("submitted", f"submitted as job {done.job}{_starts_after(after)}")


def log_summary(standings: dict[StudyRun, Standing], output: Path) -> int:
    """Print the number of runs by state and the next command; return the exit status."""
    counts = Counter(standing.word for standing in standings.values())
    by_state = ", ".join(f"{number} {word}" for word, number in counts.items())
    print(f"{counted(len(standings), 'run')}: {by_state}")
    if counts["finished"] == len(standings):
        print("run the same command without --slurm to evaluate and report")
        return 0
    if not any(counts[word] for word in LOST):
        print(
            f"`{typed('slurm', 'status', output)}` shows them, `cancel` cancels them; once all are "
            "finished, run the same command without --slurm to evaluate and report"
        )
        return 0
    print(
        "--again before --slurm resubmits failed and cancelled runs from their newest checkpoints, "
        "and the runs that depend on them",
        file=sys.stderr,
    )
    return 1
