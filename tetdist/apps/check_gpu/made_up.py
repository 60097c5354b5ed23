"""The trainer's step on made-up batches, for checks that need no data."""

import itertools
from typing import Any

import timm
import torch
from torch import Tensor

import tetdist.models  # noqa: F401  # registers them
from tetdist.config.loading import parse
from tetdist.config.schema import RunConfig
from tetdist.distributed.world import World
from tetdist.nn import batch_norm
from tetdist.nn.precision import choose_algorithms, parameter_type
from tetdist.optimizers import make_optimizer
from tetdist.training.engines import make_engine
from tetdist.training.engines.base import EngineParts
from tetdist.training.step import LOSS, SAMPLES, Step


def training_step(
    world: World,
    name: str,
    *,
    size: int,
    batch: int,
    accumulation: int,
    **settings: Any,
) -> "MadeUp":
    """Make the trainer's step, on made-up batches of ``batch`` images a process and micro-batch.

    ``size`` is an image's side in pixels; ``settings`` are other keys of the configuration, such as
    ``engine``.
    """
    optimizer = {"kind": "sgd", "lr": 0.01}
    values = {
        "name": "check",
        "model": {"name": name},
        "data": {"root": "none"},
        "batch": {"global": batch * accumulation * world.world_size, "micro": batch},
        "phases": [{"epochs": 1, "timesteps": 4, "optimizer": optimizer}],
    }
    config = parse(values | settings, "the check")
    choose_algorithms(config.precision)
    model = initial(config).to(world.device)
    if config.recompute == "blocks":
        model.set_grad_checkpointing(True)
    if config.batch_norm.sync:
        batch_norm.synchronize(model, world.mean_, world.world_size)
    made = make_optimizer(model, config.optimizer_of(0))
    engine = make_engine(EngineParts(config, model, made, accumulation, world))
    step = Step(config, model, engine, world, range(accumulation))
    return MadeUp(step, size)


def initial(config: RunConfig) -> Any:
    """Return the network of a configuration, the same each time, as it begins to train."""
    torch.manual_seed(0)
    model = timm.create_model(config.model.name, timesteps=config.phases[0].most_timesteps)
    batch_norm.defer_running_statistics(model)
    return model.to(parameter_type(config.precision)).train()


class MadeUp:
    """The trainer's step, on three batches in turn."""

    def __init__(self, step: Step, size: int) -> None:
        self.step, self.size = step, size
        # Several, so that the check finds a CUDA graph that still reads the batch of its capture.
        self._batches = itertools.cycle([self.batch_of(step.world.rank, i) for i in range(3)])
        self._numbers = itertools.count()

    def batch_of(self, rank: int, number: int) -> tuple[Tensor, Tensor]:
        """Return images and labels of a process; each process has other ones."""
        config, model, device = self.step.config, self.step.model, self.step.world.device
        generator = torch.Generator(device).manual_seed(3 * rank + number)
        batch, dtype = config.batch.micro, next(model.parameters()).dtype
        shape = (batch, model.in_chans, self.size, self.size)
        images = torch.rand(shape, device=device, generator=generator).to(dtype)
        images = images.contiguous(memory_format=torch.channels_last)
        return images, (torch.arange(batch, device=device) + rank + number) % 10

    def __call__(self, lr: float = 0.01) -> Tensor:
        """Take a step; return its mean loss, (), without waiting for the device."""
        micro_batches = itertools.islice(self._batches, len(self.step.micro_batches))
        _, sums = self.step.take(next(self._numbers), micro_batches, lr)
        return sums[LOSS] / sums[SAMPLES]

    def close(self) -> None:
        """Release the engine."""
        self.step.engine.close()
