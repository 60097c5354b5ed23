"""The section ``loss``: the objective, with distillation."""

from typing import Annotated, Any

from pydantic import Field

from tetdist.config.fields import Fraction, OneOf, Section, Share
from tetdist.losses import LOSSES, SelfTarget, TeacherAlignment


class DistillationSection(Section):
    """Softer targets beside the labels: what a teacher, or the network itself, makes of the same
    input. With TET they are those of every timestep, with SDT of the time-mean."""

    teacher: str | None = None
    """A run folder (its last checkpoint), the folder of a checkpoint or an export, a .safetensors
    file (see init_checkpoint), hf:ORG/NAME, or timm:NAME. Null: none."""
    teacher_weights: str | None = None
    """File with the weights of a timm:NAME teacher; null: timm downloads those it knows."""
    weight: Annotated[float, Field(ge=0)] = 0.2
    """Weight of the teacher's KL divergence; without effect if there is no teacher."""
    teacher_alignment: TeacherAlignment = "plain"
    """plain: logits are compared as they are. error_aware, that of SeAl: where a timestep's class
    is wrong, its logit is replaced by that of the right class, and the teacher's of both by the
    smaller one."""
    self_weight: Annotated[float, Field(ge=0)] = 0.0
    """Weight of each timestep's KL divergence from self_target; 0: none. For TET only."""
    self_target: SelfTarget = "time_mean"
    """time_mean: the mean of all timesteps. correct_mean, that of full-range distillation: of those
    whose class is right, and equal shares of the classes where none is. similarity, that of SeAl:
    each timestep's own mean of the others, by their confidence and similarity to it."""
    temperature: Annotated[float, Field(gt=0)] = 2.0
    """Divisor of the logits in both divergences; above 1 lesser classes count more."""


class LossSection(Section):
    kind: Annotated[str, OneOf(lambda: LOSSES)] = "tet"
    """tet, sdt (cross-entropy of the time-mean), or one of your own; see imports."""
    lambda_: Fraction = Field(default=0.001, alias="lambda")
    """TET's weight of the pull towards phi."""
    phi: float = 1.0
    """TET's target of all outputs; the paper takes the threshold."""
    label_smoothing: Share = 0.0
    """Share of the target that is spread evenly over all classes, as of torch's cross_entropy."""
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
