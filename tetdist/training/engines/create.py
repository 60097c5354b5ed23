"""The engine that a configuration asks for."""

from collections.abc import Callable

import torch
from torch import nn

from tetdist.config.schema import RunConfig
from tetdist.distributed.world import World
from tetdist.training.engines.base import Engine
from tetdist.training.engines.deepspeed_engines import DeepSpeedEngine, ZeroEngine
from tetdist.training.engines.torch_engine import TorchEngine

# By engine and ZeRO stage; config/checks.py says which go together.
ENGINES: dict[tuple[str, int], Callable[..., Engine]] = {
    ("torch", 0): TorchEngine,
    ("deepspeed", 0): DeepSpeedEngine,
    ("deepspeed", 1): ZeroEngine,
    ("deepspeed", 2): ZeroEngine,
}


def make_engine(
    config: RunConfig,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    accumulation: int,
    world: World,
) -> Engine:
    """Make the configured engine for one phase.

    Args:
        config: Its ``engine``, ``zero_stage``, ``precision``, ``batch``, ``gradient_clipping`` and
            ``clip_mode`` are read.
        model: On its device, the same on every process.
        optimizer: From `make_optimizer`.
        accumulation: Micro-batches that this process contributes to each step.
        world: All processes.

    Raises:
        UserError: DeepSpeed is not installed.
    """
    return ENGINES[config.engine, config.zero_stage](config, model, optimizer, accumulation, world)
