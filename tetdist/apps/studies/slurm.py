"""Runs of a study on a Slurm cluster: submitted at once, each to start after those it needs."""

import math
import shutil
from pathlib import Path

from tetdist.apps.slurm import command, history
from tetdist.apps.slurm import submit as submission
from tetdist.apps.slurm.cluster import ClusterSection
from tetdist.apps.slurm.jobs import State, cancel, is_here, states_of
from tetdist.apps.slurm.plan import seconds_of
from tetdist.apps.studies.plan import StudyRun, check_inputs, is_trained
from tetdist.config import loading as configuration
from tetdist.config.schema import RunConfig
from tetdist.errors import UserError, typed
from tetdist.wording import counted, duration


def submit(runs: list[StudyRun], output: Path, flags: list[str]) -> int:
    """Submit the runs that are neither finished nor queued, each after those that it needs."""
    if "--dry-run" in flags:
        return dry_run(runs, output, flags)
    queued, stale = queued_runs(runs), list[str]()
    left: dict[StudyRun, tuple[RunConfig, ClusterSection]] = {}
    for run in runs:
        job, state = queued.get(run, ("", None))
        # A pending job whose predecessor failed leaves the queue a moment later.
        if state and state.name == "PENDING" and any(needed in left for needed in run.needs):
            left[run] = job_of(run, flags)
            stale.append(job)
        elif state:
            print(f"{run.name}: {state.name} as job {job} ({state.text})")
        elif is_trained(run):
            print(f"{run.name}: finished")
        else:
            left[run] = job_of(run, flags)
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


def dry_run(runs: list[StudyRun], output: Path, flags: list[str]) -> int:
    """Print the time of all unfinished runs, and the last one's plan and script, without Slurm."""
    seconds, shown = list[float](), ""
    code = history.slurm_folder(output.absolute()) / "submission-N" / "code"
    for run in runs:
        if is_trained(run):
            print(f"{run.name}: finished")
            continue
        after = [needed for needed in run.needs if not is_trained(needed)]
        dependency = [word for needed in after for word in ("--after", str(needed.folder))]
        options = command.parse_arguments([*run.arguments, *dependency, *flags])
        prepared, speed = command.planned(options), options.images_per_s
        seconds.append(math.nan if speed is None else seconds_of(prepared.plan, speed))
        print(f"{run.name}: {_time(seconds[-1])}{_starts_after(after)}", flush=True)
        shown = submission.dry_run(prepared, options, code)
    about = f". The last one's plan and script:\n{shown}" if shown else ""
    is_given = any(flag.startswith("--images-per-s") for flag in flags)
    same = ", at the given samples/s whatever the T of a run" * is_given
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


def job_of(run: StudyRun, flags: list[str]) -> tuple[RunConfig, ClusterSection]:
    """Return the configuration of the run and the cluster's settings."""
    options = command.parse_arguments([*run.arguments, *flags])
    config = configuration.load(options.config, options.overrides, options.imports)
    return config, command.cluster_of(config.cluster, options)


def send_all(left: dict[StudyRun, tuple[RunConfig, ClusterSection]], output: Path) -> None:
    """Submit the runs, each after those that it needs, all with one copy of the code.

    Raises:
        UserError: A run is refused; the runs before it are submitted. Without any, nothing stays.
    """
    is_new, done = not output.exists(), 0
    folder = history.next_submission(output)
    code = submission.copy_code(folder / "code")
    try:
        for run, (config, cluster) in left.items():
            after = [needed for needed in run.needs if not is_trained(needed)]
            folders = [needed.folder for needed in after]
            prepared = submission.prepare(config, cluster, folders)
            submitted = submission.submit(prepared, code, folders)
            done += 1
            print(f"{run.name}: submitted as job {submitted.job}{_starts_after(after)}", flush=True)
    except UserError as error:
        if not done:
            shutil.rmtree(output if is_new else folder)
        rest = f"; {done} of {counted(len(left), 'run')} {'was' if done == 1 else 'were'} submitted"
        rest += "; the same command submits the others"
        raise UserError(f"{run.name}: {error}{rest if done else ''}") from error
