"""Checkpoints: written whole or not at all, verified before they are believed.

    runs/NAME/checkpoints/
        step-00001000/
            model.safetensors   weights and running statistics; its header holds the configuration
            ema.safetensors     their moving average, where the run has one; the same header
            optimizer.pt        the optimiser's tensors (read with weights_only=True)
            state.json          step, metrics so far, versions
            manifest.json       size and SHA-256 of the other files; written last
        last                    name of the newest
        best                    name of the one with the best validation accuracy
        best-ema                name of the one whose moving average has the best

A checkpoint is made in a hidden folder beside its place, forced to the disk, and renamed. A kill
or a full disk at any moment leaves the earlier ones as they were. Nothing that is loaded here can
execute code.
"""

import errno
import hashlib
import json
import logging
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from safetensors.torch import save as serialize
from torch import Tensor, nn

from tetdist.errors import UserError, typed, way_out
from tetdist.storage import hub
from tetdist.storage.files import checkpoint_at, made_aside, parse_json, remove, write_text
from tetdist.wording import counted

logger = logging.getLogger(__name__)

MODEL_FILE, OPTIMIZER_FILE, STATE_FILE = "model.safetensors", "optimizer.pt", "state.json"
EMA_FILE, BEST_EMA = "ema.safetensors", "best-ema"
MANIFEST_FILE = "manifest.json"
FORMAT_VERSION = 1


class Description(BaseModel):
    """The header of model.safetensors: enough to build the network of its weights and evaluate it.

    Attributes:
        config: The configuration as plain values; checked as such where it is parsed.
        classes: Their names, in order; None: known by number only.
        timesteps: T.
        step: Optimiser steps done.
        validation: Accuracy in percent with these very weights; None: not measured.
        imports: Checksums of the files of one's own that it needs, by name.
        converted: The ``file`` that weights were taken over ``from`` another library in.
        which: The checkpoint of a run that was exported, ``last`` or ``best``.
        averaged: Says what the weights are an average of; None: of nothing.
    """

    model_config = ConfigDict(strict=True, frozen=True)

    config: dict[str, Any]
    classes: list[str] | None
    timesteps: Annotated[int, Field(gt=0, le=10_000)]  # the most of phases.*.timesteps
    step: int
    validation: dict[str, float] | None = None
    imports: dict[str, str] = {}
    converted: dict[str, str] | None = None
    which: str | None = None
    averaged: str | None = None


@dataclass(frozen=True)
class Average:
    """A moving average of the weights, which a checkpoint holds beside them.

    Attributes:
        weights: By the names that they have in the model's state.
        description: Of these weights: their accuracy is another.
        best: Whether it is the best average so far.
    """

    weights: dict[str, Tensor]
    description: Description
    best: bool


@dataclass(frozen=True)
class Checkpoint:
    """A verified checkpoint in memory.

    Attributes:
        path: Folder that it was read from.
        state: What the trainer put in: step, accumulated metrics, best result, ...
        model: Model state, on the CPU.
        optimizer: The optimiser's ``state_dict``.
        average: The moving average of the model's state; None: there is none.
    """

    path: Path
    state: dict[str, Any]
    model: dict[str, Tensor]
    optimizer: dict[str, Any]
    average: dict[str, Tensor] | None = None


def save(
    folder: Path,
    *,
    model: nn.Module,
    optimizer: dict[str, Any],
    description: Description,
    state: dict[str, Any],
    keep_last: int,
    best: bool,
    average: Average | None = None,
) -> Path:
    """Write the checkpoint of ``state["step"]`` and delete those no longer wanted.

    Args:
        folder: The run's ``checkpoints`` folder.
        model: Its state goes to model.safetensors.
        optimizer: The optimiser's ``state_dict``; goes to optimizer.pt.
        description: Goes to the header of model.safetensors.
        state: JSON values.
        keep_last: Number of the newest to keep, besides the best ones.
        best: Whether this is the best one so far.
        average: Goes to ema.safetensors, with its own description.

    Returns:
        Where it is.

    Raises:
        UserError: It could not be written; the earlier checkpoints are still there.
    """
    name = f"step-{state['step']:08d}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for leftover in folder.glob(".step-*"):  # of a process that was killed
            remove(leftover)
        # A run that was stopped while it evaluated, or that comes by a damaged checkpoint again,
        # saves the same step twice. The second gets a name of its own: while a folder is replaced,
        # there is for a moment neither.
        repeats = [int(path.suffix[1:] or 0) for path in folder.glob(f"{name}*")]
        target = folder / (f"{name}.{max(repeats) + 1}" if repeats else name)
        with made_aside(target) as aside, _telling_full_disk(folder):
            aside.mkdir()
            _write_weights(aside / MODEL_FILE, model.state_dict(), description)
            if average is not None:
                _write_weights(aside / EMA_FILE, average.weights, average.description)
            torch.save(optimizer, aside / OPTIMIZER_FILE)
            state = {"format": FORMAT_VERSION} | state
            (aside / STATE_FILE).write_text(json.dumps(state, indent=1))
            files = {path.name: _describe(path) for path in sorted(aside.iterdir())}
            (aside / MANIFEST_FILE).write_text(json.dumps({"files": files}, indent=1))
        best_average = average is not None and average.best
        pointers = {"last": True, "best": best, BEST_EMA: best_average}
        for pointer in (name for name, moves in pointers.items() if moves):
            write_text(folder / pointer, f"{target.name}\n")
    except (OSError, RuntimeError, SafetensorError) as error:
        raise UserError(
            f"the checkpoint of step {state['step']} could not be written to {folder} "
            f"({_reason(error)}); the earlier ones are untouched: {way_out(error)}, and run the "
            "same command again"
        ) from error
    _delete_old(folder, keep_last)
    return target


@contextmanager
def _telling_full_disk(folder: Path) -> Iterator[None]:
    """Name a full disk as the cause: the errors of torch.save and safetensors do not say so."""
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        if shutil.disk_usage(folder).free > 2**20:
            raise
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)) from error


def _reason(error: BaseException) -> str:
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return str(error).splitlines()[0] if str(error) else type(error).__name__


def newest(folder: Path) -> Checkpoint | None:
    """Read the newest checkpoint that is whole; damaged ones are named and passed over.

    Returns:
        None where there is no checkpoint at all.

    Raises:
        UserError: There are checkpoints and none is whole.
    """
    paths = _all(folder)[::-1]
    for path in paths:
        problem = verify(path)
        if problem is None:
            return read(path)
        logger.warning("checkpoint %s is not used: %s", path, problem)
    if paths:
        raise UserError(
            f"of {counted(len(paths), 'checkpoint')} in {folder} none is whole; restore one, or "
            "set resume=never and another name to start anew"
        )
    return None


def verify(path: Path) -> str | None:
    """Return what is wrong with a checkpoint, or None."""
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
    """Read a checkpoint that `verify` found whole."""
    state = json.loads((path / STATE_FILE).read_text())
    if state["format"] != FORMAT_VERSION:
        raise UserError(
            f"{path} has checkpoint format {state['format']}, this version reads "
            f"{FORMAT_VERSION}; use the version of tetdist that wrote it"
        )
    return Checkpoint(
        path,
        state,
        load_file(path / MODEL_FILE),
        torch.load(path / OPTIMIZER_FILE, map_location="cpu", weights_only=True),
        load_file(path / EMA_FILE) if (path / EMA_FILE).is_file() else None,
    )


def load_model_file(
    path: Path, which: str = "last", *, ema: bool = False
) -> tuple[dict[str, Tensor], Description]:
    """Read weights and description of a run, a checkpoint, an export or a .safetensors file.

    Args:
        path: The folder of one of these, or the file; or ``hf:ORG/NAME`` of the hub, see hub.py.
        which: The ``last`` checkpoint of a run folder, or the ``best`` one.
        ema: Read the moving average in their place; the ``best`` one is then that of the averages.

    Raises:
        UserError: There is no such checkpoint, it is damaged, or it is not one of tetdist.
    """
    file = _ema_file(path, which) if ema else _model_file(path, which)
    try:
        weights = load_file(file)
        with safe_open(file, framework="pt") as opened:
            metadata = opened.metadata() or {}
    except (OSError, SafetensorError, ValueError) as error:
        hint = ""
        if file.suffix != ".safetensors":
            hint = f"; `{typed('convert')}` makes one of other libraries' weights"
        raise UserError(f"{file} is not a readable model file ({_reason(error)}){hint}") from error
    if "tetdist" not in metadata:
        raise UserError(
            f"{file} does not say which model it is of; it was not written by tetdist's training"
        )
    try:
        return weights, Description.model_validate_json(metadata["tetdist"])
    except ValidationError as error:
        wrong = {str(one["loc"][0]) for one in error.errors() if one["loc"]} or {"all of it"}
        raise UserError(
            f"the description in {file} is damaged or of another version: "
            f"{', '.join(sorted(wrong))} cannot be read"
        ) from error


def _write_weights(path: Path, weights: dict[str, Tensor], description: Description) -> None:
    # They are copied, since at ZeRO stages above 0 the parameters are views of one buffer.
    copies = {
        key: tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
        for key, tensor in weights.items()
    }
    # save_file would make a file that only its owner may read.
    described = json.dumps(description.model_dump(exclude_unset=True))
    path.write_bytes(serialize(copies, metadata={"tetdist": described}))


def _model_file(path: Path, which: str) -> Path:
    if str(path).startswith(hub.HF):
        return hub.fetch(str(path), MODEL_FILE)
    if path.is_file():
        problem = verify(path.parent) if (path.parent / MANIFEST_FILE).is_file() else None
        if problem is not None:
            raise UserError(f"{path} is part of a checkpoint that is not whole: {problem}")
        return path
    if not path.exists():
        raise UserError(f"there is no checkpoint {path}; give a run folder or a .safetensors file")
    if (path / MODEL_FILE).is_file():
        if not any((path / name).exists() for name in (MANIFEST_FILE, OPTIMIZER_FILE, STATE_FILE)):
            return path / MODEL_FILE  # what the command export has written
        folder = path
    else:
        checkpoints = path / "checkpoints" if (path / "checkpoints").is_dir() else path
        pointer = checkpoints / which
        if not pointer.is_file():
            raise UserError(
                f"there is no {which} checkpoint in {path}; give the folder of a run, of a "
                "checkpoint or of an export, or a .safetensors file"
            )
        folder = checkpoint_at(pointer)
    problem = verify(folder)
    if problem is not None:
        raise UserError(f"the checkpoint {folder} is not whole: {problem}")
    return folder / MODEL_FILE


def _ema_file(path: Path, which: str) -> Path:
    file = _model_file(path, "last").with_name(EMA_FILE)
    if not file.is_file():
        raise UserError(
            f"--ema: {path} has no moving average of its weights (a run has one with "
            "ema.decay=...); leave out --ema"
        )
    return _model_file(path, BEST_EMA).with_name(EMA_FILE) if which == "best" else file


def write_model_file(path: Path, weights: dict[str, Tensor], description: Description) -> None:
    """Write a file that `load_model_file` reads, whole or not at all.

    Args:
        path: What is there already is replaced.
        weights: A model's state.
        description: Of them.

    Raises:
        UserError: It could not be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with made_aside(path) as aside, _telling_full_disk(path.parent):
            _write_weights(aside, weights, description)
    except (OSError, RuntimeError, SafetensorError) as error:
        raise UserError(
            f"{path} could not be written ({_reason(error)}); make room, or choose another place"
        ) from error


def load_weights(model: nn.Module, weights: dict[str, Tensor], source: Path) -> None:
    """Put weights into a model, all of them and nothing else.

    Raises:
        UserError: They are of another model; the text says what does not fit.
    """
    own = model.state_dict()
    problems = [f"{key} is missing" for key in own.keys() - weights.keys()]
    problems += [f"{key} is unknown to it" for key in weights.keys() - own.keys()]
    problems += [
        f"{key} has shape {tuple(weights[key].shape)} instead of {tuple(own[key].shape)}"
        for key in own.keys() & weights.keys()
        if own[key].shape != weights[key].shape
    ]
    if problems:
        shown = "; ".join(sorted(problems)[:3])
        more = f"; and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise UserError(f"{source} is a checkpoint of another model: {shown}{more}")
    model.load_state_dict(weights)


def _all(folder: Path) -> list[Path]:
    """All checkpoints, oldest first; one that repeats a step comes after the first of it."""

    def order(path: Path) -> tuple[str, int]:
        step, _, repeat = path.name.partition(".")
        return step, int(repeat) if repeat.isdigit() else 0

    return sorted(folder.glob("step-*"), key=order)


def _delete_old(folder: Path, keep_last: int) -> None:
    best = [folder / name for name in ("best", BEST_EMA)]
    kept = {pointer.read_text(errors="replace").strip() for pointer in best if pointer.is_file()}
    *older, newest_path = _all(folder)
    repeated = [path for path in older if path.name.split(".")[0] == newest_path.name.split(".")[0]]
    distinct = [path for path in older if path not in repeated]
    for path in repeated + distinct[: -keep_last + 1]:
        if path.name not in kept:
            remove(path)


def _describe(path: Path) -> dict[str, Any]:
    with path.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    return {"bytes": path.stat().st_size, "sha256": digest}
