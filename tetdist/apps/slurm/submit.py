"""Submit a configuration as a job: check it, copy the code, record the submission."""

import dataclasses
import shlex
import shutil
import time
from argparse import Namespace
from collections.abc import Sequence
from operator import attrgetter
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

from tetdist import plugins
from tetdist.apps.slurm import batch, history, jobs, plan, snapshot
from tetdist.apps.slurm.cluster import ClusterSection
from tetdist.apps.slurm.history import JobEvent, Submission
from tetdist.apps.slurm.job import Job
from tetdist.apps.slurm.jobs import refuse_if_queued
from tetdist.apps.slurm.plan import Plan
from tetdist.config import fields, identity, loading
from tetdist.config.schema import RunConfig
from tetdist.data.splits import open_data
from tetdist.datasets.index import Index
from tetdist.distributed.world import World
from tetdist.errors import UserError, typed
from tetdist.network import make_model
from tetdist.plugins import import_files
from tetdist.storage import checkpoint, hub
from tetdist.tracking.mlflow_logger import announce, ui_command
from tetdist.tracking.mlflow_store import check_store, hand_over
from tetdist.training.run_folder import RunFolder, is_trained

# Size of ImageNet's validation split, as a fraction of its training split.
VALIDATION = 50_000 / 1_281_167


def prepare(
    config: RunConfig,
    cluster: ClusterSection,
    after: Sequence[Path | str] = (),
    images: int | None = None,
) -> Plan:
    """Check configuration, data, model and the batch arithmetic, as the run itself will.

    Checkpoints of the runs ``after`` need not exist yet. ``images`` is the number of training
    images of a plan without the data.
    """
    if not after:
        _check_inputs(config)
    if config.tracking_uri is not None:
        check_store(config.tracking_uri)
        hand_over(config.tracking_uri)
    # Make paths absolute: the job runs in another folder, and the run's folder records the paths.
    config = identity.with_absolute_paths(config, *identity.PATH_KEYS)
    train_index, val_index = (
        _assumed_indexes(config, images) if images else open_data(config, _world(cluster))
    )
    model = make_model(config, train_index)
    sizes, frames = train_index.file_sizes, train_index.frames(config.data)
    assumed = "" if config.data.held_out else "; evaluations assume ImageNet's proportion"
    return Plan(
        config,
        cluster,
        train_images=len(train_index),
        val_images=len(val_index),
        pixels=frames[2] if frames else config.data.image_size,
        parameters=sum(p.numel() for p in model.parameters()),
        buffers=sum(b.numel() for b in model.buffers()),
        origin="as given, without reading the data" + assumed if images else "in the split",
        sample_bytes=float(sizes.mean()) if sizes.size else None,
    )


def _assumed_indexes(config: RunConfig, images: int) -> tuple[Index, Index]:
    """Return indexes of so many images of 1000 classes, without files, for a plan without the data;
    the validation split has the size of ImageNet's, in proportion."""
    held_out = round(config.data.held_out * images)
    evaluated = held_out or max(1, round(VALIDATION * images))
    empty: dict[str, Any] = {one.name: np.zeros(0, np.int64) for one in dataclasses.fields(Index)}
    known = {"kind": "images", "timesteps": None, "classes": tuple(map(str, range(1000)))}
    train, val = (
        Index(**empty | known | {"labels": np.zeros(count, np.int32)})
        for count in (images - held_out, evaluated)
    )
    return train, val


def _check_inputs(config: RunConfig) -> None:
    has_begun = history.saved_step(config.run_dir) > 0
    for key in identity.PATH_KEYS:
        path = attrgetter(key)(config)
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


def absolute(config: RunConfig) -> RunConfig:
    """Return the configuration of the job, which runs in another folder and may restart.

    ``resume`` becomes auto: only the submission checks whether the run may exist.
    """
    config = identity.with_absolute_paths(config, "runs_dir", "data.root", "data.index")
    return config.model_copy(update={"cluster": {}, "resume": "auto"})


# --- submission -----------------------------------------------------------------------------------


def refuse_if_finished(run: Plan) -> None:
    """Refuse a finished run, which would only wait in the queue."""
    if is_trained(run.config):
        folder = run.config.run_dir
        raise UserError(
            f"{folder} is finished, at step {run.last_step}; evaluate it with "
            f"`{typed('eval', folder)}`, or train a new run with another name=..."
        )


def submit(run: Plan, code: Path | None = None, after: Sequence[Path] = ()) -> Submission:
    """Submit a run, and return the submission.

    ``code`` is a copy to run instead of a new one; the runs in the folders ``after`` must be
    finished first. A refused submission leaves neither a folder nor a run in MLflow.
    """
    config, run_dir = run.config, run.config.run_dir
    depends_on = jobs_to_wait_for(after)
    # A concurrent submission of this run is refused before it updates MLflow.
    with history.submitting(run_dir):
        refuse_if_queued(run_dir)
        is_new = [path.name for path in run_dir.iterdir()] == ["slurm"]
        # Make the folder, or check that it holds the same run and is not in use. Until Slurm has
        # answered it stays locked: no training may begin in a folder that a refusal removes.
        with RunFolder(config, _world(run.cluster)):
            folder = history.next_submission(run_dir)
            code = code or copy_code(folder / "code")
            announce(config, "SCHEDULED", {})
            job = _job(run, folder, code)
            values = batch.parameters(config.name, run.cluster, code, depends_on)
            try:
                job_id = batch.submit(job, values, folder)
            except UserError:
                announce(config, "DELETED" if is_new else "KILLED", {})
                shutil.rmtree(run_dir if is_new else folder)
                raise
        # Record it while the lock is held, so that the next holder sees this job.
        submission = Submission(
            job=job_id,
            run_dir=job.run_dir,
            config=job.config,
            code=job.code,
            log=job.log,
            cluster=run.cluster.model_dump(mode="json"),
            last_step=run.last_step,
            time=round(time.time(), 3),
            after=[str(path.absolute()) for path in after],
        )
        history.note_submission(folder, submission)
        announce(config, None, {"slurm_job": job_id})
        return submission


def jobs_to_wait_for(runs: Sequence[Path]) -> list[str]:
    """Return the jobs of the runs that are not finished yet."""
    submissions = {run: history.submission_of(run) for run in runs}
    states = jobs.states_of(list(submissions.values()))
    waited_for: list[str] = []
    for run, submission in submissions.items():
        if states[submission.job].is_queued:
            waited_for.append(submission.job)
        elif history.saved_step(run) < submission.last_step:
            raise UserError(
                f"--after: {run} is neither finished nor queued; submit it first, or continue it "
                f"with `{typed('slurm', 'resume', run)}`"
            )
    return waited_for


def _world(cluster: ClusterSection) -> World:
    """Return the job's world as rank 0 sees it, although this process is not part of it."""
    return World(0, cluster.processes, torch.device("cpu"), control=None)


def copy_code(target: Path) -> Path:
    """Copy the project's code for the jobs to run."""
    git = snapshot.take(target)
    print(f"code      {snapshot.describe(git)}, copied to {target}")
    return target


def _job(run: Plan, folder: Path, code: Path) -> Job:
    """Write the job's configuration into the submission's folder, and return the job."""
    file = folder / "config.yaml"
    imported = plugins.keep(import_files(run.config.imports), folder / "imports")
    config = absolute(run.config).model_copy(update={"imports": imported})
    file.write_text(config.as_yaml())
    return Job(
        run_dir=str(run.config.run_dir.absolute()),
        config=str(file.absolute()),
        code=str(code.absolute()),
        log=str(folder.absolute()),
        give_up_after=run.cluster.give_up_after,
        warn_before_end=run.cluster.warn_before_end,
    )


def resume(run_dir: Path, cluster: ClusterSection, *, new_code: bool) -> str:
    """Submit a run again from its newest checkpoint, and return the summary."""
    earlier = history.submission_of(run_dir)
    jobs.check_here(f"train here with `{typed('train', '--config', run_dir / 'config.yaml')}`")
    refuse_if_queued(run_dir)
    config = loading.load_written(Path(earlier.config))
    # A run that began once need not wait: its predecessors were finished then.
    after = [Path(path) for path in earlier.after] if not history.saved_step(run_dir) else []
    run = prepare(config, cluster, after)
    code = None if new_code else Path(earlier.code)
    return summary(submit(run, code, after), config)


def cancel(run_dir: Path) -> str:
    """Cancel a run's job, and return what was done."""
    submission = history.submission_of(run_dir)
    job, state = submission.job, jobs.state_of(submission)
    if not state.is_queued:
        return f"{run_dir} is not queued: job {job} is {state.name} ({state.text})"
    jobs.cancel(job)
    # If the job is requeuing itself now, its next start reads this line and exits.
    history.note(run_dir, JobEvent("cancelled", job, step=history.saved_step(run_dir)))
    # A training process updates MLflow itself, but there may be none yet.
    announce(loading.load_written(Path(submission.config)), "KILLED", {})
    return f"cancelled job {job}; `{typed('slurm', 'resume', run_dir)}` continues the run"


# --- as text --------------------------------------------------------------------------------------


def summary(submission: Submission, config: RunConfig) -> str:
    """Return the log file, MLflow's command and the commands that watch, cancel and resume."""
    lines = [
        f"submitted job {submission.job}: {config.run_dir}",
        f"  log     tail -F {shlex.quote(str(submission.log_file))}",
        f"  status  {typed('slurm', 'status', config.run_dir)}",
        f"  stop    {typed('slurm', 'cancel', config.run_dir)}",
        f"  resume  {typed('slurm', 'resume', config.run_dir)}",
    ]
    if config.tracking_uri is not None:
        lines.insert(2, f"  MLflow  {ui_command(config.tracking_uri, config.run_dir)}")
    return "\n".join(lines)


def dry_run(
    run: Plan, options: Namespace, after: Sequence[Path | str], code: Path | None = None
) -> str:
    """Return plan, batch script and, if asked for, configuration as text; nothing is written."""
    folder = history.slurm_folder(run.config.run_dir.absolute()) / "submission-N"
    # Placeholders: the jobs need not exist yet.
    depends_on = [f"JOB_OF_{Path(name).name}" for name in after]
    values = batch.parameters(run.config.name, run.cluster, code or folder / "code", depends_on)
    config = absolute(run.config).as_dict() | {"cluster": run.cluster.model_dump(mode="json")}
    parts = ["# --- plan", plan.describe(run, options.images_per_s)]
    parts += ["\n# --- batch script", batch.text(values, folder)]
    if options.print_config:
        parts += ["# --- configuration", yaml.safe_dump(config, sort_keys=False)]
    return "\n".join(parts)
