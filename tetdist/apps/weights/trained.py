"""A checkpoint as others may have it: network and configuration, without where they were made."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, assert_never

import torch
from torch import Tensor

from tetdist import plugins
from tetdist.config.fields import TIMM
from tetdist.config.identity import without_machine
from tetdist.config.loading import parse
from tetdist.config.schema import RunConfig
from tetdist.errors import UserError
from tetdist.models import SpikingNetwork
from tetdist.storage import checkpoint
from tetdist.storage.hub import HF


@dataclass(frozen=True)
class Trained:
    """A checkpoint, ready to be exported.

    Attributes:
        model: Set to evaluation, in float32; one of ours by the plain definitions of normalisation
            and neurons.
        config: That of its training.
        description: The checkpoint's description of itself, without the machine's paths.
    """

    model: SpikingNetwork
    config: RunConfig
    description: checkpoint.Description

    @property
    def input_shape(self) -> tuple[int, ...]:
        """The shape of one sample at one timestep, (C, H, W).

        Raises:
            UserError: A network of events from outside does not say it.
        """
        match self.config.data.kind:
            case "images":
                return (3, self.config.data.image_size, self.config.data.image_size)
            case "events":
                side = getattr(self.model, "input_size", None)
                if side is None and isinstance(self.model, SpikingNetwork):
                    side = self.model.default_cfg["input_size"][-1]  # any would do
                if side is None:
                    raise UserError(
                        f"{self.config.model.name} does not say how large its event frames are: "
                        "give the network an attribute input_size"
                    )
                return (2, side, side)
            case other:
                assert_never(other)

    def examples(self, count: int) -> Tensor:
        """Random inputs, (B, C, H, W) or (B, T, C, H, W), always the same."""
        time = {"images": (), "events": (self.model.timesteps,)}[self.config.data.kind]
        generator = torch.Generator().manual_seed(0)
        return torch.randn((count, *time, *self.input_shape), generator=generator)


def load(
    path: Path, which: str = "last", timesteps: int | None = None, *, ema: bool = False
) -> Trained:
    """Read a run folder, a checkpoint folder, a .safetensors file or a network of the hub.

    Args:
        path: One of these four.
        which: The checkpoint of a run folder: ``last`` or ``best``.
        timesteps: T, where it is another one than in training.
        ema: Take the moving average of the weights.

    Raises:
        UserError: See `checkpoint.load_model_file`.
    """
    weights, description = checkpoint.load_model_file(path, which, ema=ema)
    plugins.require(description.imports, path)
    parse(description.config, str(path), warn=False)  # somebody else may have written it
    config = parse(_without_places(description.config), str(path), warn=False)
    num_classes = config.model.num_classes or len(description.classes or ())
    timesteps = timesteps or description.timesteps
    model = config.model.build(num_classes=num_classes, timesteps=timesteps)
    checkpoint.load_weights(model, weights, path)
    if isinstance(model, SpikingNetwork):
        model.set_execution("reference")
    changes = {"config": config.as_dict(), "timesteps": model.timesteps, "which": which}
    if model.timesteps != description.timesteps:
        changes["validation"] = None  # It was measured at the other T.
    return Trained(model.eval(), config, description.model_copy(update=changes))


def _without_places(config: dict[str, Any]) -> dict[str, Any]:
    """The configuration without folders, addresses and machine of whoever trained."""
    config = without_machine(config)
    loss = config.get("loss", {})
    distillation = loss.get("distillation", {})
    named = {key: _name_of(distillation.get(key)) for key in ("teacher", "teacher_weights")}
    return config | {
        "data": config["data"] | {"root": "data"},
        "init_checkpoint": _name_of(config.get("init_checkpoint")),
        "imports": [Path(one).name for one in config.get("imports", [])],
        "loss": loss | {"distillation": distillation | named},
    }


def _name_of(path: str | None) -> str | None:
    """The name of a file or folder without its place; timm:NAME and hf:ORG/NAME as they are."""
    return path if path is None or path.startswith((TIMM, HF)) else Path(path).name
