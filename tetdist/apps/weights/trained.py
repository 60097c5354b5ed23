"""Checkpoint to export: network and configuration, without paths of the training machine."""

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
from tetdist.storage.files import parse_json
from tetdist.storage.hub import HF
from tetdist.tracking.environment import git_version


@dataclass(frozen=True)
class Trained:
    """Checkpoint, ready to be exported.

    Attributes:
        model: The network in evaluation mode, in float32; tetdist's own networks run by the plain
            definitions of normalisation and neurons.
        description: The checkpoint's description, without the machine's paths.
    """

    model: SpikingNetwork
    config: RunConfig
    description: checkpoint.Description

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Shape of one sample at one timestep, (C, H, W)."""
        data = self.config.data
        match data.kind:
            case "images":
                channels = {"images": 3, "events": 2}[data.input_kind]
                return (channels, data.image_size, data.image_size)
            case "events":
                side = getattr(self.model, "input_size", None)
                if side is None:  # any size is possible
                    side = getattr(self.model, "default_cfg", {}).get("input_size", (None,))[-1]
                if side is None:
                    raise UserError(
                        f"the size of {self.config.model.name}'s event frames is unknown; give the "
                        "network an attribute input_size"
                    )
                return (2, side, side)
            case other:
                assert_never(other)

    def examples(self, count: int) -> Tensor:
        """Return fixed random inputs, (B, C, H, W) or (B, T, C, H, W)."""
        time = {"images": (), "events": (self.model.timesteps,)}[self.config.data.input_kind]
        generator = torch.Generator().manual_seed(0)
        return torch.randn((count, *time, *self.input_shape), generator=generator)


def load(
    path: str | Path, which: str = "last", timesteps: int | None = None, *, ema: bool = False
) -> Trained:
    """Read a run folder, a checkpoint folder, a .safetensors file, or a network by its name.

    Args:
        path: Path of one of these, or ``hf:ORG/NAME`` or ``tetdist:NAME``.
    """
    path = Path(path)
    weights, description = checkpoint.load_model_file(path, which, ema=ema)
    plugins.require(description.imports, path)
    # Another program may have written it.
    parse(description.config, str(path), only_used=True)
    config = parse(_without_places(description.config), str(path), only_used=True)
    num_classes = config.model.num_classes or len(description.classes or ())
    timesteps = timesteps or description.timesteps
    kind = config.data.input_kind
    model = config.model.build(num_classes=num_classes, timesteps=timesteps, input_kind=kind)
    checkpoint.load_weights(model, weights, path)
    if isinstance(model, SpikingNetwork):
        model.set_execution("reference")
    changes = {"config": config.as_dict(), "timesteps": model.timesteps, "which": which}
    if model.timesteps != description.timesteps:
        changes["validation"] = None  # It was measured at another T.
    if (recorded := path / "environment.json").is_file():  # It is a run folder.
        changes["commit"] = git_version(parse_json(recorded.read_text())["git"]) or None
    trained = Trained(model.eval(), config, description.model_copy(update=changes))
    model.looks_ahead = description.looks_ahead
    config.model.check_own(model, trained.examples(1).shape[1:])
    return trained


def _without_places(config: dict[str, Any]) -> dict[str, Any]:
    """Return the configuration without folders, addresses and machine of the training."""
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
    """Return a path's last part; timm:NAME and hf:ORG/NAME stay unchanged."""
    return path if path is None or path.startswith((TIMM, HF)) else Path(path).name
