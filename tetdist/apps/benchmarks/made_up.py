"""The trainer's step on made-up batches, for benchmarks and checks that need no data."""

import itertools
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import timm
import torch
from torch import Tensor, nn

from tetdist import models, order
from tetdist.config.loading import parse
from tetdist.config.schema import RunConfig
from tetdist.config.sections.training import SegmentsSection
from tetdist.data import mixing
from tetdist.data.transforms import micro_batch_mix
from tetdist.distributed.world import World
from tetdist.nn import batch_norm
from tetdist.nn.precision import choose_algorithms, parameter_type
from tetdist.optimizers import make_optimizer
from tetdist.training.ema import WeightAverage
from tetdist.training.engines import make_engine
from tetdist.training.engines.base import EngineParts
from tetdist.training.step import LOSS, SAMPLES, MicroBatch, Step

SGD = {"kind": "sgd", "lr": 0.01}


class Repeated(nn.Module):
    """Network without time, or of another library, as `Step` takes it.

    Args:
        network: Network of images (T * B, ...), or what ``logits`` calls.
        logits: Function from images, or event frames, to logits (T, B, K); None: those of the
            network with the images of all timesteps in one batch.
    """

    num_classes = None  # any number

    def __init__(
        self, network: nn.Module, logits: Callable[[Tensor], Tensor] | None = None
    ) -> None:
        super().__init__()
        self.network, self._logits = network, logits

    def set_timesteps(self, timesteps: int) -> None:
        self.timesteps = timesteps

    def forward(self, images: Tensor, *, per_timestep: bool) -> Tensor:
        assert per_timestep
        if self._logits is not None:
            return self._logits(images)
        # Unlike repeat(), cat() keeps channels_last.
        rows = images.flatten(0, 1) if images.ndim == 5 else torch.cat([images] * self.timesteps)
        logits: Tensor = self.network(rows)
        return logits.unflatten(0, (self.timesteps, len(images)))


def training_step(
    world: World,
    name: str,
    *,
    size: int,
    batch: int,
    accumulation: int,
    timesteps: Any = 4,
    optimizer: Mapping[str, Any] = SGD,
    arguments: Mapping[str, Any] | None = None,
    data: Mapping[str, Any] | None = None,
    instead: nn.Module | None = None,
    **settings: Any,
) -> "MadeUp":
    """Make the trainer's step, on made-up batches of ``batch`` images a process and micro-batch.

    ``size`` is an image's side in pixels, ``instead`` a network to train in place of the named one;
    ``settings`` are other keys of the configuration, such as ``engine``.
    """
    kind = {"kind": "events"} if models.input_kind(name) == "events" else {}
    values = {
        "name": "check",
        "model": {"name": name, "arguments": dict(arguments or {})},
        "data": {"root": "none", "image_size": size} | kind | dict(data or {}),
        "batch": {"global": batch * accumulation * world.world_size, "micro": batch},
        "phases": [{"epochs": 1, "timesteps": timesteps, "optimizer": dict(optimizer)}],
    }
    config = parse(values | settings, "the check")
    choose_algorithms(config.precision)
    model = initial(config, instead).to(world.device)
    if config.recompute != "none":
        model.set_grad_checkpointing(True)
    if config.batch_norm.sync:
        batch_norm.synchronize(model, world.mean_, world.world_size)
    average = WeightAverage.of(model, config.ema)
    made = make_optimizer(model, config.optimizer_of(0))
    engine = make_engine(EngineParts(config, model, made, accumulation, world))
    if average is not None:
        average.follow()
    numbers = order.rank_micro_batches(world.rank, world.world_size, config.batch.global_, batch)
    return MadeUp(Step(config, model, engine, world, numbers, average=average), size)


def initial(config: RunConfig, instead: nn.Module | None = None) -> Any:
    """Return the network of a configuration, the same each time, as it begins to train."""
    torch.manual_seed(0)
    model: Any = instead
    if instead is None:
        section, timesteps = config.model, config.phases[0].most_timesteps
        model = timm.create_model(section.name, timesteps=timesteps, **section.arguments)
    if isinstance(config.recompute, SegmentsSection):
        model.set_segment(config.recompute.timesteps)
    batch_norm.defer_running_statistics(model)
    return model.to(parameter_type(config.precision)).train()


class MadeUp:
    """The trainer's step, on three batches in turn."""

    def __init__(self, step: Step, size: int) -> None:
        self.step, self.size = step, size
        # Several, so that the check finds a CUDA graph that still reads the batch of its capture.
        self._batches = itertools.cycle([self.batch_of(step.world.rank, i) for i in range(3)])
        self._numbers = itertools.count()

    def batch_of(
        self, rank: int, number: int, mixed: Callable[..., MicroBatch] = mixing.mixed
    ) -> MicroBatch:
        """Return images, or event frames, and targets of a process; each process has other ones.

        ``mixed`` mixes them."""
        config, device = self.step.config, self.step.world.device
        channels = timm.get_pretrained_cfg(config.model.name).input_size[-3]
        generator = torch.Generator().manual_seed(3 * rank + number)
        batch, dtype = config.batch.micro, parameter_type(config.precision)
        frames = (self.step.section.most_timesteps,) if channels == 2 else ()
        shape = (batch, *frames, channels, self.size, self.size)
        images = torch.rand(shape, generator=generator).to(device, dtype)
        if not frames:
            images = images.contiguous(memory_format=torch.channels_last)
        labels = (torch.arange(batch, device=device) + rank + number) % 10
        positions = np.arange(batch) + batch * number
        mix = micro_batch_mix(0, 0, positions, (self.size, self.size), config.data)
        if mix is None:
            return images, labels
        return mixed(images, labels, mix, self.step.model.num_classes)

    def take(self, lr: float = 0.01) -> Tensor:
        """Take a step; return its sums, as `Step.take`, without waiting for the device."""
        micro_batches = itertools.islice(self._batches, len(self.step.micro_batches))
        return self.step.take(next(self._numbers), micro_batches, lr)[1]

    def __call__(self, lr: float = 0.01) -> Tensor:
        """Take a step; return its mean loss, ()."""
        sums = self.take(lr)
        return sums[LOSS] / sums[SAMPLES]

    def close(self) -> None:
        """Release the engine."""
        self.step.engine.close()
