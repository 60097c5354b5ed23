"""The section ``loss``: the objective, with distillation."""

import sys
from inspect import signature
from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from tetdist import plugins
from tetdist.config import names
from tetdist.config.fields import TIMM, Fraction, OneOf, OpenFraction, Section
from tetdist.errors import WrongValue


class DistillationSection(Section):
    """Soft targets besides the labels: the output of a teacher, or of the network itself, for the
    same input. With TET every timestep has one, with SDT the time-mean."""

    teacher: str | None = None
    """Teacher network: a run folder (its last checkpoint), the folder of a checkpoint or of an
    export (tools/export.py), a .safetensors file (see init_checkpoint), hf:ORG/NAME on the Hugging
    Face hub, tetdist:NAME, or timm:NAME; null: none."""
    teacher_weights: str | None = None
    """File with the weights of a timm:NAME teacher; null: timm downloads its pretrained weights."""
    weight: Annotated[float, Field(ge=0)] = 0.2
    """Weight of the KL divergence from the teacher."""
    teacher_alignment: Literal["plain", "error_aware"] = "plain"
    """Change of logits before their divergence from the teacher is computed. plain: none.
    error_aware (the SeAl method): if a timestep predicts a wrong class, its logit of this class is
    set to that of the right class, and both logits of the teacher to the smaller of the two."""
    self_weight: Annotated[float, Field(ge=0)] = 0.0
    """Weight of each timestep's KL divergence from self_target (self-distillation); 0: off. Not
    with loss.kind=sdt."""
    self_target: Literal["time_mean", "correct_mean", "similarity"] = "time_mean"
    """Target of self-distillation. time_mean: the mean logits of all timesteps. correct_mean
    (full-range distillation): the mean logits of the timesteps that predict the right class, or
    equal probabilities if none does. similarity (the SeAl method): for each timestep, the mean
    logits of the others, where confident and similar ones weigh more."""
    temperature: Annotated[float, Field(gt=0)] = 2.0
    """Distillation temperature, which divides the logits before their KL divergence from teacher or
    self_target is computed. Above 1, less likely classes count more."""

    @model_validator(mode="after")
    def _refuse_contradictions(self) -> Self:
        if self.teacher_weights and not (self.teacher or "").startswith(TIMM):
            raise WrongValue(
                "teacher_weights",
                "needs a timm teacher; set teacher=timm:NAME, too, or give the "
                "file itself as teacher",
            )
        return self


class LossSection(Section):
    kind: Annotated[str, OneOf(lambda: names.LOSSES)] = "tet"
    """Training objective. tet: mean of every timestep's cross-entropy; sdt: cross-entropy of the
    time-mean; tet_of_means: mean over t of the cross-entropy of the outputs' mean up to t; or the
    name of your own (see imports)."""
    lambda_: Fraction = Field(default=0.001, alias="lambda")
    """Weight of the regulariser of tet and tet_of_means, the mean squared distance of all outputs
    from phi; the cross-entropy has weight 1 - lambda."""
    phi: float = 1.0
    """Value that the regulariser of tet and tet_of_means pulls all outputs to; TET's paper uses the
    firing threshold."""
    label_smoothing: OpenFraction = 0.0
    """Label smoothing: the part of the target's probability that is spread evenly over all classes,
    as in torch's cross_entropy; timm's smoothing."""
    operations: Annotated[float, Field(ge=0)] = 0.0
    """Weight of a sample's synaptic operations, which spikes cause: one at each synapse that they
    reach, as a share of the dense operations of the layers that read spikes (the mean density of
    these layers' inputs, weighted by their fan-out); 0: off. Fewer spikes are faster on a CPU."""
    arguments: dict[str, Any] = {}
    """Further keyword arguments of your own loss."""
    distillation: DistillationSection = DistillationSection()

    def check_kind(self) -> None:
        """Refuse an unknown kind, unless a user's file that is imported may register it."""
        if self.kind not in names.LOSSES and plugins.PACKAGE not in sys.modules:
            those = f"there are {', '.join(names.LOSSES)}; sdt is the cross-entropy of the mean"
            none = plugins.none_of("loss", self.kind, names.LOSSES, f"{those} output")
            raise WrongValue("kind", none)

    def check_arguments(self) -> None:
        """Refuse arguments that the loss lacks, and self-distillation that it cannot have."""
        from tetdist.losses import LOSSES

        loss = LOSSES[self.kind]
        own = [name for name in loss.arguments if name not in ("lambda_", "phi", "label_smoothing")]
        for name in self.arguments:
            if name not in own:
                known = ", ".join(own) or "none"
                what = f"loss.kind={self.kind} has no such argument; known: {known}"
                raise WrongValue(f"arguments.{name}", what)
        set_here = ({*loss.arguments} - {*own}) | self.arguments.keys()
        try:
            signature(loss.function).bind(None, None, **dict.fromkeys(set_here))
        except TypeError as error:
            taken = ", ".join(["logits", "targets", *sorted(set_here)])
            raise WrongValue(
                "kind",
                f"has to take ({taken}), but: {error}; set any other parameter in arguments",
                self.kind,
            ) from error
        if self.distillation.self_weight and loss.of_time_mean:
            raise WrongValue(
                "distillation.self_weight",
                f"timesteps cannot learn from their mean, because kind={self.kind} sees only "
                "that; set kind=tet, or self_weight=0",
            )

    def as_text(self) -> str:
        """Describe it as in "TET, lambda 0.001, phi 1; 0.2 x divergence from timm:NAME"."""
        match self.kind:
            case "tet" | "tet_of_means":
                name = "TET" if self.kind == "tet" else "TET of running means"
                text = f"{name}, lambda {self.lambda_:g}, phi {self.phi:g}"
            case "sdt":
                text = "SDT: cross-entropy of the time-mean"
            case other:
                text = ", ".join([other, *(f"{k} {v}" for k, v in self.arguments.items())])
        if self.label_smoothing:
            text += f", label smoothing {self.label_smoothing:g}"
        if self.operations:
            text += f"; {self.operations:g} x synaptic operations"
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
