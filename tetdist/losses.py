"""Losses on per-timestep logits: SDT, the direct one, TET (Deng et al., ICLR 2022), distillation.

All are computed in float32 (float64 for float64 logits), outside autocast, whatever the
network's precision.
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from tetdist.errors import UserError
from tetdist.plugins import Registry

if TYPE_CHECKING:
    from tetdist.config.schema import LossSection


@dataclass(frozen=True)
class Loss:
    """A loss that `loss.kind` may name.

    Attributes:
        function: Makes the loss, (), of logits (T, B, K) and targets, labels (B,) or shares of the
            classes (B, K). Its keyword arguments are ``lambda_``, ``phi`` and ``label_smoothing``,
            if it has them, and those of ``loss.arguments``.
        of_time_mean: Whether it sees the logits' mean over time alone; distillation then does, too.
    """

    function: Callable[..., Tensor]
    of_time_mean: bool = False

    @property
    def arguments(self) -> list[str]:
        """Names of the function's keyword arguments."""
        parameters = inspect.signature(self.function).parameters.values()
        return [one.name for one in parameters if one.kind is inspect.Parameter.KEYWORD_ONLY]


LOSSES: Registry[Loss] = Registry("loss", "loss.kind")


def register_loss(
    name: str, *, of_time_mean: bool = False
) -> Callable[[Callable[..., Tensor]], Callable[..., Tensor]]:
    """Make a decorator that enters a function into `LOSSES`; see `Loss`."""

    def enter(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        LOSSES.enter(name, Loss(function, of_time_mean), function.__module__)
        return function

    return enter


def compute_loss(
    settings: "LossSection", logits: Tensor, targets: Tensor, teacher_logits: Tensor | None = None
) -> Tensor:
    """Compute the configured loss, ().

    Args:
        settings: The section ``loss`` of the configuration.
        logits: Output before softmax at each timestep, (T, B, K).
        targets: Class numbers, (B,), int64, or shares of the classes, (B, K).
        teacher_logits: A teacher's, (B, K), where there is one.
    """
    loss = LOSSES[settings.kind]
    given = {
        "lambda_": settings.lambda_,
        "phi": settings.phi,
        "label_smoothing": settings.label_smoothing,
    }
    known = {name: value for name, value in given.items() if name in loss.arguments}
    total = loss.function(logits, targets, **known, **settings.arguments)
    if total.ndim:
        raise UserError(
            f"loss.kind: {settings.kind} has the shape {tuple(total.shape)}, not (); take the mean"
        )
    distillation = settings.distillation
    learning = logits.mean(0, keepdim=True) if loss.of_time_mean else logits
    if teacher_logits is not None:
        divergence = distillation_loss(
            learning, teacher_logits, temperature=distillation.temperature
        )
        total = total + distillation.weight * divergence
    if distillation.self_weight:
        divergence = self_distillation_loss(learning, temperature=distillation.temperature)
        total = total + distillation.self_weight * divergence
    return total


def _full_precision(logits: Tensor) -> Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


@register_loss("sdt", of_time_mean=True)
def sdt_loss(logits: Tensor, target: Tensor, *, label_smoothing: float = 0.0) -> Tensor:
    """Standard direct training: cross-entropy of the time-mean of the logits (paper, eq. 7).

    Args:
        logits: Output before softmax at each timestep, (T, B, K).
        target: Class numbers, (B,), int64, or shares of the classes, (B, K).
        label_smoothing: Share of the target spread evenly over all classes, in [0, 1).
    """
    mean_over_time = _full_precision(logits).mean(0)
    return F.cross_entropy(mean_over_time, target, label_smoothing=label_smoothing)


@register_loss("tet")
def tet_loss(
    logits: Tensor,
    target: Tensor,
    *,
    lambda_: float,
    phi: float = 1.0,
    label_smoothing: float = 0.0,
) -> Tensor:
    """Temporal efficient training (paper, equations 9 to 13).

    ``(1 - lambda) * mean_t CE(O(t), y) + lambda * mean((O - phi)^2)``: every timestep answers
    for itself, and a weak pull of all outputs towards ``phi`` keeps outliers away.

    Args:
        logits: Output before softmax at each timestep, (T, B, K).
        target: Class numbers, (B,), int64, or shares of the classes, (B, K).
        lambda_: The weight of that pull, in [0, 1].
        phi: What the outputs are pulled to; the paper takes the threshold V_th.
        label_smoothing: Share of the target spread evenly over all classes, in [0, 1).
    """
    logits = _full_precision(logits)
    num_timesteps = logits.shape[0]
    repeated = target.repeat(num_timesteps, *(1,) * (target.ndim - 1))
    cross_entropy = F.cross_entropy(logits.flatten(0, 1), repeated, label_smoothing=label_smoothing)
    pull = (logits - phi).square().mean()
    return (1 - lambda_) * cross_entropy + lambda_ * pull


def distillation_loss(logits: Tensor, teacher: Tensor, *, temperature: float) -> Tensor:
    """Divergence of each timestep's softened answer from a teacher's (Hinton et al., 2015).

    ``temperature^2 * mean_t KL(softmax(teacher / temperature) || softmax(O(t) / temperature))``,
    whose gradient keeps its size whatever the temperature. No gradient reaches the teacher.

    Args:
        logits: Output before softmax at each timestep, (T, B, K).
        teacher: The teacher's output before softmax, (B, K).
        temperature: Above 0.
    """
    ours = F.log_softmax(_full_precision(logits) / temperature, dim=-1)
    theirs = F.log_softmax(_full_precision(teacher.detach()) / temperature, dim=-1)
    divergence = F.kl_div(ours, theirs.expand_as(ours), reduction="sum", log_target=True)
    return temperature**2 * divergence / ours.shape[:-1].numel()


def self_distillation_loss(logits: Tensor, *, temperature: float) -> Tensor:
    """`distillation_loss` with the time-mean of the very logits (T, B, K) as the teacher.

    Every timestep learns what all of them say together; no gradient goes through the mean. (It is
    over all timesteps. Published full-range distillation takes those whose class is correct.)
    """
    return distillation_loss(logits, _full_precision(logits).mean(0), temperature=temperature)
