"""Exact evaluation: every sample counts once over all processes, for any batch size."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tetdist.config.schema import RunConfig
from tetdist.data.build import eval_loader
from tetdist.data.loader import Batch
from tetdist.data.transfer import on_device
from tetdist.datasets.index import Index
from tetdist.distributed.world import World
from tetdist.losses import running_means
from tetdist.models import SpikingNetwork
from tetdist.models.base import check_logits
from tetdist.nn.fast import native_pool
from tetdist.nn.norm_neuron import firing_layers, is_causal, neuron_of
from tetdist.nn.precision import autocast, parameter_type
from tetdist.tracking.progress import sample_bar

Also = Callable[[Tensor, Tensor], Any]


@dataclass(frozen=True)
class Evaluation:
    """Results over a whole split.

    Attributes:
        samples: Number of evaluated samples: the size of the split.
        timesteps: T.
        top1: Percent of samples whose class has the largest time-mean logit.
        top5: Percent whose class is among the five largest (or all, with fewer classes).
        loss: Cross-entropy of the time-mean, averaged over samples.
        per_timestep_top1: Top-1 of the mean over the first t timesteps, t = 1 to T, which equals
            the result at T = t. Empty if the network is not causal, since this does not hold then.
        per_timestep_top5, per_timestep_loss: The same for top-5 and loss.
        firing_rate: Spikes per neuron per timestep, by layer; per sub-timestep where neurons fire
            up to D spikes in the D sub-timesteps of a timestep.
    """

    samples: int
    timesteps: int
    top1: float
    top5: float
    loss: float
    per_timestep_top1: list[float | None]
    per_timestep_top5: list[float | None]
    per_timestep_loss: list[float | None]
    firing_rate: dict[str, float]


class Interrupted(Exception):
    """The evaluation was ended because ``stop`` returned True."""


@dataclass(frozen=True)
class Evaluator:
    """Arguments of every pass over a split; ``alive`` is called after each batch."""

    model: SpikingNetwork
    config: RunConfig
    index: Index
    world: World
    alive: Callable[[], Any]

    def run(self, title: str, also: Also = lambda _logits, _labels: None) -> Evaluation:
        """Evaluate the split once; for ``also`` see `evaluate`."""
        bar = sample_bar(len(self.index), title, silent=self.world.rank != 0)

        def progress(count: int) -> None:
            bar.update(count * self.world.world_size)
            self.alive()

        with bar, eval_loader(self.config, self.index, self.world) as batches:
            return evaluate(
                self.model,
                batches,
                len(self.index),
                self.world,
                precision=self.config.precision,
                progress=progress,
                also=also,
            )


@torch.no_grad()
def evaluate(
    model: SpikingNetwork,
    batches: Iterable[Batch],
    num_samples: int,
    world: World,
    *,
    precision: str,
    stop: Callable[[], bool] = lambda: False,
    progress: Callable[[int], Any] = lambda _: None,
    also: Also = lambda _logits, _labels: None,
) -> Evaluation:
    """Evaluate the model at its present T.

    Args:
        model: The network; its mode is restored. Any network needs ``timesteps`` and ``forward(x,
            per_timestep=True)``; only tetdist's neurons have firing rates.
        batches: This process's share of the split; every process must get the same number of
            batches, of which some may be empty.
        num_samples: Size of the split; the count over all processes is checked against it.
        world: All processes.
        precision: Precision of the forward pass, see precision.py.
        stop: Called before each batch, with the same result on every process; True ends all.
        progress: Called with the number of samples of each batch.
        also: Called with each batch's logits (T, B, K) and labels (B,), on the device.

    Raises:
        Interrupted: ``stop`` returned True.
        UserError: The network does not return logits (T, B, K).
    """
    timesteps, device = model.timesteps, next(model.parameters()).device
    counts, samples = torch.zeros(3, timesteps, dtype=torch.float64, device=device), 0
    was_training = model.training
    model.eval()
    try:
        with _counting_spikes(model, device) as rates:
            for batch in batches:
                if stop():
                    raise Interrupted
                if len(batch.labels):
                    images = batch.inputs(device, parameter_type(precision))
                    with autocast(device, precision):
                        logits = model(images, per_timestep=True)
                    labels = on_device(batch.labels, device)
                    check_logits(logits, timesteps, len(labels))
                    counts += _count(logits, labels)
                    also(logits, labels)
                    samples += len(batch.labels)
                progress(len(batch.labels))
    finally:
        model.train(was_training)
    # The layers come from the model, so the vectors match even on a process without samples.
    flat = torch.cat([counts.flatten(), *rates.values()]).tolist()
    total, *flat = world.sum([float(samples), *flat])
    assert total == num_samples, f"evaluated {total:g} samples of {num_samples}"
    table = torch.tensor(flat[: 3 * timesteps], dtype=torch.float64).view(3, timesteps) / total
    top1, top5, loss = (100 * table[0]).tolist(), (100 * table[1]).tolist(), table[2].tolist()
    shows_each, spikes = is_causal(model), flat[3 * timesteps :]
    return Evaluation(
        samples=num_samples,
        timesteps=timesteps,
        top1=top1[-1],
        top5=top5[-1],
        loss=loss[-1],
        per_timestep_top1=top1 if shows_each else [],
        per_timestep_top5=top5 if shows_each else [],
        per_timestep_loss=loss if shows_each else [],
        firing_rate={
            name: fired / possible if possible else 0.0
            for name, fired, possible in zip(rates, spikes[::2], spikes[1::2], strict=True)
        },
    )


def _count(logits: Tensor, labels: Tensor) -> Tensor:
    """Count top-1 and top-5 correct samples and sum the loss, (3, T), of logits (T, B, K).

    Among equal logits the first class ranks higher, as for argmax. bfloat16 has so few digits that
    ties occur among ten thousand samples, and topk's order of ties is undefined.
    """
    means = running_means(logits)
    classes = torch.arange(logits.shape[-1], device=logits.device)
    own = means.gather(-1, labels.view(1, -1, 1).expand(len(logits), -1, 1))
    # This includes the label's own class, unless its logit is NaN: then it ranks last.
    not_ahead = (means < own) | ((means == own) & (classes >= labels.view(-1, 1)))
    place = logits.shape[-1] - not_ahead.sum(-1)
    loss = F.cross_entropy(means.flatten(0, 1), labels.repeat(len(logits)), reduction="none").view(
        len(logits), -1
    )
    rows = [(place == 0).double(), (place < min(5, logits.shape[-1])).double(), loss.double()]
    return torch.stack([row.sum(-1) for row in rows])


@contextmanager
def _counting_spikes(model: nn.Module, device: torch.device) -> Iterator[dict[str, Tensor]]:
    """Yield sums of spikes and neuron-timesteps, (2,), of every layer of neurons that runs."""
    sums = dict[str, Tensor]()

    def count(name: str, highest: int, _module: nn.Module, _inputs: Any, spikes: Tensor) -> None:
        sums[name][0] += native_pool.total(spikes)
        sums[name][1] += spikes.numel() * highest

    with ExitStack() as hooks:
        for name, module in firing_layers(model).items():
            sums[name] = torch.zeros(2, dtype=torch.float64, device=device)
            highest = 1 if (neuron := neuron_of(module)) is None else neuron.highest
            hooks.enter_context(module.register_forward_hook(partial(count, name, highest)))
        yield sums
