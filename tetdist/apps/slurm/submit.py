"""Submit a configuration as a job: check it, copy the code, record the submission."""

import dataclasses
import itertools
import math
import re
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

from tetdist import plugins
from tetdist.apps.reports.reference import find_reference
from tetdist.apps.slurm import batch, history, plan, snapshot, status
from tetdist.apps.slurm.cluster import ClusterSection
from tetdist.apps.slurm.history import JobEvent, Submission
from tetdist.apps.slurm.job import Job
from tetdist.apps.slurm.jobs import is_here, refuse_if_queued, states_of
from tetdist.apps.slurm.plan import Plan
from tetdist.apps.slurm.speed import Speed
from tetdist.config import fields, identity, loading
from tetdist.config.schema import RunConfig
from tetdist.datasets.index import Index
from tetdist.distributed.world import World
from tetdist.errors import UserError, typed
from tetdist.plugins import import_files
from tetdist.storage import checkpoint, hub
from tetdist.tracking.mlflow_logger import ui_command
from tetdist.tracking.mlflow_store import check_store, hand_over
from tetdist.tracking.trackers import check_names
from tetdist.training.run_folder import RunFolder, is_trained
from tetdist.training.setup import make_model, open_data

_MOST_RUNS = 1000  # runs in a sweep; Slurm's default MaxArraySize


@dataclass(frozen=True)
class Prepared:
    """Run that has passed all checks that are possible before submission."""

    config: RunConfig
    cluster: ClusterSection
    plan: Plan
    frames: tuple[int, ...] | None  # shape of the recordings, (T, 2, H, W)


def prepare(
    config: RunConfig,
    cluster: ClusterSection,
    after: Sequence[Path | str] = (),
    data: tuple[Index, Index] | None = None,
) -> Prepared:
    """Check configuration, data, model and the batch arithmetic, as the run itself will.

    Checkpoints of the runs ``after`` need not exist yet. ``data`` are indexes of the training and
    validation data, instead of the data's own.
    """
    folder = config.run_dir.absolute()
    if set("%\\\n") & set(str(folder)):
        raise UserError(
            f"the run's folder, {str(folder)!r}, contains a %, a backslash or a line break, which "
            "are special in Slurm's log names; choose another runs_dir=... or name=..."
        )
    if not after:
        _check_inputs(config)
    if config.reference is not None:
        find_reference(config.reference)
    check_names(config.tracking.trackers)
    if config.tracking_uri is not None:
        check_store(config.tracking_uri)
        hand_over(config.tracking_uri)
    # Make paths absolute: the job runs in another folder, and the run's folder records the paths.
    values = _with_absolute(config, *identity.PATH_KEYS)
    # The values lack the password that MLflow's update needs.
    tracking = {"tracking": config.tracking}
    config = loading.parse(values, config.name, warn=False).model_copy(update=tracking)
    train_index, val_index = data or open_data(config, _world(cluster))
    model = make_model(config, train_index)
    parameters = sum(p.numel() for p in model.parameters())
    made = plan.make(
        config,
        cluster,
        train_images=len(train_index),
        val_images=len(val_index),
        parameters=parameters,
        buffers=sum(b.numel() for b in model.buffers()),
        origin="in the split" if data is None else "as given, without reading the data",
    )
    frames = None if train_index.timesteps is None else train_index.frames_shape
    return Prepared(config, cluster, made, frames)


def assumed_indexes(config: RunConfig, images: int | None) -> tuple[Index, Index] | None:
    """Return indexes of so many images of 1000 classes, without files, for a plan without the data;
    None: read the data's own."""
    root = Path(config.data.root)
    if config.data.kind == "events":
        if images is not None:
            raise UserError("--images does not apply to recordings, whose index the plan reads")
        return None
    if images is None:
        if not root.is_dir():
            raise UserError(
                f"data.root: there is no folder {root}; set data.root=FOLDER, or give the plan the "
                "number of training images: --images N"
            )
        return None
    held_out = round(config.data.held_out * images)
    nothing: Any = np.zeros(0, np.int64)
    index = Index(**dict.fromkeys((one.name for one in dataclasses.fields(Index)), nothing))
    train, val = (
        dataclasses.replace(
            index,
            kind="images",
            timesteps=None,
            labels=np.zeros(count, np.int32),
            classes=tuple(map(str, range(1000))),
        )
        for count in (images - held_out, held_out)
    )
    return train, val


def _check_inputs(config: RunConfig) -> None:
    has_begun = history.saved_step(config.run_dir) > 0
    values = identity.flatten(config.as_dict())
    for key in identity.PATH_KEYS:
        path = values.get(key)
        if path is None or path.startswith(fields.TIMM) or (has_begun and key == "init_checkpoint"):
            continue
        if path.startswith(hub.NAMED):
            # Fetch it into the cache now, if it is not there: the job's node may have no network.
            hub.fetch(path, checkpoint.MODEL_FILE)
            continue
        if not Path(path).exists():
            raise UserError(
                f"{key}: there is no {path}; correct the path, or if a queued run writes it, give "
                "--after RUN"
            )


def _with_absolute(config: RunConfig, *keys: str) -> dict[str, Any]:
    """Return the configuration's values, with absolute paths in these keys."""
    values = config.as_dict()
    for key in keys:
        *sections, last = key.split(".")
        section = values
        for name in sections:
            section = section[name]
        if section[last] is not None:
            section[last] = identity.absolute_path(section[last])
    return values


def absolute(config: RunConfig) -> RunConfig:
    """Return the configuration of the job, which runs in another folder and may restart.

    ``resume`` becomes auto: only the submission checks whether the run may exist.
    """
    values = _with_absolute(config, "runs_dir", "data.root", "data.index")
    return loading.parse(values | {"cluster": {}, "resume": "auto"}, config.name, warn=False)


def sweep_of(name: str, items: list[str]) -> dict[str, list[str]]:
    """Return the overrides of every combination of ``key=a,b,...``, by the run's name.

    Such a name is NAME_seed-0_kind-tet; it lists only keys that vary.
    """
    choices: list[list[tuple[str, str]]] = []
    for item in items:
        key, separator, text = item.partition("=")
        values = _split(text)
        if not separator or not key or not all(values):
            raise UserError(f"--sweep: {item!r} must have the form key=value,value,...")
        choices.append([(key, value) for value in values])
    if (count := math.prod(map(len, choices))) > _MOST_RUNS:
        raise UserError(
            f"--sweep: {count:,} runs are too many; Slurm's job arrays have at most "
            f"{_MOST_RUNS:,} by default; name fewer values"
        )
    runs: dict[str, list[str]] = {}
    for pairs in itertools.product(*choices):
        varied = [pair for pair, others in zip(pairs, choices, strict=True) if len(others) > 1]
        parts = [f"{key.split('.')[-1]}-{_as_name(value)}" for key, value in varied]
        runs["_".join([name, *parts])] = [f"{key}={value}" for key, value in pairs]
    if len(runs) < count:
        raise UserError(
            "--sweep: two runs would have the same name (names keep letters, digits, ., _ and - "
            "only); give each value once"
        )
    return runs


def _split(text: str) -> list[str]:
    """Split at commas, but not at those in brackets."""
    parts, depth = [""], 0
    for character in text:
        depth += (character in "[{") - (character in "]}")
        if character == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += character
    return parts


def _as_name(value: str) -> str:
    """Convert a value to a part of a name: ``[0.1,1]`` to ``0.1-1``."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", value.strip("[]{}'\" "))


# --- submission -----------------------------------------------------------------------------------


def unfinished(runs: list[Prepared]) -> list[Prepared]:
    """Return the unfinished runs; others would only wait in the queue."""
    left = [run for run in runs if not is_trained(run.config)]
    if not left:
        folder = runs[0].config.run_dir
        is_finished = f"{folder} is finished, at step {runs[0].plan.last_step}"
        if len(runs) > 1:
            is_finished = f"all {len(runs)} runs of the sweep are finished, such as {folder}"
        raise UserError(
            f"{is_finished}; evaluate it with `{typed('eval', '--checkpoint', folder)}`, or train "
            "a new run with another name=..."
        )
    for run in runs:
        if run not in left:
            print(f"{run.config.run_dir} is finished: nothing to do")
    return left


def submit(
    runs: list[Prepared],
    name: str,
    code: Path | None = None,
    after: Sequence[Path] = (),
    sweep: Sequence[Prepared] = (),
) -> list[Submission]:
    """Submit one run, or several as an array, and return the submissions.

    The runs have the same cluster settings. ``code`` is a copy to run instead of a new one; the
    runs in the folders ``after`` must be finished first; ``sweep`` are all runs of the sweep that
    these belong to.
    """
    if not is_here():
        raise UserError(
            "there is no Slurm here (no sbatch on the PATH); run this on a login node, or use "
            "--dry-run to see the job, or --local N to train here"
        )
    depends_on = jobs_to_wait_for(after)
    with ExitStack() as locks:
        # A concurrent submission of one of these runs is refused before it updates MLflow.
        for run in runs:
            locks.enter_context(history.submitting(run.config.run_dir))
        for run in runs:
            refuse_if_queued(run.config.run_dir)
            _claim(run)
        home = _home(sweep or runs, name)
        tags: dict[str, str] = {}
        if len(sweep) > 1:
            home.mkdir(parents=True, exist_ok=True)
            # MLflow shows the runs of a sweep below this parent run, which counts as finished.
            of_sweep = {"sweep": ", ".join(run.config.name for run in sweep)}
            parent = history.announce(sweep[0].config, "FINISHED", of_sweep, heading=(home, name))
            tags = {"mlflow.parentRunId": parent} if parent else {}
        folder = history.next_submission(home)
        code = code or copy_code(folder / "code")
        jobs: list[Job] = []
        for run in runs:
            history.announce(run.config, "SCHEDULED", tags)
            jobs.append(_job(run, folder, code))
        values = batch.parameters(name, runs[0].cluster, code, depends_on)
        try:
            ids = batch.submit(jobs, values, folder)
        except UserError:
            for run in runs:
                history.announce(run.config, "KILLED", {})
            raise
        submissions = [
            _noted(run, job, job_id, after)
            for run, job, job_id in zip(runs, jobs, ids, strict=True)
        ]
        if len(sweep) > 1:
            history.write_sweep(folder, [run.config.run_dir for run in sweep])
        for run, submission in zip(runs, submissions, strict=True):
            history.announce(run.config, None, {"slurm_job": submission.job})
        return submissions


def jobs_to_wait_for(runs: Sequence[Path]) -> list[str]:
    """Return the jobs of the runs that are not finished yet."""
    submissions = {run: status.submission_of(run) for run in runs}
    states = states_of([s for s in submissions.values() if s.job != history.LOCAL])
    jobs: list[str] = []
    for run, submission in submissions.items():
        state = states.get(submission.job)
        if state is not None and state.is_queued:
            jobs.append(submission.job)
        elif history.saved_step(run) < submission.last_step:
            raise UserError(
                f"--after: {run} is neither finished nor queued; submit it first, or continue it "
                f"with `{typed('slurm', 'resume', run)}`"
            )
    return jobs


def _home(runs: Sequence[Prepared], name: str) -> Path:
    """Return the folder of the run, or of the sweep."""
    return runs[0].config.run_dir if len(runs) == 1 else Path(runs[0].config.runs_dir) / name


def _claim(run: Prepared) -> None:
    """Make the run's folder, or check that it holds the same run and is not in use."""
    # The folder's lock is released when this function returns; the job takes it.
    RunFolder(run.config, _world(run.cluster))


def _world(cluster: ClusterSection) -> World:
    """Return the job's world as rank 0 sees it, although this process is not part of it."""
    return World(0, cluster.processes, torch.device("cpu"), control=None)


def copy_code(target: Path) -> Path:
    """Copy the project's code for the jobs to run."""
    git = snapshot.take(target)
    print(f"code      {snapshot.describe(git)}, copied to {target}")
    return target


def _job(run: Prepared, folder: Path, code: Path) -> Job:
    """Write the job's configuration; in a sweep, each run has a folder for it."""
    run_dir, cluster = run.config.run_dir, run.cluster
    own = folder if folder.is_relative_to(run_dir) else history.next_submission(run_dir)
    file = own / "config.yaml"
    imported = plugins.keep(import_files(run.config.imports), own / "imports")
    config = absolute(run.config).model_copy(update={"imports": imported})
    file.write_text(config.as_yaml())
    return Job(
        run_dir=str(run_dir.absolute()),
        config=str(file.absolute()),
        code=str(code.absolute()),
        log=str(folder.absolute()),
        give_up_after=cluster.give_up_after,
        warn_before_end=cluster.warn_before_end,
    )


def _noted(run: Prepared, job: Job, job_id: str, after: Sequence[Path] = ()) -> Submission:
    """Record the submission while the lock is held, so that the next holder sees this job."""
    submission = Submission(
        job=job_id,
        run_dir=job.run_dir,
        config=job.config,
        code=job.code,
        log=job.log,
        cluster=run.cluster.model_dump(mode="json"),
        last_step=run.plan.last_step,
        steps_per_epoch=run.plan.steps_per_epoch,
        global_batch=run.config.batch.global_,
        time=round(time.time(), 3),
        after=[str(path.absolute()) for path in after],
    )
    history.write_submission(Path(job.config).parent, submission)
    history.note(run.config.run_dir, JobEvent("submitted", job_id))
    return submission


# --- what is shown --------------------------------------------------------------------------------


def log_summary(submission: Submission, config: RunConfig) -> None:
    """Print the log file, MLflow's command and the commands that watch, cancel and resume."""

    def command(*arguments: object) -> str:
        # Use this interpreter's name, because `python` may be another one on a login node.
        words = typed("slurm", *arguments, config.run_dir)
        return re.sub("^python ", f"{Path(sys.executable).name} ", words)

    lines = [
        f"submitted job {submission.job}: {config.run_dir}",
        f"  log     {submission.log_file}",
        f"  watch   {command('status')} --follow",
        f"  stop    {command('cancel')}",
        f"  resume  {command('resume')}",
    ]
    uri, id_file = config.tracking_uri, config.run_dir / "mlflow_run_id"
    if uri is not None:
        known = id_file.read_text().strip() if id_file.exists() else None
        lines.insert(2, f"  MLflow  {ui_command(uri, known)}")
    print("\n".join(lines))


def dry_run(runs: list[Prepared], name: str, speed: Speed | str, after: Sequence[str] = ()) -> str:
    """Return plan, batch script and configuration as text; nothing is written."""
    first = runs[0]
    folder = _home(runs, name).absolute() / "slurm" / "submission-N"
    # Placeholders: the jobs need not exist yet.
    depends_on = [f"JOB_OF_{Path(run).name}" for run in after]
    values = batch.parameters(name, first.cluster, folder / "code", depends_on)
    config = absolute(first.config).as_dict() | {"cluster": first.cluster.model_dump(mode="json")}
    of_each = f" of each of the {len(runs)} runs" if len(runs) > 1 else ""
    of_first = f" of the first of {len(runs)} runs" if len(runs) > 1 else ""
    return "\n".join(
        [
            f"# --- plan{of_each}",
            plan.describe(first.plan, speed),
            *(["\nruns  " + "\n      ".join(run.config.name for run in runs)] if of_each else []),
            "\n# --- batch script",
            batch.text(values, folder, len(runs)),
            f"# --- configuration{of_first}",
            yaml.safe_dump(config, sort_keys=False),
        ]
    )


# --- without Slurm --------------------------------------------------------------------------------


def run_here(run: Prepared) -> int:
    """Run the job here in the cluster section's number of processes; return the exit status."""
    from tetdist.apps.slurm import local

    with history.submitting(run.config.run_dir):
        if is_here():
            refuse_if_queued(run.config.run_dir)
        _claim(run)
        folder = history.next_submission(run.config.run_dir)
        code = copy_code(folder / "code")
        history.announce(run.config, "SCHEDULED", {})
        job = _job(run, folder, code)
        _noted(run, job, history.LOCAL)
        return local.run_here(job, run.cluster.processes)


def config_of(submission: Submission) -> RunConfig:
    """Return the configuration that a job was submitted with."""
    return loading.load_written(Path(submission.config))
