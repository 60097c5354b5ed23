"""The sections of a phase: T, optimiser, schedule."""

import sys
from collections.abc import Sequence
from itertools import takewhile
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, PlainSerializer, model_validator

from tetdist import plugins
from tetdist.config import names
from tetdist.config.fields import TIMM, Epochs, OneOf, OpenFraction, Samples, Section, Timesteps
from tetdist.config.flags import MOST_TIMESTEPS
from tetdist.config.sections.loss import LossSection
from tetdist.errors import WrongValue
from tetdist.wording import counted


class OptimizerSection(Section):
    kind: Annotated[str, OneOf(lambda: names.OPTIMIZERS)] = "sgd"
    """Optimiser: sgd, adam or adamw; timm:NAME for one of timm's, such as timm:lamb; or the name of
    your own (see imports)."""
    lr: Annotated[float, Field(gt=0)]
    """Peak learning rate. It does not depend on the batch size unless lr_per is set."""
    lr_per: Samples | None = None
    """Batch size that lr is given for: the peak learning rate is lr x batch.global / lr_per, as in
    recipes that say "per 256" (timm's lr_base_size with lr_base_scale=linear). Null: no scaling."""
    layer_decay: Annotated[float, Field(gt=0, le=1)] | None = None
    """Ratio of each layer's learning rate to that of the next layer (timm's layer_decay). The
    classifier, the last layer, has the full rate. Null: all layers have the same rate."""
    momentum: OpenFraction = 0.9
    """Momentum of sgd and of timm's optimisers that have one."""
    nesterov: bool = False
    """Use Nesterov momentum (SGD)."""
    betas: tuple[OpenFraction, OpenFraction] = (0.9, 0.999)
    """Decay factors of the running averages of gradients and of squared gradients (adam, adamw and
    most of timm's)."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """Weight decay: this fraction of a weight is added to its gradient; decoupled optimisers such
    as adamw subtract learning rate x weight_decay x weight instead."""
    decay_norms: bool = True
    """Apply weight decay to batch norm parameters and biases, too, but never to learnable neuron
    parameters."""
    arguments: dict[str, Any] = {}
    """Further arguments of timm's optimisers or of your own, such as eps: 1.0e-6."""

    @model_validator(mode="after")
    def _refuse_an_unknown_kind(self) -> Self:
        known, is_timms = names.OPTIMIZERS, self.kind.startswith(TIMM)
        if self.kind not in known and not is_timms and plugins.PACKAGE not in sys.modules:
            none = plugins.none_of("optimiser", self.kind, known)
            raise WrongValue("kind", f"{none}; timm's are {TIMM}NAME, such as {TIMM}lion")
        return self

    def check_arguments(self) -> None:
        """Refuse arguments that the optimiser lacks, which is imported for that."""
        from tetdist.optimizers import kind_of  # imports torch and timm

        own = {"lr", "weight_decay", *kind_of(self.kind, "kind").reads}
        if self.arguments and "arguments" not in own:
            raise WrongValue(
                "arguments",
                f"kind={self.kind} takes none; set them to {{}}, or kind=timm:NAME (register your "
                "own with reads=('arguments',))",
            )
        for key in self.arguments.keys() & own:
            raise WrongValue(f"arguments.{key}", f"set phases.N.optimizer.{key} instead")

    def peak_lr(self, global_batch: int) -> float:
        """Return the learning rate at the end of warm-up."""
        return self.lr if self.lr_per is None else self.lr * global_batch / self.lr_per

    def lr_as_text(self, global_batch: int) -> str:
        """Return the peak learning rate for reports, with the unscaled one."""
        text = f"{self.peak_lr(global_batch):g}"
        if self.lr_per is not None:
            text += f" ({self.lr:g} per {self.lr_per})"
        if self.layer_decay is not None:
            text += f", times {self.layer_decay:g} for each layer below the classifier"
        return text


def _timesteps(value: Any) -> Any:
    """Refuse, in one sentence for all three forms, what is no T, no list of them and no range."""
    is_range = isinstance(value, dict) and value.keys() == {"from", "to"}
    numbers = [value["from"], value["to"]] if is_range else value
    several = numbers if isinstance(numbers, list) else [numbers]
    right = several and all(type(t) is int and 1 <= t <= MOST_TIMESTEPS for t in several)
    if not right or (is_range and several[0] > several[1]):
        raise ValueError(
            f"must be an integer from 1 to {MOST_TIMESTEPS}, a list of such numbers, or a "
            "range of them from the smaller one on, such as {from: 1, to: 4}"
        )
    return tuple(value) if isinstance(value, list) else value


class PhaseSection(Section):
    """A part of training with its own T, loss, optimiser and schedule."""

    epochs: Epochs
    """Number of passes over the training samples in this phase."""
    timesteps: Annotated[
        Timesteps | tuple[Timesteps, ...] | dict[str, Timesteps], BeforeValidator(_timesteps)
    ]
    """Number of timesteps T: how many times the network sees an image, or how many time bins of a
    recording it sees, from the first on. A list such as [1, 2, 4], or {from: 1, to: 4}: each step
    draws its T from these numbers, all equally likely; evaluations use the largest."""
    loss: Annotated[
        LossSection, PlainSerializer(lambda loss: loss.model_dump(mode="json", exclude_unset=True))
    ] = LossSection()
    """Keys of the section loss that differ in this phase, such as {kind: sdt}."""
    optimizer: OptimizerSection | Literal["continue"]
    """Optimiser of the phase, which starts without state. continue: the optimiser of the phase
    before goes on, with its state and its learning-rate schedule, which spans both phases."""
    schedule: Literal["cosine", "constant"] = "cosine"
    """Learning-rate schedule. cosine: half a cosine period from the peak to min_lr; constant: the
    peak throughout."""
    warmup_epochs: Annotated[float, Field(ge=0)] = 0.0
    """Number of epochs at the phase's start over which the learning rate rises linearly from
    warmup_lr; timm's warmup_epochs."""
    warmup_lr: Annotated[float, Field(ge=0)] = 0.0
    """Initial learning rate of the warm-up (see warmup_epochs); timm's warmup_lr."""
    min_lr: Annotated[float, Field(ge=0)] = 0.0
    """Final learning rate of schedule=cosine; timm's min_lr."""
    cooldown_epochs: Annotated[int, Field(ge=0, le=10**6)] = 0
    """Number of epochs at the phase's end that keep the final learning rate, min_lr;
    timm's cooldown_epochs, which timm adds to epochs."""
    lr_changes: Literal["steps", "epochs"] = "steps"
    """Interval at which the learning rate changes. steps: at each step; epochs: once per epoch, as
    in timm's trainer, to the schedule's value at the beginning of the epoch."""
    clock_after_warmup: bool = True
    """Start the schedule at the end of the warm-up. False: it starts with the phase, so that the
    rate after the warm-up is below the peak, as with timm's cosine."""

    def check_schedule(self, epochs: int, peak: float) -> None:
        """Refuse a warm-up or learning rates that do not suit the schedule's epochs and peak."""
        added = f" and cooldown_epochs, {self.cooldown_epochs}," if self.cooldown_epochs else ""
        if self.warmup_epochs + self.cooldown_epochs >= epochs:
            below = f"must be below the schedule's {counted(epochs, 'epoch')}"
            raise WrongValue("warmup_epochs", f"{self.warmup_epochs:g}{added} {below}")
        for key, rate in (("warmup_lr", self.warmup_lr), ("min_lr", self.min_lr)):
            if rate > peak:
                above = f"is above the peak of the learning rate, {peak:g}"
                raise WrongValue(key, above, f"{rate:g}")

    @property
    def choices(self) -> tuple[int, ...]:
        """All T that a step may have."""
        if isinstance(self.timesteps, dict):
            return tuple(range(self.timesteps["from"], self.timesteps["to"] + 1))
        return (self.timesteps,) if isinstance(self.timesteps, int) else self.timesteps

    @property
    def most_timesteps(self) -> int:
        """Largest T, that of evaluations."""
        return max(self.choices)

    @property
    def mean_timesteps(self) -> float:
        """Average T of a step."""
        return sum(self.choices) / len(self.choices)

    @property
    def timesteps_as_text(self) -> str:
        """T as in "4", "1 to 4" or "1 or 2 or 4"."""
        if isinstance(self.timesteps, dict):
            return "{from} to {to}".format(**self.timesteps)
        return " or ".join(map(str, self.choices))


def schedule_epochs(phases: Sequence[PhaseSection], number: int) -> int:
    """Return the epochs of a phase and of those after it that continue its optimiser."""
    following = takewhile(lambda phase: phase.optimizer == "continue", phases[number + 1 :])
    return sum(phase.epochs for phase in (phases[number], *following))
