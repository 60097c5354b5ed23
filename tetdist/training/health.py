"""Detection of training that goes wrong without an error.

Steps whose loss or gradient is not finite are counted, and examined if they do not stop. Layers
that no longer fire, or always do, are reported.
"""

import math
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from tetdist.errors import UserError
from tetdist.nn.batch_norm import BatchNorm, RunningState
from tetdist.nn.norm_neuron import FusedLayer
from tetdist.plugins import imported_modules
from tetdist.wording import counted

LIMIT = 5  # non-finite steps in a row that end a run


class NonFiniteSteps:
    """A count of skipped steps, kept on the device so that the host need not wait for it.

    All processes have the same count, since they agree about each step.
    """

    def __init__(self, device: torch.device) -> None:
        self._in_a_row, self._reached_at, self._total, self._reported = torch.zeros(
            4, dtype=torch.int64, device=device
        )

    def record(self, step: int, applied: Tensor) -> None:
        """Count a step (from 1); ``applied``, () bool, is `Update.applied`."""
        self._in_a_row = torch.where(applied, 0, self._in_a_row + 1)
        reached = (self._in_a_row >= LIMIT) & (self._reached_at == 0)
        self._reached_at = torch.where(reached, step, self._reached_at)
        self._total = self._total + ~applied

    @property
    def limit_reached_at(self) -> int:
        """The step that was the fifth in a row; 0 if none. Synchronises with the device."""
        return int(self._reached_at)

    def new(self) -> int:
        """Return the number of such steps since the last call."""
        count = int(self._total - self._reported)
        self._reported = self._total
        return count

    def fail(
        self, lr: float, reports: list[str | None], saved_step: int | None, checkpoints: Path
    ) -> None:
        """End a run that had too many such steps in a row.

        Args:
            reports: Each rank's examination of that step; None if everything was finite.

        Raises:
            UserError: Always.
        """
        findings = [f"Rank {rank}: {text}" for rank, text in enumerate(reports) if text]
        if not findings:
            findings = ["Repeated, it is finite on all processes: a device may be faulty"]
        saved = "no checkpoint has been saved yet"
        if saved_step is not None:
            saved = f"the last checkpoint is of step {saved_step}, in {checkpoints}"
        advice = (
            "Try a smaller phases.*.optimizer.lr, a warm-up (phases.*.warmup_epochs) or "
            "gradient_clipping"
        )
        if self.limit_reached_at == LIMIT:
            own = (str(module.__file__) for module in imported_modules())
            parts = " and at ".join(["the samples and the initial weights", *own])
            advice = f"No step has changed a weight, whatever the learning rate: look at {parts}"
        raise UserError(
            f"the loss or its gradient was not finite in {counted(LIMIT, 'step')} in a row, last "
            f"at step {self.limit_reached_at} (learning rate {lr:.4g}). They changed no weight, "
            f"and {saved}. {'; '.join(findings)}. {advice}"
        )

    def state_dict(self) -> dict[str, int]:
        return {
            "in_a_row": int(self._in_a_row),
            "total": int(self._total),
            "reported": int(self._reported),
        }

    def load_state_dict(self, state: dict[str, int]) -> None:
        device = self._total.device
        self._in_a_row, self._total, self._reported = (
            torch.tensor(state[key], device=device) for key in ("in_a_row", "total", "reported")
        )


@dataclass(frozen=True)
class Examination:
    """One process's findings for the samples of one step.

    Attributes:
        first: First layer with a non-finite output, or None.
        gradients: Layers sorted by the norm of their gradient, largest (or not finite) first.
        weights: Layers sorted by the norm of their weights, largest (or not finite) first.
    """

    losses: list[float]
    first: str | None
    gradients: list[tuple[str, float]]
    weights: list[tuple[str, float]]

    @property
    def is_finite(self) -> bool:
        norms = [norm for _, norm in self.gradients]
        return all(map(math.isfinite, [*self.losses, *norms]))

    def __str__(self) -> str:
        def shown(pairs: list[tuple[str, float]]) -> str:
            return ", ".join(f"{name} {norm:.3g}" for name, norm in pairs[:3])

        where = f"; the first layer with a non-finite output is {self.first}" if self.first else ""
        worst = max(self.losses, key=lambda loss: loss if math.isfinite(loss) else math.inf)
        return (
            f"loss {worst:.3g}{where}; largest gradients {shown(self.gradients)}; "
            f"largest weights {shown(self.weights)}"
        )


def examine(
    model: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    loss: Callable[[Tensor, Tensor], Tensor],
) -> Examination:
    """Run the micro-batches of a step again and check every layer.

    Args:
        model: The model, in training mode; only pending statistics change.
        batches: Images and labels of each micro-batch of this process.
    """
    first: str | None = None

    def look(name: str) -> Callable[[nn.Module, object, object], None]:
        def hook(_module: nn.Module, _inputs: object, output: object) -> None:
            nonlocal first
            if first is None and torch.is_tensor(output) and not torch.isfinite(output).all():
                first = name

        return hook

    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    sums = [torch.zeros_like(p) for _, p in named]
    losses: list[float] = []
    with ExitStack() as stack:
        for name, module in model.named_modules():
            if isinstance(module, (nn.Conv2d, nn.Linear, BatchNorm, FusedLayer)):
                stack.enter_context(module.register_forward_hook(look(name)))
            if isinstance(module, RunningState):
                stack.callback(module.discard)
        for images, labels in batches:
            value = loss(images, labels)
            losses.append(float(value.detach()))
            gradients = torch.autograd.grad(value, [p for _, p in named], allow_unused=True)
            for total, gradient in zip(sums, gradients, strict=True):
                if gradient is not None:
                    total += gradient
    names = [name for name, _ in named]
    return Examination(
        losses, first, _largest(names, sums), _largest(names, [p.detach() for _, p in named])
    )


def _largest(names: list[str], tensors: list[Tensor]) -> list[tuple[str, float]]:
    norms = [
        (name, float(tensor.double().norm())) for name, tensor in zip(names, tensors, strict=True)
    ]
    return sorted(norms, key=lambda pair: -pair[1] if math.isfinite(pair[1]) else -math.inf)
