"""The engine that a configuration asks for."""

import torch
from torch import nn

from tetdist.config.schema import RunConfig
from tetdist.distributed.world import World
from tetdist.training.engines.base import Engine
from tetdist.training.engines.deepspeed_engines import DeepSpeedEngine, ZeroEngine
from tetdist.training.engines.torch_engine import TorchEngine


def make_engine(
    config: RunConfig,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    accumulation: int,
    world: World,
) -> Engine:
    """The configured engine for one phase.

    Args:
        config: Its ``engine``, ``zero_stage``, ``precision``, ``batch`` and ``gradient_clipping``
            are read.
        model: On its device, the same on every process.
        optimizer: From `make_optimizer`.
        accumulation: Micro-batches that this process contributes to each step.
        world: All processes.

    Raises:
        UserError: DeepSpeed is not installed.
    """
    cls: type[TorchEngine] | type[DeepSpeedEngine] | type[ZeroEngine] = TorchEngine
    if config.engine == "deepspeed":
        cls = ZeroEngine if config.zero_stage else DeepSpeedEngine
    return cls(config, model, optimizer, accumulation, world)
