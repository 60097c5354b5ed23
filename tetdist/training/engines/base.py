"""The protocol of all engines, and what they share.

A step is ``accumulation`` micro-batches, each ``forward`` then ``backward``; then ``update``
averages the gradients over micro-batches and processes, clips them and applies them, unless a
gradient is not finite, in which case no process changes a parameter. Whether it was is a tensor on
the device: the host does not wait for it.

The optimiser's state leaves and enters an engine in one form, that of torch: whole tensors, one a
parameter. So a checkpoint of any engine and ZeRO stage continues on any other, and on any number
of processes.
"""

import contextlib
from collections.abc import Iterator
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from tetdist.config.schema import RunConfig
from tetdist.config.sections.training import SegmentsSection
from tetdist.distributed.overlap import Earlier, OverlappedMean, join
from tetdist.distributed.world import World
from tetdist.nn.precision import LOW_PRECISION
from tetdist.training.engines.clipping import Clipping


class Update(NamedTuple):
    """The outcome of an update, as tensors on the device.

    Attributes:
        grad_norm: Norm of the averaged gradient before clipping, ().
        applied: Whether the gradient was finite and the parameters changed, () bool.
    """

    grad_norm: Tensor
    applied: Tensor


class EngineParts(NamedTuple):
    """Parts that an engine is made of, for one phase.

    Attributes:
        config: Its ``engine``, ``zero_stage``, ``precision``, ``batch``, ``gradient_clipping`` and
            ``clip_mode`` are read.
        model: On its device, the same on every process.
        optimizer: From `make_optimizer`.
        accumulation: Micro-batches that this process contributes to each step.
        world: All processes.
    """

    config: RunConfig
    model: nn.Module
    optimizer: torch.optim.Optimizer
    accumulation: int
    world: World


class Engine(Protocol):
    loss_scale: "LossScale | None"

    def forward(self, images: Tensor) -> Tensor:
        """Logits per timestep, (T, B, K), in the configured precision."""

    def backward(self, loss: Tensor) -> None:
        """Add this micro-batch's gradient."""

    def update(self, lr: float) -> Update:
        """Apply the average gradient of the step's micro-batches, with learning rate ``lr``."""

    def optimizer_state(self) -> dict[str, Any]:
        """Return what `torch.optim.Optimizer.state_dict` does; called on every process together."""

    def load_optimizer_state(self, state: dict[str, Any]) -> None:
        """Take over what `optimizer_state` of any engine returned."""

    def close(self) -> None:
        """Let go of the model, which another engine may take over."""


class LossScale:
    """Dynamic loss scaling for float16, whose smallest gradients would else be zeros.

    The host knows it, and not the device alone: a step whose gradient overflowed is taken again
    with half the scale.

    Attributes:
        value: What the loss is multiplied by before its backward pass.
        good_steps: Steps without an overflow since the value last changed.
        overflows: How often a step was taken again, in all.
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
        """The value on a device, (), in the same memory always, where a CUDA graph reads it."""
        if self._factor is None:
            self._factor = torch.full((), self._value, device=device)
        return self._factor

    @classmethod
    def of(cls, precision: str) -> "LossScale | None":
        """Make the one that a configured precision needs, if it needs one."""
        return cls() if LOW_PRECISION[precision] == torch.float16 else None

    def succeeded(self) -> None:
        self.good_steps += 1
        if self.good_steps == self.GROWTH_INTERVAL:
            self.value, self.good_steps = self.value * 2, 0

    def overflowed(self) -> bool:
        """Halve the scale; False where it is 1 already, so that the scale is not to blame."""
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


def lay_out(model: nn.Module, memory_format: torch.memory_format) -> None:
    model.to(memory_format=memory_format)  # type: ignore[call-overload]  # torch's stub lacks it


class GradientMean:
    """The sum of a step's gradients over its micro-batches, and their average over all processes.

    On GPUs, and on CPUs of several hosts, the average is formed while the last micro-batch's
    backward pass is still under way. Not where blocks run over segments of timesteps: there a
    parameter's gradient comes in several parts, and nobody knows which is the last. Nor with CUDA
    graphs, which do the same for each micro-batch. Their averages are formed at the end, in the
    same buckets, since more than two numbers are added up in an order that depends on the bucket.
    """

    def __init__(
        self, config: RunConfig, optimizer: torch.optim.Optimizer, world: World, accumulation: int
    ) -> None:
        self._world, self._accumulation, self._backward_passes = world, accumulation, 0
        self._parameters = [p for group in optimizer.param_groups for p in group["params"]]
        self._overlapped: OverlappedMean | None = None
        self._overlaps = (
            not isinstance(config.recompute, SegmentsSection) and not config.cuda_graphs
        )
        if world.world_size > 1 and world.shared is None:
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
            self._overlapped.finish()
        else:
            self._world.mean_all_(grads)
        return grads

    def close(self) -> None:
        if self._overlapped is not None:
            self._overlapped.close()


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Set the learning rate of all groups; those of a layer have a share of it (`layer_decay`)."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("lr_scale", 1.0)


def tell(optimizer: torch.optim.Optimizer, lr: float, apply: Tensor) -> None:
    set_lr(optimizer, lr)
    # So torch's GradScaler tells fused optimisers to leave everything as it is; they read the
    # attributes by name, and nothing declares them.
    optimizer.found_inf = (~apply).to(torch.float32)  # type: ignore[attr-defined]  # see above
    optimizer.grad_scale = None  # type: ignore[attr-defined]  # see above


class WholeEngine:
    """Parts of the engines in which each process has all gradients and the optimiser's whole state.

    A subclass runs a backward pass and the optimiser's step in its own way.
    """

    def __init__(self, parts: EngineParts) -> None:
        config, model, optimizer, accumulation, world = parts
        self.optimizer, self.clipping = optimizer, Clipping(config, model)
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
        self.clipping(grads, norm)
        applied = torch.isfinite(norm)
        tell(self.optimizer, lr, applied)
        self._step()
        return Update(norm, applied)

    def optimizer_state(self) -> dict[str, Any]:
        return self.optimizer.state_dict()

    def load_optimizer_state(self, state: dict[str, Any]) -> None:
        self.optimizer.load_state_dict(state)
        for parameter, values in self.optimizer.state.items():
            for key, value in values.items():
                if torch.is_tensor(value) and value.shape == parameter.shape:
                    # It takes the parameter's memory layout, which another engine's state may not
                    # have: fused kernels go through both in the order of memory, and would pair
                    # the wrong elements.
                    values[key] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)

    def close(self) -> None:
        self.mean.close()


def _start_momentum(optimizer: torch.optim.SGD) -> None:
    """Begin SGD's momentum at 0, from which its first step is the same.

    Left to itself torch allocates it at the first step, and if that step is given up, leaves it
    with whatever was in memory.
    """
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if group["momentum"]:
                optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
