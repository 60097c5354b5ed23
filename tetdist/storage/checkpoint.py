"""Checkpoints, written atomically and verified before use.

    runs/NAME/checkpoints/
        step-00001000/
            model.safetensors   weights and running statistics; its header holds the configuration
            ema.safetensors     moving average of the weights, if any; the same header
            optimizer.pt        the optimiser's tensors (read with weights_only=True)
            state.json          step, metrics so far, versions
            manifest.json       size and SHA-256 of the other files; written last

A checkpoint is made in a hidden folder beside its place, forced to the disk, and renamed. A kill
or a full disk at any moment leaves earlier checkpoints unchanged. selection.py finds the last and
the best one. Loading never executes code.
"""

import errno
import hashlib
import json
import logging
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from tetdist.errors import UserError, typed, way_out
from tetdist.storage import foreign_files, hub, selection
from tetdist.storage.files import made_aside, parse_json, remove
from tetdist.storage.selection import EMA_FILE, MANIFEST_FILE, MODEL_FILE
from tetdist.wording import counted

logger = logging.getLogger(__name__)

OPTIMIZER_FILE, STATE_FILE = "optimizer.pt", "state.json"
FORMAT_VERSION = 1
# What writing raises: a full disk or memory, and what torch and safetensors make of these.
_UNWRITTEN = (OSError, RuntimeError, ValueError, MemoryError, SafetensorError)


class Description(BaseModel):
    """The header of model.safetensors: enough to build the network and evaluate it.

    Attributes:
        config: The configuration as plain values, unchecked until it is parsed.
        classes: Class names, in order; None: known by number only.
        validation: Accuracy in percent of exactly these weights; None: not measured.
        imports: Checksums of the user's files that it needs, by name.
        converted: The ``file`` of converted weights, and the library they come ``from``.
        published: Accuracy that the authors of converted weights claim, and for which T and data.
        which: The exported checkpoint of a run, ``last`` or ``best``.
        averaged: Description of the average, if the weights are one; None: they are not.
        binning: Parameters by which the events were binned, and their sensor; None: unknown.
        commit: Commit of the code that trained them; None: unknown.
        looks_ahead: The verdict on a user's network, see `check_network`; None: not decided.
    """

    model_config = ConfigDict(strict=True, frozen=True)

    config: dict[str, Any]
    classes: list[str] | None
    timesteps: Annotated[int, Field(gt=0, le=10_000)]  # the most of phases.*.timesteps
    step: int
    validation: dict[str, float] | None = None
    imports: dict[str, str] = {}
    converted: dict[str, str] | None = None
    published: dict[str, Any] | None = None
    which: str | None = None
    averaged: str | None = None
    binning: dict[str, Any] | None = None
    commit: str | None = None
    looks_ahead: bool | None = None


@dataclass(frozen=True)
class Average:
    """A moving average of the weights, stored in the same checkpoint."""

    weights: dict[str, Tensor]
    description: Description


@dataclass(frozen=True)
class Checkpoint:
    """A verified checkpoint in memory.

    Attributes:
        state: The trainer's state: step, accumulated metrics, best result, ...
        model: Model state, on the CPU.
        average: The moving average of the model's state, if any.
    """

    path: Path
    state: dict[str, Any]
    model: dict[str, Tensor]
    optimizer: dict[str, Any]
    average: dict[str, Tensor] | None = None


def save(
    folder: Path,
    *,
    model: dict[str, Tensor],
    optimizer: dict[str, Any],
    description: Description,
    state: dict[str, Any],
    keep_last: int,
    average: Average | None = None,
) -> Path:
    """Write the checkpoint of ``state["step"]`` and delete old ones.

    Args:
        folder: The run's ``checkpoints`` folder.
        model: The model's state.
        state: JSON values.
        keep_last: Number of newest checkpoints to keep, besides the best ones.

    Returns:
        The checkpoint's folder.

    Raises:
        UserError: It could not be written; earlier checkpoints are unchanged.
    """
    name = f"step-{state['step']:08d}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for leftover in folder.glob(".step-*"):  # of a process that was killed
            remove(leftover)
        # A run that was stopped while evaluating, or resumes before a damaged checkpoint, saves the
        # same step twice. The second gets another name until the first is deleted, because
        # replacing a folder is not atomic.
        saved = map(selection.step_and_repeat, selection.all_in(folder))
        repeats = [repeat for step, repeat in saved if step == state["step"]]
        target = folder / (f"{name}.{max(repeats) + 1}" if repeats else name)
        with made_aside(target) as aside, _full_disk_named(folder):
            aside.mkdir()
            _write_weights(aside / MODEL_FILE, model, description)
            if average is not None:
                _write_weights(aside / EMA_FILE, average.weights, average.description)
            torch.save(optimizer, aside / OPTIMIZER_FILE)
            state = {"format": FORMAT_VERSION} | state
            (aside / STATE_FILE).write_text(json.dumps(state, indent=1))
            files = {path.name: _describe(path) for path in sorted(aside.iterdir())}
            (aside / MANIFEST_FILE).write_text(json.dumps({"files": files}, indent=1))
    except _UNWRITTEN as error:
        raise UserError(
            f"the checkpoint of step {state['step']} could not be written to {folder} "
            f"({_reason(error)}); earlier ones are unchanged: {way_out(error)}, and run the same "
            "command again"
        ) from error
    _delete_old(target, keep_last)
    plain = folder / name
    return target if plain.exists() else target.rename(plain)


@contextmanager
def _full_disk_named(folder: Path) -> Iterator[None]:
    """Name a full disk as the cause, since the errors of torch.save and safetensors do not."""
    try:
        yield
    except _UNWRITTEN as error:
        if shutil.disk_usage(folder).free > 2**20:
            raise
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)) from error


def _reason(error: BaseException) -> str:
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return str(error).splitlines()[0] if str(error) else type(error).__name__


def newest(folder: Path) -> Checkpoint | None:
    """Read the newest valid checkpoint; damaged ones are skipped with a warning.

    Returns:
        None if there is no checkpoint at all.
    """
    paths = selection.all_in(folder)[::-1]
    for path in paths:
        problem = verify(path)
        if problem is None:
            return read(path)
        logger.warning("skipping the damaged checkpoint %s: %s", path, problem)
    if paths:
        raise UserError(
            f"{folder} holds {counted(len(paths), 'checkpoint')}, but no undamaged one; restore "
            "one, or start anew with resume=never and another name=..."
        )
    return None


def verify(path: Path) -> str | None:
    """Return the fault of a checkpoint; None if it is valid."""
    try:
        files = parse_json((path / MANIFEST_FILE).read_text())["files"]
    except FileNotFoundError:
        return f"{MANIFEST_FILE} is missing"
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"{MANIFEST_FILE} cannot be read ({error})"
    missing = {MODEL_FILE, OPTIMIZER_FILE, STATE_FILE} - set(files)
    if missing:
        return f"{MANIFEST_FILE} does not list {', '.join(sorted(missing))}"
    for name, expected in files.items():
        file = path / name
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != expected["bytes"]:
            return f"{name} has {file.stat().st_size} bytes instead of {expected['bytes']}"
        if _describe(file) != expected:
            return f"{name} is damaged (its checksum differs)"
    return None


def read(path: Path) -> Checkpoint:
    """Read a checkpoint that `verify` found valid."""
    ema = path / EMA_FILE
    try:
        state = parse_json((path / STATE_FILE).read_text())
        if (version := state["format"]) != FORMAT_VERSION:
            raise UserError(
                f"{path} has checkpoint format {version}, but this version reads {FORMAT_VERSION}; "
                "use the version of tetdist that wrote it"
            )
        optimizer = torch.load(path / OPTIMIZER_FILE, map_location="cpu", weights_only=True)
        average = load_file(ema) if ema.is_file() else None
        return Checkpoint(path, state, load_file(path / MODEL_FILE), optimizer, average)
    except UserError:
        raise
    except Exception as error:  # torch raises many kinds
        reason = f"the checkpoint {path} cannot be read ({_reason(error)})"
        raise UserError(f"{reason}; remove it to continue from the one before") from error


def load_model_file(
    path: Path, which: str = "last", *, ema: bool = False
) -> tuple[dict[str, Tensor], Description]:
    """Read weights and description of a run, a checkpoint, an export or a .safetensors file.

    Args:
        path: A folder or file of these, or a name, ``hf:ORG/NAME`` or
            ``tetdist:NAME``, see hub.py.
        which: The ``last`` checkpoint of a run folder, or the ``best`` one.
        ema: Read the moving average instead; ``best`` is then the best average.

    Raises:
        UserError: The checkpoint is missing, damaged, or not written by tetdist.
    """
    file = _ema_file(path, which) if ema else _model_file(path, which)
    try:
        weights = load_file(file)
        with safe_open(file, framework="pt") as opened:
            metadata = opened.metadata() or {}
    except (OSError, SafetensorError, ValueError) as error:
        raise UserError(f"{file} is not a readable model file ({_reason(error)})") from error
    if "tetdist" not in metadata:
        raise UserError(
            f"{file} has no description of its model: it holds another library's weights, which "
            f"`{typed('convert')}` converts, or integers (export --int8), which "
            f"`{typed('eval')} RUN --int8` evaluates, given the network that was exported"
        )
    try:
        description = Description.model_validate_json(metadata["tetdist"])
    except ValidationError as error:
        wrong = {str(one["loc"][0]) for one in error.errors() if one["loc"]} or {"all of it"}
        raise UserError(
            f"the description in {file} is damaged or of another version of tetdist: "
            f"{', '.join(sorted(wrong))} cannot be read"
        ) from error
    return weights, description


def is_own(path: Path) -> bool:
    """Return whether a path is a folder, or a .safetensors file that describes its model."""
    with suppress(OSError, SafetensorError):
        if path.is_file() and path.suffix == ".safetensors":
            with safe_open(path, framework="pt") as opened:
                return "tetdist" in (opened.metadata() or {})
    return path.is_dir()


def _write_weights(path: Path, weights: dict[str, Tensor], description: Description) -> None:
    # Copied because at ZeRO stages above 0 the parameters are views of one buffer.
    copies = {
        key: tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
        for key, tensor in weights.items()
    }
    described = json.dumps(description.model_dump(exclude_unset=True))
    path.touch()
    mode = path.stat().st_mode
    save_file(copies, path, metadata={"tetdist": described})  # other threads run meanwhile
    path.chmod(mode)  # save_file lets only the owner read


def _model_file(path: Path, which: str, ranked_by: str = MODEL_FILE) -> Path:
    hub.check_source(path)
    if which != "last" and (not path.is_dir() or (path / MODEL_FILE).is_file()):
        raise UserError(f"--best: {path} is not a run of several checkpoints; leave out --best")
    if str(path).startswith(hub.NAMED):
        return hub.fetch(str(path), MODEL_FILE)
    if path.is_file():
        problem = verify(path.parent) if (path.parent / MANIFEST_FILE).is_file() else None
        if problem is not None:
            raise UserError(f"{path} is part of a damaged checkpoint: {problem}; use another one")
        return path
    if (path / MODEL_FILE).is_file():
        if not any((path / name).exists() for name in (MANIFEST_FILE, OPTIMIZER_FILE, STATE_FILE)):
            return path / MODEL_FILE  # written by the command export
        folder = path
    else:
        checkpoints = path / "checkpoints" if (path / "checkpoints").is_dir() else path
        last = which == "last"
        selected = selection.last(checkpoints) if last else selection.best(checkpoints, ranked_by)
        if selected is None:
            raise UserError(
                f"there is no {which} checkpoint in {path}; give the folder of a run, of a "
                "checkpoint or of an export, or a .safetensors file"
            )
        folder = selected
    problem = verify(folder)
    if problem is not None:
        raise UserError(f"the checkpoint {folder} is damaged: {problem}; use another one")
    return folder / MODEL_FILE


def _ema_file(path: Path, which: str) -> Path:
    file = _model_file(path, "last").with_name(EMA_FILE)
    if not file.is_file():
        raise UserError(
            f"--ema: {path} has no moving average of its weights, which only runs with "
            "ema.decay=... have; leave out --ema"
        )
    return _model_file(path, which, EMA_FILE).with_name(EMA_FILE) if which == "best" else file


def write_model_file(path: Path, weights: dict[str, Tensor], description: Description) -> None:
    """Write a file for `load_model_file`, atomically.

    Args:
        path: The file, which is replaced if it exists.

    Raises:
        UserError: It could not be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with made_aside(path) as aside, _full_disk_named(path.parent):
            _write_weights(aside, weights, description)
    except _UNWRITTEN as error:
        raise UserError(
            f"{path} could not be written ({_reason(error)}); correct that, or choose another place"
        ) from error


def load_weights(model: nn.Module, weights: dict[str, Tensor], source: Path) -> None:
    """Load weights into a model, checked by `check_weights`."""
    check_weights(model.state_dict(), weights, source)
    model.load_state_dict(weights)


def check_weights(own: dict[str, Tensor], weights: dict[str, Tensor], source: Path) -> None:
    """Check that weights from a file have exactly a model's own keys and shapes, and sound values.

    Raises:
        UserError: They have not.
    """
    problems = [f"{key} is missing" for key in own.keys() - weights.keys()]
    problems += [f"{key} is not in the model" for key in weights.keys() - own.keys()]
    problems += [
        f"{key} has shape {tuple(weights[key].shape)} instead of {tuple(own[key].shape)}"
        for key in own.keys() & weights.keys()
        if own[key].shape != weights[key].shape
    ]
    if problems:
        shown = "; ".join(sorted(problems)[:3])
        more = f"; and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise UserError(f"{source} is a checkpoint of another model: {shown}{more}")
    foreign_files.check_values(weights, source, own)


def _delete_old(newest_path: Path, keep_last: int) -> None:
    """Delete checkpoints older than the newest: all others of its step, and all steps but the last.

    The best ones are kept. Those of later steps, which are damaged, since the run resumed before
    them, stay.
    """
    paths, kept = selection.all_in(newest_path.parent), selection.never_pruned(newest_path.parent)
    older, step = paths[: paths.index(newest_path)], newest_path.name.partition(".")[0]
    of_same_step = [path for path in older if path.name.partition(".")[0] == step]
    distinct = older[: len(older) - len(of_same_step)]
    surplus = max(0, len(distinct) + 1 - keep_last)  # one more is the newest
    for path in of_same_step + distinct[:surplus]:
        if path not in kept:
            hidden = path.with_name(f".{path.name}")
            with suppress(OSError):
                path.rename(hidden)
            remove(hidden)


def _describe(path: Path) -> dict[str, Any]:
    with path.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    return {"bytes": path.stat().st_size, "sha256": digest}
