"""Runs of a study on a Slurm cluster: submitted at once, each to start after those it needs."""

import math
import shutil
from argparse import Namespace
from pathlib import Path

from tetdist.apps.slurm import command, history
from tetdist.apps.slurm import submit as submission
from tetdist.apps.slurm.cluster import ClusterSection
from tetdist.apps.slurm.jobs import State, cancel, is_here, states_of
from tetdist.apps.slurm.plan import seconds_of
from tetdist.apps.studies.plan import StudyRun, check_inputs, is_trained
from tetdist.errors import UserError, typed
from tetdist.wording import counted, duration


def submit(runs: list[StudyRun], output: Path, options: Namespace) -> int:
    """Submit the runs that are neither finished nor queued, each after those that it needs.

    ``options`` are those of the command slurm.
    """
    if options.dry_run:
        return dry_run(runs, output, options)
    queued, stale = queued_runs(runs), list[str]()
    left: dict[StudyRun, ClusterSection] = {}
    for run in runs:
        job, state = queued.get(run, ("", None))
        # A pending job whose predecessor failed leaves the queue a moment later.
        is_stale = state and state.name == "PENDING" and any(needed in left for needed in run.needs)
        if state and not is_stale:
            print(f"{run.name}: {state.name} as job {job} ({state.text})")
        elif not state and is_trained(run):
            print(f"{run.name}: finished")
        else:
            left[run] = command.cluster_of(run.config.cluster, options)
            stale += [job] if is_stale else []
    check_inputs(list(left))
    for job in stale:
        cancel(job)
    if left:
        send_all(left, output)
    print(
        f"`{typed('slurm', 'status', output)}` shows the runs, `cancel` cancels them; once all are "
        "finished, the same command without --slurm evaluates and reports"
    )
    return 0


def dry_run(runs: list[StudyRun], output: Path, options: Namespace) -> int:
    """Print the time of all unfinished runs, and the last one's plan and script, without Slurm."""
    seconds, shown, speed = list[float](), "", options.images_per_s
    code = history.slurm_folder(output.absolute()) / "submission-N" / "code"
    for run in runs:
        if is_trained(run):
            print(f"{run.name}: finished")
            continue
        after = [needed for needed in run.needs if not is_trained(needed)]
        folders = [needed.folder for needed in after]
        batch = run.config.batch
        cluster = command.cluster_of(run.config.cluster, options, batch.global_ // batch.micro)
        plan = submission.prepare(run.config, cluster, folders, options.images)
        seconds.append(math.nan if speed is None else seconds_of(plan, speed))
        print(f"{run.name}: {_time(seconds[-1])}{_starts_after(after)}", flush=True)
        shown = submission.dry_run(plan, options, folders, code)
    about = f". The last one's plan and script:\n{shown}" if shown else ""
    same = ", at the given samples/s whatever the T of a run" * (speed is not None)
    print(f"{counted(len(seconds), 'run')} to submit: {_time(sum(seconds))}{same}{about}")
    return 0


def _time(seconds: float) -> str:
    return "time unknown" if math.isnan(seconds) else duration(seconds)


def _starts_after(needed: list[StudyRun]) -> str:
    return f", starts after {', '.join(run.name for run in needed)}" if needed else ""


def queued_runs(runs: list[StudyRun]) -> dict[StudyRun, tuple[str, State]]:
    """Return the jobs in the queue and their states, by run."""
    newest = {run: history.newest_submission(run.folder) for run in runs}
    jobs = {run: submitted.job for run, submitted in newest.items() if submitted is not None}
    states = states_of([submitted for submitted in newest.values() if submitted is not None])
    return {run: (job, states[job]) for run, job in jobs.items() if states[job].is_queued}


def refuse_if_queued(runs: list[StudyRun]) -> None:
    """Refuse to train runs here that Slurm will train."""
    for run, (job, state) in queued_runs(runs).items() if is_here() else ():
        if not is_trained(run):
            raise UserError(
                f"{run.name} is {state.name} as job {job} ({state.text}); wait for it, cancel it "
                f"with `{typed('slurm', 'cancel', run.folder)}`, or report the finished runs with "
                "--report-only"
            )


def send_all(left: dict[StudyRun, ClusterSection], output: Path) -> None:
    """Submit the runs, each after those that it needs, all with one copy of the code.

    Raises:
        UserError: A run is refused; the runs before it are submitted. Without any, nothing stays.
    """
    is_new, done = not output.exists(), 0
    folder = history.next_submission(output)
    code = submission.copy_code(folder / "code")
    try:
        for run, cluster in left.items():
            after = [needed for needed in run.needs if not is_trained(needed)]
            folders = [needed.folder for needed in after]
            plan = submission.prepare(run.config, cluster, folders)
            submitted = submission.submit(plan, code, folders)
            done += 1
            print(f"{run.name}: submitted as job {submitted.job}{_starts_after(after)}", flush=True)
    except UserError as error:
        if not done:
            shutil.rmtree(output if is_new else folder)
        rest = f"; {done} of {counted(len(left), 'run')} {'was' if done == 1 else 'were'} submitted"
        rest += "; the same command submits the others"
        raise UserError(f"{run.name}: {error}{rest if done else ''}") from error
