"""Sharpness of a trained network: its loss around the weights that training found.

A direction moves every filter (a row of a weight of two or more dimensions) by its own norm, and
leaves norms, biases and neurons as they are: filter normalisation, as in Li et al., "Visualizing
the Loss Landscape of Neural Nets" (NeurIPS 2018), whose code names the latter biasbn.

Every loss is the true one, with running statistics recomputed at that point from the same samples.
Spikes jump, so the loss has no Hessian: a curvature is the second difference at a stated step h,
``(L(h d) + L(-h d) - 2 L(0)) / h^2``. Gradients are surrogate ones, in training mode; they only
choose two further directions, along which the true loss is measured as well.
"""

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tetdist import order
from tetdist.buffers import in_one_buffer
from tetdist.config.schema import RunConfig
from tetdist.data.batches import eval_batches
from tetdist.data.dali import Workers
from tetdist.data.transfer import on_device
from tetdist.datasets.index import Index
from tetdist.distributed.world import World
from tetdist.errors import UserError
from tetdist.losses import sdt_loss, tet_loss
from tetdist.models import SpikingNetwork
from tetdist.nn import batch_norm, dropout
from tetdist.nn.precision import autocast, parameter_type
from tetdist.training.objective import compute_loss

# The run's own objective, without a teacher; L_SDT; L_TET without its regulariser.
LOSSES = ("objective", "time_mean", "per_timestep")
POINTS = 21  # of a curve
_MIDDLE, _STEP = POINTS // 2, POINTS // 10  # the trained weights, and the step of a curvature
ITERATIONS = 8  # of the power iteration
Direction = list[Tensor]


class Landscape:
    """Losses of a network on some samples, as functions of its filters; its weights change.

    Args:
        samples: Number of samples, rounded up to whole micro-batches of the training.
        seed: Seed of samples and directions.
        world: All processes; their number only changes the rounding.
        progress: Called once per point or gradient.

    Raises:
        UserError: The split has less than one micro-batch.
    """

    def __init__(
        self,
        model: SpikingNetwork,
        config: RunConfig,
        index: Index,
        samples: int,
        seed: int,
        world: World,
        progress: Callable[[], None] = lambda: None,
    ) -> None:
        self.model, self.config, self.seed, self.world = model, config, seed, world
        self.objective, self.progress = config.loss_of(config.phases[-1]), progress
        micro, data, device = config.batch.micro, config.data, world.device
        if len(index) < micro:
            raise UserError(
                f"the split {index.split} has {len(index)} samples, and running statistics need "
                f"{micro}, a micro-batch of the training; give other data with --data"
            )
        self.samples = min(-(-samples // micro), len(index) // micro) * micro
        chosen = order.permutation(len(index), seed, 0, order.named_stream("landscape"))
        parts = np.split(chosen[: self.samples], self.samples // micro)
        own = parts[world.rank :: world.world_size]
        self.share = len(own) / len(parts)
        workers = Workers(
            device="cpu", device_id=None, threads=data.threads, prefetch=data.prefetch
        )
        kind = parameter_type(config.precision)
        with eval_batches(data, index, own, workers) as loader:
            self.batches = [
                (on_device(batch.images, device, kind), on_device(batch.labels, device))
                for batch in itertools.islice(loader, len(own))
            ]
        for layer in dropout.dropping(model):
            layer.rate = 0.0
        self.filters = [p for p in model.parameters() if p.ndim > 1]
        self.origin = [p.detach().clone() for p in self.filters]
        self.norms = [_norms(weight) for weight in self.origin]
        ends = ("running_mean", "running_var")
        self.statistics = [buffer for name, buffer in model.named_buffers() if name.endswith(ends)]

    def random(self, number: int) -> Direction:
        """Return a random direction; networks of one architecture get the same, up to norms."""
        generator = torch.Generator().manual_seed(order.forward_seed(self.seed, number, 0))
        return self.normalised([torch.randn(w.shape, generator=generator) for w in self.origin])

    def normalised(self, step: Direction) -> Direction:
        """Scale each filter's step to the filter's norm."""
        steps = [part.to(norm) for part, norm in zip(step, self.norms, strict=True)]
        pairs = zip(steps, self.norms, strict=True)
        return [part * (norm / _norms(part)).nan_to_num(0, 0, 0) for part, norm in pairs]

    def steepest(self, gradient: Direction) -> Direction:
        """Return the direction of steepest ascent whose relative changes have squares of sum 1."""
        scaled = [g * n for g, n in zip(gradient, self.norms, strict=True)]
        length = torch.stack([part.double().square().sum() for part in scaled]).sum().sqrt()
        return [part * (n / length).to(n) for part, n in zip(scaled, self.norms, strict=True)]

    def values(self, *steps: tuple[float, Direction]) -> dict[str, float]:
        """Return the `LOSSES` and top-1 after some steps from the trained weights."""
        self._move(*steps)
        device, precision = self.world.device, self.config.precision
        sums = torch.zeros(len(LOSSES) + 1, dtype=torch.float64, device=device)
        with torch.no_grad(), autocast(device, precision):
            if self.statistics:
                inputs = (images for images, _ in self.batches)
                batch_norm.recompute_running_statistics(self.model, inputs)
                # Processes may have different numbers of micro-batches.
                flat, parts = in_one_buffer(self.statistics)
                self.world.sum_(flat.mul_(self.share))
                torch._foreach_copy_(self.statistics, parts)
            for images, labels in self.batches:
                logits = self.model(images, per_timestep=True)
                found = (
                    compute_loss(self.objective, logits, labels),
                    sdt_loss(logits, labels),
                    tet_loss(logits, labels, lambda_=0.0),
                    100 * (logits.mean(0).argmax(-1) == labels).double().mean(),
                )
                sums += torch.stack([value.double() for value in found]) * len(labels)
        means = [total / self.samples for total in self.world.sum(sums.tolist())]
        return dict(zip((*LOSSES, "top1"), means, strict=True))

    def gradient(self, *steps: tuple[float, Direction]) -> Direction:
        """Return the surrogate gradient of L_SDT, with batch norms in training mode."""
        self._move(*steps)
        self.model.train()
        self.model.zero_grad()
        for images, labels in self.batches:
            with autocast(self.world.device, self.config.precision):
                loss = sdt_loss(self.model(images, per_timestep=True), labels)
            (loss * (len(labels) / self.samples)).backward()
        self.model.eval()
        own = [torch.zeros_like(p) if p.grad is None else p.grad for p in self.filters]
        return [self.world.sum_(gradient) for gradient in own]

    def sharpest(self, start: Direction, step: float) -> tuple[Direction, list[float]]:
        """Look for the direction of the largest curvature, by power iteration.

        The product of Hessian and direction is the difference of two surrogate gradients, ``step``
        to either side. Return the best direction, and each iteration's estimated eigenvalue.
        """
        best, estimates = start, list[float]()
        for _ in range(ITERATIONS):
            above, below = (self.gradient((sign * step, start)) for sign in (1, -1))
            product = [(a - b) / (2 * step) for a, b in zip(above, below, strict=True)]
            terms = [(x.double() * y).sum() for x, y in zip(product, start, strict=True)]
            estimates.append(float(sum(terms)))
            best = start if estimates[-1] == max(estimates) else best
            start = self.steepest(product)
        return best, estimates

    @torch.no_grad()
    def _move(self, *steps: tuple[float, Direction]) -> None:
        for i, (parameter, weight) in enumerate(zip(self.filters, self.origin, strict=True)):
            parameter.copy_(sum((size * step[i] for size, step in steps), weight))
        self.progress()


def _norms(weight: Tensor) -> Tensor:
    """Return the norm of each filter, (F, 1, ...)."""
    return weight.flatten(1).norm(dim=1).view(-1, *(1,) * (weight.ndim - 1))


def evaluations(directions: int, grid: int) -> int:
    """Return the number of points and gradients of `measure`."""
    return 1 + (directions + 2) * (POINTS - 1) + grid**2 + 2 * ITERATIONS + 1


def measure(landscape: Landscape, directions: int, radius: float, grid: int) -> dict[str, Any]:
    """Measure curves along random directions and two chosen by surrogate gradients, a grid in the
    plane of the first two (0: none), and the sharpness of each loss."""
    positions = np.linspace(-radius, radius, POINTS).tolist()
    center = landscape.values()

    def curve(direction: Direction) -> dict[str, list[float]]:
        found = [landscape.values((at, direction)) if at else center for at in positions]
        return {key: [point[key] for point in found] for key in center}

    curves = {str(k): curve(landscape.random(k)) for k in range(directions)}
    gradient = landscape.gradient()
    curves["ascent"] = curve(landscape.normalised(gradient))
    start = landscape.steepest(gradient)
    sharpest, estimates = landscape.sharpest(start, radius * _STEP / _MIDDLE)
    curves["sharpest"] = curve(sharpest)
    along, x, y = np.linspace(-radius, radius, grid).tolist(), *map(landscape.random, (0, 1))
    points = [[landscape.values((a, x), (b, y)) for a in along] for b in along]
    return {
        "samples": landscape.samples,
        "center": center,
        "sharpness": {
            loss: sharpness(np.array([found[loss] for found in curves.values()]), radius)
            for loss in LOSSES
        },
        "surrogate_eigenvalues": estimates,
        "curves": curves,
        "surface": {key: [[p[key] for p in row] for row in points] for key in center if grid},
    }


def sharpness(curves: np.ndarray, radius: float) -> dict[str, float]:
    """Summarise a loss along all directions, of which the last two are ascent and sharpest.

    ``rise``: at the radius, mean of both ways of random directions; ``curvature``: mean of random
    directions; ``worst_rise``: the largest of any point, a lower bound on that within the radius;
    ``eigenvalue``: curvature of the sharpest direction, a lower bound on the largest at its step.
    """
    rises = curves - curves[0, _MIDDLE]
    edges = (rises[:-2, 0] + rises[:-2, -1]) / 2
    bends = (rises[:, _MIDDLE + _STEP] + rises[:, _MIDDLE - _STEP]) / (
        radius * _STEP / _MIDDLE
    ) ** 2
    return {
        "loss": float(curves[0, _MIDDLE]),
        "rise": float(edges.mean()),
        "rise_std": float(edges.std(ddof=1)),
        "worst_rise": float(rises.max()),
        "curvature": float(bends[:-2].mean()),
        "curvature_std": float(bends[:-2].std(ddof=1)),
        "eigenvalue": float(bends[-1]),
    }
