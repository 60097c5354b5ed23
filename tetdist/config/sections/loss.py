"""The section ``loss``: the objective, with distillation."""

from typing import Annotated, Any

from pydantic import Field

from tetdist.config.fields import Fraction, OneOf, Section, Share
from tetdist.losses import LOSSES, SelfTarget, TeacherAlignment


class DistillationSection(Section):
    """Softer targets beside the labels: what a teacher, or the network itself, makes of the same
    input. With TET they are those of every timestep, with SDT of the time-mean."""

    teacher: str | None = None
    """Teacher network: a run folder (its last checkpoint), the folder of a checkpoint or an export,
    a .safetensors file (see init_checkpoint), hf:ORG/NAME, or timm:NAME; null: none."""
    teacher_weights: str | None = None
    """File with the weights of a timm:NAME teacher; null: timm downloads those it knows."""
    weight: Annotated[float, Field(ge=0)] = 0.2
    """Weight of the teacher's KL divergence; without effect if there is no teacher."""
    teacher_alignment: TeacherAlignment = "plain"
    """Alignment of logits before the teacher's divergence. plain: none. error_aware (SeAl): at a
    timestep whose class is wrong, its logit is replaced by that of the right class, and the
    teacher's logits of both by the smaller one."""
    self_weight: Annotated[float, Field(ge=0)] = 0.0
    """Weight of each timestep's KL divergence from self_target (self-distillation); 0: off. Needs
    loss.kind=tet."""
    self_target: SelfTarget = "time_mean"
    """Target of self-distillation. time_mean: the mean of all timesteps. correct_mean (full-range
    distillation): the mean of the timesteps whose class is right, or equal probabilities if none
    is. similarity (SeAl): each timestep's own mean of the other timesteps, weighted by their
    confidence and similarity to it."""
    temperature: Annotated[float, Field(gt=0)] = 2.0
    """Temperature: divisor of the logits in both divergences. Above 1, less likely classes count
    more."""


class LossSection(Section):
    kind: Annotated[str, OneOf(lambda: LOSSES)] = "tet"
    """Objective. tet: mean of every timestep's cross-entropy; sdt: cross-entropy of the time-mean;
    or one of your own (see imports)."""
    lambda_: Fraction = Field(default=0.001, alias="lambda")
    """Weight of TET's regulariser, the mean squared distance of all outputs from phi; the
    cross-entropy has weight 1 - lambda."""
    phi: float = 1.0
    """Target of TET's regulariser for all outputs; the paper takes the threshold."""
    label_smoothing: Share = 0.0
    """Probability that is spread evenly over all classes in the target, as in torch's
    cross_entropy."""
    arguments: dict[str, Any] = {}
    """Further arguments of a loss of your own."""
    distillation: DistillationSection = DistillationSection()

    def as_text(self) -> str:
        """Describe it as in "TET, lambda 0.001, phi 1; 0.2 x divergence from timm:NAME"."""
        match self.kind:
            case "tet":
                text = f"TET, lambda {self.lambda_:g}, phi {self.phi:g}"
            case "sdt":
                text = "SDT: cross-entropy of the time-mean"
            case other:
                text = ", ".join([other, *(f"{k} {v}" for k, v in self.arguments.items())])
        if self.label_smoothing:
            text += f", label smoothing {self.label_smoothing:g}"
        distillation = self.distillation
        if distillation.teacher is not None:
            text += f"; {distillation.weight:g} x divergence from {distillation.teacher}"
            if distillation.teacher_alignment == "error_aware":
                text += " after error-aware alignment"
        if distillation.self_weight:
            of_what = {
                "time_mean": "the time-mean",
                "correct_mean": "the mean of the correct timesteps",
                "similarity": "the similarity-weighted mean of the other timesteps",
            }[distillation.self_target]
            text += f"; {distillation.self_weight:g} x divergence from {of_what}"
        if distillation.teacher is not None or distillation.self_weight:
            text += f", temperature {distillation.temperature:g}"
        return text
