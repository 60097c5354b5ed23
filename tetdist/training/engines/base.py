"""The protocol of all engines, and what they share.

A step is ``accumulation`` micro-batches, each ``forward`` then ``backward``; then ``update``
averages the gradients over micro-batches and processes, clips and applies them. If a gradient is
not finite, no process changes a parameter; this flag stays a tensor on the device, so that the host
does not wait for it.

Engines export and import the optimiser's state in torch's form: whole tensors, one per parameter.
So a checkpoint of any engine and ZeRO stage resumes on any other, with any number of processes.
"""

import contextlib
from collections.abc import Iterator
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from tetdist.buffers import copy_to_host
from tetdist.config.schema import RunConfig
from tetdist.config.sections.training import SegmentsSection
from tetdist.distributed.overlap import Earlier, OverlappedMean, join
from tetdist.distributed.world import World
from tetdist.nn.precision import LOW_PRECISION, lay_out


class Update(NamedTuple):
    """The outcome of an update, as tensors on the device.

    Attributes:
        grad_norm: Norm of the averaged gradient before clipping, ().
        applied: True if the gradient was finite and the parameters changed, () bool.
    """

    grad_norm: Tensor
    applied: Tensor


class EngineParts(NamedTuple):
    """Parts that an engine is made of, for one phase.

    Attributes:
        config: The run's; ``engine``, ``zero_stage``, ``precision``, ``batch`` and
            ``gradient_clipping`` are read.
        model: The model, on its device and the same on every process.
        accumulation: Micro-batches that this process contributes to each step.
    """

    config: RunConfig
    model: nn.Module
    optimizer: torch.optim.Optimizer
    accumulation: int
    world: World


class Engine(Protocol):
    loss_scale: "LossScale | None"

    def forward(self, images: Tensor) -> Tensor:
        """Return logits per timestep, (T, B, K), computed in the configured precision."""

    def backward(self, loss: Tensor) -> None:
        """Add this micro-batch's gradient."""

    def update(self, lr: float) -> Update:
        """Apply the average gradient of the step's micro-batches, with learning rate ``lr``."""

    def optimizer_state(self) -> dict[str, Any]:
        """Return a copy of the state on the host, as `torch.optim.Optimizer.state_dict` has it.

        Call it on all processes; only rank 0 gets the state. See `copy_to_host`.
        """

    def load_optimizer_state(self, state: dict[str, Any]) -> None:
        """Load what `optimizer_state` of any engine returned."""

    def close(self) -> None:
        """Release the model, so that another engine may use it."""


class LossScale:
    """Dynamic loss scaling for float16, whose smallest gradients would otherwise round to zero.

    The host keeps the scale, too: it repeats a step whose gradient overflowed, with half the scale.

    Attributes:
        value: Factor that the loss is multiplied by before its backward pass.
        good_steps: Steps without an overflow since the value last changed.
        overflows: Total number of repeated steps.
    """

    START, GROWTH_INTERVAL = 2.0**16, 2000
    _value: float
    _factor: Tensor | None

    def __init__(self) -> None:
        self._value, self._factor = self.START, None
        self.good_steps = self.overflows = 0

    @property
    def value(self) -> float:
        return self._value

    @value.setter
    def value(self, value: float) -> None:
        self._value = value
        if self._factor is not None:
            self._factor.fill_(value)

    def factor(self, device: torch.device) -> Tensor:
        """Return the value on a device, (), always in the same memory, for CUDA graphs."""
        if self._factor is None:
            self._factor = torch.full((), self._value, device=device)
        return self._factor

    @classmethod
    def of(cls, precision: str) -> "LossScale | None":
        """Make the loss scale that a precision needs, if any."""
        return cls() if LOW_PRECISION[precision] == torch.float16 else None

    def succeeded(self) -> None:
        self.good_steps += 1
        if self.good_steps == self.GROWTH_INTERVAL:
            self.value, self.good_steps = self.value * 2, 0

    def overflowed(self) -> bool:
        """Halve the scale; return False if it is already 1, so that it is not the cause."""
        if self.value <= 1:
            return False
        self.overflows += 1
        self.value, self.good_steps = self.value / 2, 0
        return True

    def state_dict(self) -> dict[str, float]:
        return {name: getattr(self, name) for name in ("value", "good_steps", "overflows")}

    def load_state_dict(self, state: dict[str, float]) -> None:
        self.value = float(state["value"])
        self.good_steps, self.overflows = int(state["good_steps"]), int(state["overflows"])


class GradientMean:
    """The sum of a step's gradients over its micro-batches, and their average over all processes.

    Averaging overlaps the last micro-batch's backward pass. It does not where blocks run over
    segments of timesteps, since there a parameter's gradient arrives in an unknown number of parts,
    nor with CUDA graphs, which do the same for each micro-batch. Then averaging follows at the end,
    in the same buckets, since the order of adding more than two numbers depends on the bucket.
    """

    def __init__(
        self, config: RunConfig, optimizer: torch.optim.Optimizer, world: World, accumulation: int
    ) -> None:
        self._waiting = world.waiting
        self._accumulation, self._backward_passes = accumulation, 0
        self._parameters = [p for group in optimizer.param_groups for p in group["params"]]
        self._overlapped: OverlappedMean | None = None
        self._overlaps = (
            not isinstance(config.recompute, SegmentsSection) and not config.cuda_graphs
        )
        if world.world_size > 1:
            self._overlapped = OverlappedMean(self._parameters, world.world_size)

    @contextlib.contextmanager
    def backward_pass(self) -> Iterator[None]:
        """Add up the gradients of a micro-batch's backward pass, which runs in this context."""
        earlier: Earlier = {p: p.grad for p in self._parameters if p.grad is not None}
        for parameter in earlier:
            parameter.grad = None
        self._backward_passes += 1
        if self._overlapped is not None:
            self._overlapped.earlier = earlier
            is_last = self._backward_passes == self._accumulation
            self._overlapped.active = self._overlaps and is_last
        yield
        join(self._parameters, earlier)

    def average(self) -> list[Tensor]:
        """Average the step's gradients in place; return them."""
        self._backward_passes = 0
        grads = [p.grad for p in self._parameters if p.grad is not None]
        if self._overlapped is not None:
            with self._waiting.measured():
                self._overlapped.finish()
        return grads

    def close(self) -> None:
        if self._overlapped is not None:
            self._overlapped.close()


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Set the learning rate of all groups, scaled for groups of a layer (`layer_decay`)."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("lr_scale", 1.0)


def prepare_step(optimizer: torch.optim.Optimizer, lr: float, apply: Tensor) -> None:
    set_lr(optimizer, lr)
    # torch's GradScaler makes fused optimisers skip a step through these attributes, which they
    # read by name and which nothing declares.
    optimizer.found_inf = (~apply).to(torch.float32)  # type: ignore[attr-defined]  # torch reads it
    optimizer.grad_scale = None  # type: ignore[attr-defined]  # torch reads it


class WholeEngine:
    """Base of engines in which each process has all gradients and the whole optimiser state.

    Subclasses implement the backward pass and the optimiser's step.
    """

    def __init__(self, parts: EngineParts) -> None:
        config, model, optimizer, accumulation, world = parts
        self.world, self.optimizer = world, optimizer
        self.clipping = config.gradient_clipping
        self.loss_scale = LossScale.of(config.precision)
        self.mean = GradientMean(config, optimizer, world, accumulation)
        lay_out(model, torch.channels_last)
        if isinstance(optimizer, torch.optim.SGD):
            _start_momentum(optimizer)

    def _run_backward(self, loss: Tensor) -> None:
        raise NotImplementedError  # Each engine has its own.

    def _step(self) -> None:
        raise NotImplementedError  # Each engine has its own.

    def backward(self, loss: Tensor) -> None:
        if self.loss_scale is not None:
            loss = loss * self.loss_scale.factor(loss.device)
        with self.mean.backward_pass():
            self._run_backward(loss)

    def update(self, lr: float) -> Update:
        grads = self.mean.average()
        if self.loss_scale is not None:
            torch._foreach_mul_(grads, 1 / self.loss_scale.value)
        norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(grads)))
        if self.clipping is not None:
            # In place, and without synchronising with the device.
            torch._foreach_mul_(grads, (self.clipping / (norm + 1e-6)).clamp(max=1.0))
        applied = torch.isfinite(norm)
        prepare_step(self.optimizer, lr, applied)
        self._step()
        return Update(norm, applied)

    def optimizer_state(self) -> dict[str, Any]:
        return copy_to_host(self.optimizer.state_dict()) if self.world.rank == 0 else {}

    def load_optimizer_state(self, state: dict[str, Any]) -> None:
        self.optimizer.load_state_dict(state)
        for parameter, values in self.optimizer.state.items():
            for key, value in values.items():
                if torch.is_tensor(value) and value.shape == parameter.shape:
                    # Give it the parameter's memory layout, which another engine's state may lack:
                    # fused kernels walk both in memory order and would pair the wrong elements.
                    values[key] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)
                elif key in ("exp_avg", "exp_avg_sq", "momentum_buffer") and value is not None:
                    raise ValueError(f"{key} is {tuple(value.shape)}, not {tuple(parameter.shape)}")

    def close(self) -> None:
        self.mean.close()


def _start_momentum(optimizer: torch.optim.SGD) -> None:
    """Initialise SGD's momentum with 0, which gives the same first step.

    By default torch allocates it at the first step; if that step is skipped, the memory stays
    uninitialised.
    """
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if group["momentum"]:
                optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
