"""Status of a run, read from its folder: state, progress, results, checkpoint, job, disk.

This loads no torch and only reads files, so it is fast. slurm/status.py adds the job.
"""

import itertools
import math
import statistics
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tetdist.config.yaml_files import read_yaml
from tetdist.errors import UserError
from tetdist.storage import selection
from tetdist.storage.files import is_held, parse_json, read_text
from tetdist.tables import aligned, number
from tetdist.tracking.metrics_file import from_end
from tetdist.tracking.progress import held_out, slowest_rank
from tetdist.wording import counted, duration, meant, rate, speed_flag

DAMAGED = "damaged"
# Lines of a run's metrics that its speed is the median of.
LINES = 100


@dataclass(frozen=True)
class JobStatus:
    """Status of a run's newest Slurm job.

    Attributes:
        state: Slurm's, in lower case: ``pending``, ``running``, ``failed``, ...; ``unknown`` if
            neither Slurm nor the run's folder knows it.
        text: Its nodes, the reason for waiting, or how it ended.
        log: File with rank 0's output.
        restarts: Time, step and reason of each restart of the run.
        failure: Why the newest start failed; None if it did not.
    """

    id: str
    state: str
    text: str
    log: str
    restarts: list[str]
    failure: str | None


@dataclass(frozen=True)
class RunStatus:
    """Status of a run; None means not known (yet).

    Attributes:
        state: ``training`` (a process locks the folder), ``finished``, the state of its job, or
            without a job ``stopped`` (all steps are saved), ``broken off`` (steps after the
            checkpoint will be repeated), ``failed`` (a file has the error) or ``begun`` (no step
            is logged); or ``damaged``, when nothing else is known.
    """

    run: str
    folder: str
    state: str
    text: str  # more about the state
    step: int | None = None  # the last logged one
    last_step: int | None = None
    epoch: float | None = None
    epochs: int | None = None
    phase: int | None = None  # index of the present one, from 0
    phases: int | None = None  # their number
    train: dict[str, Any] = field(default_factory=dict)  # last line of training
    val: dict[str, Any] = field(default_factory=dict)  # last evaluation
    best_top1: float | None = None
    best_step: int | None = None
    eta_s: float | None = None  # by the last line of training
    line_age_s: float | None = None  # since the last line
    checkpoint: str | None = None  # name of the newest one
    saved_step: int | None = None
    checkpoint_age_s: float | None = None
    speed: str | None = None  # of a process, as slurm's flag
    bytes: int = 0  # size of the folder
    job: JobStatus | None = None


def find_runs(names: Sequence[str]) -> list[Path]:
    """Return the folders of runs, each given by its path, its name in runs/, or a folder of runs or
    studies. Without names, return those in runs/, where there may be none yet."""
    if not names:
        return _runs_at(Path("runs"))
    folders: list[Path] = []
    of_mlflow = ("mlartifacts", "mlflow.db")  # runs/* names them too
    paths = [one.removesuffix("/config.yaml") for one in names if Path(one).name not in of_mlflow]
    for name in paths or names:
        runs = _runs_at(Path(name)) or _runs_at(Path("runs", name))
        if not runs:
            places = (Path(name).parent, Path("runs", name).parent)
            known = {run.name: run for place in places for run in _runs_at(place)}
            give = "give a run folder (with config.yaml), a folder of runs, or a name in runs/"
            hint = meant(Path(name).name, known, give, known)
            is_empty = Path(name).is_dir() or Path("runs", name).is_dir()
            what = "no run has begun in" if is_empty else "there is no run"
            raise UserError(f"{what} {name}; {hint}")
        folders += runs
    return folders


def _runs_at(path: Path, depth: int = 2) -> list[Path]:
    if (path / "config.yaml").is_file():
        return [path]
    below = sorted(path.glob("*/")) if depth else []
    return [run for folder in below for run in _runs_at(folder, depth - 1)]


def read_status(folder: Path, job: JobStatus | None = None) -> RunStatus:
    """Read the status of the run in a folder with a config.yaml."""
    file, now = folder / "metrics.jsonl", time.time()
    epochs, phases, most = _configured(folder / "config.yaml")
    end, train, val = _last_lines(file)
    where = max(train, val, key=lambda line: line.get("step", -1))
    step, epoch = where.get("step"), where.get("epoch")
    last_step = None
    if step and epoch:
        last_step = int(min(epochs * round(step / epoch), most))
    checkpoint = selection.last(folder / "checkpoints")
    saved = _step_of(checkpoint)
    best_top1 = val.get("best_top1")
    is_best = best_top1 is not None and val["top1"] == best_top1 and val["step"] > saved
    best = None
    with suppress(UserError):  # A damaged one may be the best; its evaluation says so.
        best = selection.best(folder / "checkpoints")
    state, text = _state(folder, end, saved, job)
    return RunStatus(
        run=folder.resolve().name,
        folder=str(folder),
        state=state,
        text=text,
        step=step,
        last_step=last_step,
        epoch=epoch,
        epochs=epochs,
        phase=where.get("phase"),
        phases=phases,
        train=train,
        val=val,
        best_top1=best_top1,
        # The best evaluation may not have a checkpoint yet.
        best_step=val["step"] if is_best else _step_of(best) if best else None,
        eta_s=train.get("eta_s") if state in ("training", "running") else None,
        line_age_s=now - end["time"] if end else None,
        checkpoint=None if checkpoint is None else checkpoint.name,
        saved_step=None if checkpoint is None else saved,
        checkpoint_age_s=None if checkpoint is None else now - checkpoint.stat().st_mtime,
        speed=None if checkpoint is None else _speed(folder, checkpoint),
        bytes=_bytes_of(folder),
        job=job,
    )


def _configured(file: Path) -> tuple[int, int, float]:
    """Return a configuration's number of epochs, number of phases, and max_steps or infinity."""
    try:
        config = read_yaml(file)
        epochs = [int(phase["epochs"]) for phase in config["phases"]]
        return sum(epochs), len(epochs), int(config.get("max_steps") or 0) or math.inf
    except (KeyError, TypeError, ValueError, OverflowError, OSError) as error:
        raise UserError(
            f"{file} is damaged, or not the configuration of a run; restore it"
        ) from error


def _last_lines(file: Path) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """Return the last line, the last of training and the last evaluation; {} for a missing one."""
    lines: dict[str, dict[str, Any]] = {}
    for line in from_end(file) if file.is_file() else ():
        lines.setdefault("end", line)
        lines.setdefault(line["kind"], line)
        if {"train", "val"} <= lines.keys():
            break
    return lines.get("end", {}), lines.get("train", {}), lines.get("val", {})


def _speed(folder: Path, checkpoint: Path) -> str | None:
    """Return a run's speed as slurm's flag: the median of its last `LINES` lines of training."""
    config, state = read_yaml(folder / "config.yaml"), checkpoint / "state.json"
    lines = (line for line in from_end(folder / "metrics.jsonl") if line["kind"] == "train")
    last = list(itertools.islice(lines, LINES))
    if not last or not state.is_file():
        return None
    processes = int(parse_json(read_text(state))["world_size"])
    return speed_flag(
        statistics.median(line["samples_per_s"] for line in last) / processes,
        config["model"]["name"],
        config["data"]["image_size"] if config["data"]["kind"] == "images" else None,
        config["precision"],
        processes,
        statistics.median(line["image_timesteps_per_s"] / line["samples_per_s"] for line in last),
    )


def damaged(folder: Path, reason: str) -> RunStatus:
    """Return the status of a run whose files cannot be read."""
    return RunStatus(folder.resolve().name, str(folder), DAMAGED, reason, bytes=_bytes_of(folder))


def _state(folder: Path, end: dict[str, Any], saved: int, job: JobStatus | None) -> tuple[str, str]:
    """Return the state of a run, given the last line of its metrics, and details."""
    if is_held(folder / ".lock"):
        # Each training process reopens the file for writing.
        since = time.time() - (folder / ".lock").stat().st_mtime
        return "training", f"for {duration(since)}"
    if end.get("kind") == "final":
        return "finished", ""
    if job is not None:
        return job.state, f"job {job.id}"
    log = folder.resolve().parent / "logs" / f"{folder.resolve().name}.log"  # of a study's run
    printed = log.read_text(errors="replace").lower() if log.is_file() else ""
    if (whole := folder / "traceback.txt").is_file():  # of the newest start
        return "failed", f"see {whole}"
    if "error: " in printed.rstrip().rpartition("\n")[2]:
        return "failed", f"see {log}"
    if not end and not saved:
        return "begun", ""
    ahead = end.get("step", 0) - saved
    if ahead > 0:
        return "broken off", f"{ahead:,} logged steps after the last checkpoint will be repeated"
    return "stopped", "saved; the same command continues"


def _step_of(checkpoint: Path | None) -> int:
    """Return a checkpoint's step, by its name; 0 without a checkpoint."""
    return 0 if checkpoint is None else selection.step_and_repeat(checkpoint)[0]


def _bytes_of(folder: Path) -> int:
    total = 0
    for file in folder.rglob("*"):
        try:
            total += file.lstat().st_size
        except OSError:  # an old checkpoint, deleted meanwhile
            continue
    return total


# --- as text --------------------------------------------------------------------------------------


def as_text(status: RunStatus) -> str:
    """Return one run as some lines of text."""
    train, val = status.train, status.val
    lines = [f"{status.folder}: {status.state}" + (f" ({status.text})" if status.text else "")]
    if status.step is not None:
        lines.append("  " + "  ".join(_progress(status)))
    else:
        lines.append(f"  no step of {counted(status.epochs or 0, 'epoch')} is logged")
    if train:
        parts = [
            f"loss {train['loss']:.3f}",
            f"top-1 {train['top1']:.1f} %",
            f"lr {train['lr']:.2g}",
            rate(train["samples_per_s"]),
            f"data wait {train['data_wait']:.0f} %",
        ]
        lines.append("  train       " + "  ".join(parts))
        lines += [f"  {text}" for text in slowest_rank(train)]
    if val:
        lines.append(
            f"  evaluation  top-1 {val['top1']:.2f} %  loss {val['loss']:.3f}, epoch "
            f"{val['epoch']:g}; best {number(status.best_top1, '.2f')} %, step "
            f"{number(status.best_step, ',')}"
            + (f" ({counted(val['samples'], 'held-out sample')})" if held_out(val) else "")
        )
    if status.checkpoint is not None and status.checkpoint_age_s is not None:
        age = duration(max(status.checkpoint_age_s, 0))
        lines.append(f"  checkpoint  {status.checkpoint}, {age} ago")
    if status.speed is not None:
        lines.append(f"  for slurm   {status.speed}")
    lines.append(f"  disk        {status.bytes / 1e6:,.1f} MB")
    if (job := status.job) is not None:
        lines.append(f"  job         {job.id} {job.state}: {job.text}")
        lines.append(f"  log         {job.log}")
        lines.append(f"  restarts    {len(job.restarts) or 'none'}")
        lines += [f"    {restart}" for restart in job.restarts]
        if job.failure is not None:
            lines.append(f"  failed      {job.failure}".replace("\n", "\n    "))
    return "\n".join(lines)


def _progress(status: RunStatus) -> list[str]:
    parts = [f"epoch {status.epoch:.2f}/{status.epochs}"]
    if (status.phases or 1) > 1:
        parts.append(f"phase {status.phase}")
    parts.append(f"step {status.step:,}/{number(status.last_step, ',')}")
    if status.saved_step not in (None, status.step):
        parts[-1] += f" logged, {status.saved_step:,} saved"
    if status.eta_s is not None:
        parts.append(f"ETA {duration(status.eta_s)}")
    if status.line_age_s is not None:
        parts.append(f"last line {duration(max(status.line_age_s, 0))} ago")
    return parts


def as_table(statuses: Sequence[RunStatus]) -> str:
    """Return several runs as a table, one row each."""
    head = ["run", "state", "epoch", "step", "loss", "per s", "ETA", "top-1 %", "best", "saved"]
    rows = [[*head, "job"]]
    for status in statuses:
        age, eta = status.checkpoint_age_s, status.eta_s
        of_step = "" if status.saved_step == status.step else f"step {status.saved_step}, "
        rows.append(
            [
                status.folder,
                status.state,
                f"{number(status.epoch, '.2f')}/{number(status.epochs, '')}",
                f"{number(status.step, ',')}/{number(status.last_step, ',')}",
                number(status.train.get("loss"), ".3f"),
                number(status.train.get("samples_per_s"), ".0f"),
                "-" if eta is None else duration(eta),
                held_out(status.val) + number(status.val.get("top1"), ".2f"),
                number(status.best_top1, ".2f"),
                "-" if age is None else f"{of_step}{duration(max(age, 0))} ago",
                "" if status.job is None else status.job.id,
            ]
        )
    if not any(status.job for status in statuses):
        rows = [row[:-1] for row in rows]
    ended = [one for one in statuses if one.state == "failed"]
    whys = {one.folder: one.job.failure if one.job else one.text for one in ended}
    failed = [f"{folder} failed: {why.splitlines()[-1]}" for folder, why in whys.items() if why]
    return "\n".join([aligned(rows, right=range(2, 10)), *failed])
