"""The teacher: a trained network whose logits a student learns from besides the labels."""

import hashlib
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn

from tetdist import plugins
from tetdist.config.fields import TIMM
from tetdist.config.loading import parse
from tetdist.config.schema import RunConfig
from tetdist.datasets.index import Index
from tetdist.errors import UserError
from tetdist.models import SpikingNetwork
from tetdist.nn.precision import autocast, parameter_type, place
from tetdist.storage import checkpoint, foreign_files

KEY = "loss.distillation.teacher"


class Teacher:
    """Frozen network that returns logits (B, K) for exactly the images that the student sees.

    A spiking teacher returns its time-mean: for a static image over its own T, for events over the
    student's time bins, all that the data have.

    Attributes:
        fingerprint: Checksum of its weights, which must stay the same during a run.

    Args:
        config: The student's configuration; ``loss.distillation.teacher`` is set.
    """

    def __init__(self, config: RunConfig, index: Index, device: torch.device) -> None:
        self.precision = config.precision
        name = config.loss.distillation.teacher
        assert name is not None
        # Keep the student's random numbers the same with and without a teacher.
        with torch.random.fork_rng(devices=[]):
            if name.startswith(TIMM):
                self.model, mean, std = _from_timm(config, index)
            else:
                self.model, mean, std = _from_checkpoint(Path(name), config, index)
        self.model.requires_grad_(False).eval()
        self.fingerprint = fingerprint(self.model)
        place(self.model, device, config.precision)
        dtype = parameter_type(config.precision)
        # Convert from the student's normalisation to the one that the teacher was trained with.
        student, teacher = (config.data.mean, config.data.std), (mean, std)
        self.between = None if student == teacher else _between(student, teacher).to(device, dtype)
        if config.data.input_kind == "images":
            self._check_image_size(config, device)

    @classmethod
    def of(cls, config: RunConfig, index: Index, device: torch.device) -> "Teacher | None":
        """Make the teacher that a configuration asks for, if any."""
        section = config.loss.distillation
        weights = (loss.distillation.weight for loss in config.losses())
        is_used = section.teacher is not None and any(weights)
        return cls(config, index, device) if is_used else None

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """Return logits (B, K) of images (B, C, H, W), or of event frames (B, T, 2, H, W)."""
        if images.ndim == 5:
            assert isinstance(self.model, SpikingNetwork)
            self.model.set_timesteps(images.shape[1])
        elif self.between is not None:
            gain, offset = self.between
            images = images * gain + offset
        with autocast(images.device, self.precision):
            logits: Tensor = self.model(images)
        return logits

    def _check_image_size(self, config: RunConfig, device: torch.device) -> None:
        """Run once, so that a misfit shows before the first epoch."""
        size = config.data.image_size
        images = torch.zeros(1, 3, size, size, device=device)
        try:
            self(images.to(parameter_type(config.precision)))
        except (RuntimeError, ValueError, AssertionError) as error:
            raise UserError(
                f"{KEY}: {config.loss.distillation.teacher} cannot take images of {size}x{size} "
                f"pixels ({str(error).splitlines()[0]})"
            ) from error


def fingerprint(model: nn.Module) -> str:
    """Return the SHA-256 of a network's weights and running statistics."""
    digest = hashlib.sha256()
    for key, value in sorted(model.state_dict().items()):
        digest.update(key.encode())
        digest.update(value.contiguous().cpu().numpy().tobytes())
    return digest.hexdigest()


_Loaded = tuple[nn.Module, tuple[float, ...], tuple[float, ...]]  # with its mean and std


def _from_checkpoint(path: Path, config: RunConfig, index: Index) -> _Loaded:
    try:
        weights, description = checkpoint.load_model_file(path)
    except UserError as error:
        raise UserError(f"{KEY}: {error}") from error
    plugins.require(description.imports, path)
    trained = parse(description.config, str(path), only_used=True)
    kind = config.data.input_kind
    if trained.data.input_kind != kind:
        raise UserError(
            f"{KEY}: {path} was trained on {trained.data.input_kind}, but the data are {kind}"
        )
    classes = description.classes
    if classes is not None and list(classes) != list(index.classes):
        raise UserError(
            f"{KEY}: {path} must have the classes of {config.data.root}, in the same order"
        )
    num_classes = trained.model.num_classes or (len(classes) if classes else len(index.classes))
    _check_num_classes(str(path), num_classes, config.model.num_classes or len(index.classes))
    model = trained.model.build(
        num_classes=num_classes, timesteps=description.timesteps, input_kind=kind
    )
    if hasattr(model, "set_execution"):
        model.set_execution(config.execution)
    input_size, frames = getattr(model, "input_size", None), index.frames(config.data)
    if frames is not None and input_size not in (None, frames[2]):
        raise UserError(
            f"{KEY}: {path} is built for {model.input_size}x{model.input_size} pixels, but the "
            f"data has {frames[2]}x{frames[2]}; choose a teacher of that size"
        )
    checkpoint.load_weights(model, weights, path)
    side = config.data.image_size
    shape = (3, side, side) if frames is None else (model.timesteps, *frames[1:])
    try:
        trained.model.check_own(model, shape)
    except UserError as error:
        raise UserError(f"{KEY}: {error} in {path}'s own run") from error
    return model, trained.data.mean, trained.data.std


def _from_timm(config: RunConfig, index: Index) -> _Loaded:
    section = config.loss.distillation
    assert section.teacher is not None
    name = section.teacher.removeprefix(TIMM)
    if config.data.input_kind != "images":
        raise UserError(
            f"{KEY}: timm's {name} takes images, but the data are {config.data.input_kind}"
        )
    file = section.teacher_weights
    num_classes = config.model.num_classes or len(index.classes)
    arguments: dict[str, Any] = {} if file is None else {"num_classes": num_classes}
    try:
        model: nn.Module = timm.create_model(name, pretrained=file is None, **arguments)
    except Exception as error:  # timm or a download may raise any error
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"{KEY}: timm cannot make {name} ({reason}); `timm.list_pretrained()` has the names, "
            f"and {KEY}_weights=FILE is for machines without a network"
        ) from error
    if file is not None:
        checkpoint.load_weights(model, foreign_files.read(Path(file)), Path(file))
    _check_num_classes(name, model.num_classes, num_classes)
    described = timm.get_pretrained_cfg(name)
    return model, described.mean, described.std


def _check_num_classes(name: str, number: object, student: int) -> None:
    if number != student:
        raise UserError(f"{KEY}: {name} has {number} classes, but the student {student}")


def _between(
    ours: tuple[tuple[float, ...], tuple[float, ...]],
    theirs: tuple[tuple[float, ...], tuple[float, ...]],
) -> Tensor:
    """Return gain and offset, (2, 3, 1, 1), that convert one (mean, std) to another."""
    (mean, std), (mean_t, std_t) = (
        [torch.tensor(values, dtype=torch.float64).view(-1, 1, 1) for values in pair]
        for pair in (ours, theirs)
    )
    return torch.stack([std / std_t, (mean - mean_t) / std_t])
