"""Losses on per-timestep logits: SDT (standard), TET (Deng et al., ICLR 2022), distillation.

All are computed in float32 (float64 for float64 logits), outside autocast, whatever the network's
precision.
"""

import inspect
import itertools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, assert_never

import torch
import torch.nn.functional as F
from torch import Tensor

from tetdist.errors import UserError
from tetdist.plugins import Registry

# Targets of a timestep: see `self_target`.
SelfTarget = Literal["time_mean", "correct_mean", "similarity"]


@dataclass(frozen=True)
class Loss:
    """A loss that `loss.kind` may name.

    Attributes:
        function: Computes the loss, (), from logits (T, B, K) and targets: labels (B,) or class
            probabilities (B, K). Its other parameters are ``lambda_``, ``phi`` and
            ``label_smoothing``, if it has them, and those of ``loss.arguments``.
        of_time_mean: True if it depends only on the logits' mean over time, as distillation then
            does, too.
    """

    function: Callable[..., Tensor]
    of_time_mean: bool = False

    @property
    def arguments(self) -> list[str]:
        """Names of the function's parameters after logits and targets."""
        return list(inspect.signature(self.function).parameters)[2:]

    def compute(
        self, kind: str, logits: Tensor, targets: Tensor, arguments: Mapping[str, Any]
    ) -> Tensor:
        """Compute the loss named by ``loss.kind``, ().

        Raises:
            UserError: The function returns no such loss.
        """
        try:
            total: Any = self.function(logits, targets, **arguments)
        except Exception as error:
            error.add_note(f"logits {tuple(logits.shape)}, targets {tuple(targets.shape)}")
            raise
        if not isinstance(total, Tensor):
            raise UserError(f"loss.kind: {kind} returns {total}, not a tensor of the shape ()")
        if total.ndim:
            raise UserError(
                f"loss.kind: {kind} has the shape {tuple(total.shape)}, not (); take the mean"
            )
        if logits.requires_grad and not total.requires_grad:
            raise UserError(f"loss.kind: {kind} has no gradient; compute it from the given logits")
        return total


LOSSES: Registry[Loss] = Registry("loss", "loss.kind")


def register_loss(
    name: str, *, of_time_mean: bool = False
) -> Callable[[Callable[..., Tensor]], Callable[..., Tensor]]:
    """Make a decorator that enters a function into `LOSSES`; see `Loss`."""

    def enter(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        LOSSES.enter(name, Loss(function, of_time_mean), function.__module__)
        return function

    return enter


def _of_timesteps(logits: Tensor) -> Tensor:
    """Return logits (T, B, K) as at least float32."""
    if logits.ndim != 3:
        raise UserError(
            f"the logits have the shape {tuple(logits.shape)}, not (T, B, K); call "
            "model(x, per_timestep=True)"
        )
    return _full_precision(logits)


def _full_precision(logits: Tensor) -> Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def running_means(logits: Tensor) -> Tensor:
    """Return the outputs at T = 1, 2, ...: running means of logits (T, B, K), at least float32."""
    logits = _full_precision(logits)
    steps = torch.arange(1, len(logits) + 1, device=logits.device, dtype=logits.dtype)
    # In float64, like torch's cumsum on a CPU, which is not deterministic on a GPU.
    sums = torch.stack(list(itertools.accumulate(logits.double().unbind())))
    return sums.to(logits.dtype) / steps.view(-1, 1, 1)


def _tet_at(
    classified: Tensor, logits: Tensor, target: Tensor, lambda_: float, phi: float, smoothing: float
) -> Tensor:
    """Return TET with the cross-entropy of ``classified`` (T, B, K), made from the logits."""
    repeated = target.repeat(len(logits), *(1,) * (target.ndim - 1))
    cross_entropy = F.cross_entropy(classified.flatten(0, 1), repeated, label_smoothing=smoothing)
    pull = (logits - phi).square().mean()
    return (1 - lambda_) * cross_entropy + lambda_ * pull


@register_loss("sdt", of_time_mean=True)
def sdt_loss(logits: Tensor, target: Tensor, *, label_smoothing: float = 0.0) -> Tensor:
    """Standard direct training: cross-entropy of the time-mean of the logits (paper, eq. 7).

    Args:
        logits: Output before softmax at each timestep, (T, B, K).
        target: Class numbers, (B,), int64, or class probabilities, (B, K).
        label_smoothing: Probability spread evenly over all classes, in [0, 1).
    """
    mean_over_time = _of_timesteps(logits).mean(0)
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

    ``(1 - lambda) * mean_t CE(O(t), y) + lambda * mean((O - phi)^2)``: every timestep has its own
    cross-entropy, and a weak regulariser pulls all outputs to ``phi``, which avoids outliers.

    Args:
        logits: Output before softmax at each timestep, (T, B, K).
        target: Class numbers, (B,), int64, or class probabilities, (B, K).
        lambda_: Weight of the regulariser, in [0, 1].
        phi: Target of the regulariser; the paper uses the threshold V_th.
        label_smoothing: Probability spread evenly over all classes, in [0, 1).
    """
    logits = _of_timesteps(logits)
    return _tet_at(logits, logits, target, lambda_, phi, label_smoothing)


@register_loss("tet_of_means")
def tet_of_means_loss(
    logits: Tensor,
    target: Tensor,
    *,
    lambda_: float,
    phi: float = 1.0,
    label_smoothing: float = 0.0,
) -> Tensor:
    """TET at the outputs' mean so far, which early exit and an evaluation at every T read.

    ``(1 - lambda) * mean_t CE(M(t), y) + lambda * mean((O - phi)^2)``, with the running mean
    ``M(t) = (O(1) + ... + O(t)) / t``. The gradient of the first part by ``O(s)`` is
    ``(1 / T) * sum_{t >= s} (softmax(M(t)) - y) / t``. If all running means are equally wrong,
    ``O(s)`` has the weight ``(1/s + ... + 1/T) / T``: 0.52, 0.27, 0.15 and 0.06 at T=4, and 1/4
    with TET and SDT. An early output is part of more means, so it gets more; a later output only
    has to correct the sum of those before it.

    DT-SNN (arXiv 2305.17346) decides by this mean, too. Its code, which is SEENN's (2304.01230,
    7c07ca8), trains with TET; its ``mix_loss``, never called, takes sums instead of means, and its
    term t lacks output t.

    The arguments are those of `tet_loss`; the regulariser pulls each output to phi, not the means.
    """
    logits = _of_timesteps(logits)
    return _tet_at(running_means(logits), logits, target, lambda_, phi, label_smoothing)


def distillation_loss(logits: Tensor, teacher: Tensor, *, temperature: float) -> Tensor:
    """KL divergence of each timestep's softened output from a teacher's (Hinton et al., 2015).

    ``temperature^2 * mean_t KL(softmax(teacher / temperature) || softmax(O(t) / temperature))``;
    its gradient has the same scale at all temperatures. No gradient reaches the teacher.

    Args:
        logits: Output before softmax at each timestep, (T, B, K).
        teacher: The teacher's output before softmax, (B, K), or one per timestep, (T, B, K).
        temperature: Above 0.
    """
    ours = F.log_softmax(_full_precision(logits) / temperature, dim=-1)
    theirs = F.log_softmax(_full_precision(teacher.detach()) / temperature, dim=-1)
    divergence = F.kl_div(ours, theirs.expand_as(ours), reduction="sum", log_target=True)
    return temperature**2 * divergence / ours.shape[:-1].numel()


def error_aware_alignment(logits: Tensor, teacher: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Align the network's and the teacher's logits, (T, B, K) each, at wrong timesteps.

    This is the first half of SeAl, from its authors' code. If a timestep predicts class w instead
    of the label y, its logit of w becomes that of y, and the teacher's logits of both become the
    smaller of the two. So the divergence moves w and y together, and only the cross-entropy
    separates them: w gets no gradient, and y that of both. Correct timesteps keep all logits.

    Args:
        logits: Output before softmax at each timestep, (T, B, K).
        teacher: The teacher's output before softmax, (B, K).
        labels: Class numbers, (B,), int64.
    """
    logits = _full_precision(logits)
    teacher = _full_precision(teacher).expand_as(logits)
    predicted = logits.argmax(-1, keepdim=True)
    true = labels.view(1, -1, 1).expand_as(predicted)
    # Where the timestep is right, both indices are the same, and nothing changes.
    aligned = logits.scatter(-1, predicted, logits.gather(-1, true))
    smaller = torch.minimum(teacher.gather(-1, true), teacher.gather(-1, predicted))
    return aligned, teacher.scatter(-1, true, smaller).scatter(-1, predicted, smaller)


def self_target(kind: SelfTarget, logits: Tensor, targets: Tensor) -> Tensor:
    """Compute the target of self-distillation: logits (B, K), or (T, B, K).

    Args:
        kind: ``time_mean``, the mean of all timesteps; `correct_mean`; or `similarity_mean`.
        logits: Output before softmax at each timestep, (T, B, K); the target has no gradient.
        targets: Class numbers, (B,), int64; only `correct_mean` reads them.
    """
    logits = _full_precision(logits.detach())
    match kind:
        case "time_mean":
            return logits.mean(0)
        case "correct_mean":
            return correct_mean(logits, targets)
        case "similarity":
            return similarity_mean(logits)
        case other:
            assert_never(other)


def correct_mean(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the mean (B, K) of logits (T, B, K) over the timesteps that predict the label (B,).

    This is the target of full-range distillation ("Efficient Logit-based Knowledge Distillation of
    Deep Spiking Neural Networks for Full-Range Timestep Deployment"). If no timestep is right, it
    is 0, which means equal probabilities, as in its authors' code.
    """
    correct = (logits.argmax(-1) == labels).to(logits.dtype)[..., None]
    return (logits * correct).sum(0) / correct.sum(0).clamp(min=1)


def similarity_mean(logits: Tensor) -> Tensor:
    """Return, for each timestep of logits (T, B, K), the weighted mean of all others: (T, B, K).

    This is the second half of SeAl, from its authors' code. Timestep i gives j the weight
    ``softmax_j(confidence(j) * cosine(O(i), O(j)))``; the confidence is 1 minus the entropy of j's
    output divided by its maximum, ln K. A single timestep is its own target.
    """
    timesteps, _, num_classes = logits.shape
    if timesteps == 1:
        return logits
    shares = logits.softmax(-1)
    entropy = -(shares * (shares + 1e-8).log()).sum(-1)  # (T, B); 1e-8 as in their code
    confidence = 1 - entropy / math.log(num_classes)
    # No matrix product, since a GPU or autocast may round its inputs.
    cosine = F.cosine_similarity(logits[:, None], logits[None], dim=-1)  # (T, T, B)
    itself = torch.eye(timesteps, dtype=torch.bool, device=logits.device)[..., None]
    weights = (confidence * cosine).masked_fill(itself, -math.inf).softmax(1)
    return (weights[..., None] * logits).sum(1)
