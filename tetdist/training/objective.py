"""The training objective that the section ``loss`` of a configuration describes."""

from torch import Tensor

from tetdist.config.sections.loss import LossSection
from tetdist.losses import LOSSES, distillation_loss, error_aware_alignment, self_target


def compute_loss(
    settings: LossSection, logits: Tensor, targets: Tensor, teacher_logits: Tensor | None = None
) -> Tensor:
    """Compute the configured loss, ().

    Args:
        logits: Output before softmax at each timestep, (T, B, K).
        targets: Class numbers, (B,), int64, or fractions of the classes, (B, K).
        teacher_logits: Logits of the teacher, (B, K), if there is one.
    """
    loss = LOSSES[settings.kind]
    options = {
        "lambda_": settings.lambda_,
        "phi": settings.phi,
        "label_smoothing": settings.label_smoothing,
    }
    known = {name: options[name] for name in loss.arguments if name in options}
    total = loss.compute(settings.kind, logits, targets, known | settings.arguments)
    distillation = settings.distillation
    learning = logits.mean(0, keepdim=True) if loss.of_time_mean else logits
    if teacher_logits is not None:
        answers, target = learning, teacher_logits
        if distillation.teacher_alignment == "error_aware":
            answers, target = error_aware_alignment(learning, teacher_logits, targets)
        divergence = distillation_loss(answers, target, temperature=distillation.temperature)
        total = total + distillation.weight * divergence
    if distillation.self_weight:
        target = self_target(distillation.self_target, learning, targets)
        divergence = distillation_loss(learning, target, temperature=distillation.temperature)
        total = total + distillation.self_weight * divergence
    return total
