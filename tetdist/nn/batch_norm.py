"""Batch normalisation over micro-batch x time, with deferred running statistics.

Plain batch norm and the threshold-dependent one (tdBN, Zheng et al., AAAI 2021) are one module:
tdBN multiplies the normalised current by ``alpha * V_th``, so that it has the scale of the
threshold, with ``alpha = 1/sqrt(2)`` where two branches are added.

In an ordinary training loop the running statistics are updated at every forward pass, as usual.
tetdist's trainer defers that (`defer_running_statistics`): each forward pass adds its batch mean
and variance to an accumulator, and one `update_running_statistics` per optimiser step updates the
running values once, with the average over all micro-batches of all processes. So they are the same
on all processes, depend neither on the number of processes nor on gradient accumulation, and do not
count a forward pass twice that activation checkpointing repeats.
"""

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any, Self

import torch
from torch import Tensor, nn

from tetdist.errors import UserError
from tetdist.nn.precision import wide_type

_recomputation = threading.local()


@contextlib.contextmanager
def recomputing() -> Iterator[None]:
    """Treat forward passes in this context as repetitions, which add nothing to statistics."""
    outer = is_repetition()
    _recomputation.active = True
    try:
        yield
    finally:
        _recomputation.active = outer


def is_repetition() -> bool:
    """Return whether this is within `recomputing`."""
    return getattr(_recomputation, "active", False)


class _CannotConvert(UserError, AttributeError):
    """A norm has no attribute that functions read which convert norms."""

    def __init__(self) -> None:
        super().__init__(
            "tetdist's batch norm runs inside fused layers and cannot be converted; to synchronise "
            "it, set batch_norm.sync=true or call tetdist.nn.batch_norm.synchronize; to freeze it "
            "with timm, pass include_bn_running_stats=False"
        )


class RunningState(nn.Module):
    """A layer with values that run after those of its forward passes in training.

    Attributes:
        momentum: Weight of the newest values in the running ones.
        pending_count: Number of forward passes recorded since the last update.
        deferred: True if `update_running_statistics` updates; otherwise each forward pass does.
        frozen: True if the values stay as they are (`tetdist.models.freeze`).
    """

    momentum: float
    pending_count: int = 0
    deferred: bool = False
    frozen: bool = False

    def sums_and_running(self) -> list[tuple[Tensor, Tensor]]:
        """Return vectors of the sums of what was recorded, each with its running values."""
        raise NotImplementedError  # Each layer has its own.

    def train(self, mode: bool = True) -> Self:
        """Change to training mode, unless the layer is frozen."""
        return super().train(mode and not self.frozen)

    @torch.no_grad()
    def recorded(self) -> None:
        """Record that a forward pass was added to the sums."""
        self.pending_count += 1
        if not self.deferred:
            for total, running in self.sums_and_running():
                running.lerp_(total / self.pending_count, self.momentum)
            self.discard()

    def discard(self) -> None:
        """Discard what was recorded since the last update."""
        for total, _ in self.sums_and_running():
            total.zero_()
        self.pending_count = 0


class RunningMean(RunningState):
    """Running mean of a value of your own, such as a firing rate, for networks that keep a state.

    The trainer updates it once a step, with the average of all micro-batches of all processes.

    Args:
        initial: The mean before training; each recorded value has its shape.
        momentum: Weight of the newest value.
    """

    mean: Tensor
    pending: Tensor

    def __init__(self, initial: Tensor, *, momentum: float = 0.1) -> None:
        super().__init__()
        self.shape, self.momentum = initial.shape, momentum
        self.register_buffer("mean", initial.flatten().clone())
        self.register_buffer("pending", torch.zeros_like(self.mean), persistent=False)

    def sums_and_running(self) -> list[tuple[Tensor, Tensor]]:
        return [(self.pending, self.mean)]

    def forward(self, value: Tensor) -> Tensor:
        """Record a value in training; return the mean, without it, as it is before this step."""
        mean = self.mean.clone().view(self.shape)
        if self.training and not is_repetition():
            self.pending += value.detach().expand(self.shape).flatten()
            self.recorded()
        return mean


class BatchNorm(RunningState, nn.BatchNorm2d):
    """Batch norm of a current (T, B, C, H, W) per channel, over T, B, H and W jointly.

    It is torch's by class, but without ``num_features``. Functions of torch and timm that
    synchronise, split or freeze batch norms silently skip classes that are not torch's, and make
    the converted norm from this attribute; so they are refused.

    Args:
        scale: Factor on the normalised current before weight and bias: ``alpha * V_th`` for tdBN, 1
            for plain batch norm. It is a constant, not folded into the initial weight, so that
            weight decay pulls towards the same network for any threshold.
        momentum: Weight of the newest statistics in the running ones.
    """

    weight: nn.Parameter
    bias: nn.Parameter
    running_mean: Tensor
    running_var: Tensor
    momentum: float
    pending_mean: Tensor
    pending_var: Tensor

    def __init__(
        self, num_channels: int, *, scale: float = 1.0, eps: float = 1e-5, momentum: float = 0.1
    ) -> None:
        # Without torch's running statistics, whose state has num_batches_tracked, too.
        super().__init__(num_channels, eps, momentum, track_running_stats=False)
        del self.num_features
        self.num_channels, self.scale = num_channels, scale
        self.register_buffer("running_mean", torch.zeros(num_channels))
        self.register_buffer("running_var", torch.ones(num_channels))
        self.register_buffer("pending_mean", torch.zeros(num_channels), persistent=False)
        self.register_buffer("pending_var", torch.zeros(num_channels), persistent=False)
        # See synchronize().
        self.average: Callable[[Tensor], Tensor] | None = None
        self.num_processes = 1

    def __getattr__(self, name: str) -> Any:
        if name == "num_features":
            raise _CannotConvert
        return super().__getattr__(name)

    def sums_and_running(self) -> list[tuple[Tensor, Tensor]]:
        return [(self.pending_mean, self.running_mean), (self.pending_var, self.running_var)]

    def forward(self, current: Tensor, copies: int = 1) -> Tensor:
        """Normalise (T, B, C, H, W), or (N, C, H, W) of a network that folds time into its batch;
        compute in at least float32, return the current's type.

        ``copies`` is the number of equal timesteps that each given one stands for: T if a static
        image's (1, B, C, H, W) serves all. The running variance counts them.
        """
        x = current.to(wide_type(current))
        if self.training:
            mean, var = self.over_processes(*batch_statistics(x))
            self.record(mean, var, copies * x.numel() // self.num_channels)
        else:
            mean, var = self.running_mean, self.running_var
        gain, offset = self.gain_and_offset(mean, var)
        y = x * gain.view(-1, 1, 1) + offset.view(-1, 1, 1)
        return y.to(current.dtype)

    def over_processes(self, mean: Tensor, var: Tensor) -> tuple[Tensor, Tensor]:
        """Return the statistics of all processes' values, each (C,), from this one's."""
        if self.average is None:
            return mean, var
        # In float64, so that subtracting the squared mean from the mean square loses nothing.
        mean64, var64 = mean.double(), var.double()
        moments = torch.stack([mean64, var64 + mean64.square()])
        mean64, square = _AverageOverProcesses.apply(moments, self.average)
        return mean64.to(mean.dtype), (square - mean64.square()).to(var.dtype)

    def gain_and_offset(self, mean: Tensor, var: Tensor) -> tuple[Tensor, Tensor]:
        """Return gain and offset, each (C,), such that the output is ``gain * x + offset``."""
        gain = self.scale * self.weight * torch.rsqrt(var + self.eps)
        return gain, self.bias - gain * mean

    @torch.no_grad()
    def record(self, mean: Tensor, var: Tensor, num_values: int) -> None:
        """Add one batch's mean and (biased) variance, each (C,), to the running statistics.

        ``num_values``: number of this process's values, including copies of a static image's.
        """
        if is_repetition():
            return
        num_values *= self.num_processes
        self.pending_mean += mean
        # The running variance is the unbiased estimate, as in torch.
        self.pending_var += var * (num_values / max(num_values - 1, 1))
        self.recorded()

    def extra_repr(self) -> str:
        return f"{self.num_channels}, scale={self.scale:.4g}, momentum={self.momentum}"


def batch_statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and biased variance per channel, each (C,), of (..., C, H, W)."""
    var, mean = torch.var_mean(x, dim=(*range(x.ndim - 3), -2, -1), correction=0)
    return mean, var


class _AverageOverProcesses(torch.autograd.Function):
    """Mean over processes; the differentiated loss is the sum of all processes' losses."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, average: Callable[[Tensor], Tensor]) -> Tensor:
        ctx.average = average
        return average(x.clone())

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None]:
        return ctx.average(grad_outputs[0].clone()), None


def synchronize(
    model: nn.Module, average_over_ranks: Callable[[Tensor], Tensor], num_processes: int
) -> None:
    """Make batch norms normalise over the values of all processes in training.

    Each of ``num_processes`` must run the same forward and backward passes, with equal batch sizes.

    Args:
        average_over_ranks: Maps a tensor, in place, to its mean over all processes.
    """
    for norm in (module for module in model.modules() if isinstance(module, BatchNorm)):
        norm.average, norm.num_processes = average_over_ranks, num_processes


def running_states(model: nn.Module) -> list[RunningState]:
    """Return a model's batch norms and other layers with running values."""
    return [module for module in model.modules() if isinstance(module, RunningState)]


def defer_running_statistics(model: nn.Module) -> None:
    """Defer the running statistics until `update_running_statistics` is called."""
    for state in running_states(model):
        state.deferred = True


@torch.no_grad()
def update_running_statistics(
    model: nn.Module,
    average_over_ranks: Callable[[Tensor], Tensor],
    apply: Tensor | None = None,
) -> None:
    """Update all running statistics: call it once per optimiser step, on every process.

    Args:
        model: Model; its forward passes since the last call are averaged. Every process must have
            run the same number of them.
        average_over_ranks: Maps a flat vector to its mean over all processes (one collective
            call for the whole model).
        apply: 0-dimensional bool tensor on the model's device; if False, the step was skipped and
            the statistics stay as they are. Not read on the host.
    """
    states = running_states(model)
    for momentum in {state.momentum: None for state in states}:
        moving = [s for s in states if s.pending_count and s.momentum == momentum]
        if moving:
            _move_all(moving, momentum, average_over_ranks, apply)


def _move_all(
    states: list[RunningState],
    momentum: float,
    average_over_ranks: Callable[[Tensor], Tensor],
    apply: Tensor | None,
) -> None:
    """Update the running values of layers, on a GPU in a few kernels for all of them."""
    moving = [(state, *pair) for state in states for pair in state.sums_and_running()]
    pending = [total for _, total, _ in moving]
    running = [values for _, _, values in moving]
    counts = [float(state.pending_count) for state, *_ in moving]
    sizes = [tensor.numel() for tensor in running]
    averages = average_over_ranks(torch.cat(torch._foreach_div(pending, counts)))
    moved = torch._foreach_lerp(running, averages.split(sizes), momentum)
    if apply is not None:
        moved = torch.where(apply, torch.cat(moved), torch.cat(running)).split(sizes)
    torch._foreach_copy_(running, moved)
    torch._foreach_zero_(pending)
    for state in states:
        state.pending_count = 0
