"""Losses on per-timestep logits: SDT, the direct one, TET (Deng et al., ICLR 2022), distillation.

All are computed in float32 (float64 for float64 logits), outside autocast, whatever the
network's precision.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def _full_precision(logits: Tensor) -> Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def sdt_loss(logits: Tensor, target: Tensor, *, label_smoothing: float = 0.0) -> Tensor:
    """Standard direct training: cross-entropy of the time-mean of the logits (paper, eq. 7).

    Args:
        logits: Output before softmax at each timestep, (T, B, K).
        target: Class numbers, (B,), int64, or shares of the classes, (B, K).
        label_smoothing: Share of the target spread evenly over all classes, in [0, 1).
    """
    mean_over_time = _full_precision(logits).mean(0)
    return F.cross_entropy(mean_over_time, target, label_smoothing=label_smoothing)


def tet_loss(
    logits: Tensor,
    target: Tensor,
    *,
    regularization: float,
    phi: float = 1.0,
    label_smoothing: float = 0.0,
) -> Tensor:
    """Temporal efficient training (paper, equations 9 to 13).

    ``(1 - lambda) * mean_t CE(O(t), y) + lambda * mean((O - phi)^2)``: every timestep answers
    for itself, and a weak pull of all outputs towards ``phi`` keeps outliers away.

    Args:
        logits: Output before softmax at each timestep, (T, B, K).
        target: Class numbers, (B,), int64, or shares of the classes, (B, K).
        regularization: The paper's lambda, in [0, 1].
        phi: What the outputs are pulled to; the paper takes the threshold V_th.
        label_smoothing: Share of the target spread evenly over all classes, in [0, 1).
    """
    logits = _full_precision(logits)
    num_timesteps = logits.shape[0]
    repeated = target.repeat(num_timesteps, *(1,) * (target.ndim - 1))
    cross_entropy = F.cross_entropy(logits.flatten(0, 1), repeated, label_smoothing=label_smoothing)
    pull = (logits - phi).square().mean()
    return (1 - regularization) * cross_entropy + regularization * pull


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

    Every timestep learns what all of them say together; no gradient goes through the mean.
    """
    return distillation_loss(logits, _full_precision(logits).mean(0), temperature=temperature)
