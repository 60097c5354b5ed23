"""The sections of a phase: T, optimiser, schedule."""

from typing import Annotated, Any, Literal

from pydantic import Field

from tetdist.config.fields import Epochs, OneOf, Pixels, Section, Share, Timesteps
from tetdist.optimizers import OPTIMIZERS


class OptimizerSection(Section):
    kind: Annotated[str, OneOf(lambda: OPTIMIZERS)] = "sgd"
    """sgd, adam, adamw; timm:NAME is timm's, such as timm:lamb; or one of your own; see imports."""
    lr: Annotated[float, Field(gt=0)]
    """Peak learning rate; for the global batch as it is, unless lr_per is set."""
    lr_per: Annotated[int, Field(gt=0)] | None = None
    """lr is meant for so many samples a step, and is multiplied by batch.global over them, the rule
    of recipes that say "per 256". A run says both. Null: nothing is scaled."""
    layer_decay: Annotated[float, Field(gt=0, le=1)] | None = None
    """What a layer's learning rate is multiplied by for each layer between it and the classifier,
    counting stem, blocks, classifier; of metrics' lr, which is the classifier's. Null: all have the
    same."""
    momentum: Share = 0.9
    """Of sgd."""
    nesterov: bool = False
    """Of sgd: the gradient of where the momentum leads."""
    betas: tuple[Share, Share] = (0.9, 0.999)
    """Decays of the averages of gradients and of their squares; not of sgd."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """Share of a weight that is added to its gradient; adamw and its like subtract it, times the
    learning rate, from the weight itself."""
    decay_norms: bool = True
    """Whether weight decay applies to batch norm parameters and biases, too."""
    decay_neurons: bool = False
    """Whether it applies to what neurons learn; of plif that draws the decay to 0.5."""
    arguments: dict[str, Any] = {}
    """Further arguments of timm's optimisers and of your own, such as eps: 1.0e-6."""

    def peak_lr(self, global_batch: int) -> float:
        """The learning rate that warm-up ends with."""
        return self.lr if self.lr_per is None else self.lr * global_batch / self.lr_per

    def lr_as_text(self, global_batch: int) -> str:
        """The learning rate as said in reports, with the one that it was made of."""
        text = f"{self.peak_lr(global_batch):g}"
        if self.lr_per is not None:
            text += f" ({self.lr:g} per {self.lr_per})"
        if self.layer_decay is not None:
            text += f", times {self.layer_decay:g} for each layer below the classifier"
        return text


class PhaseSection(Section):
    """A stretch of training with its own T, optimiser and schedule."""

    epochs: Epochs
    """Number of passes over the training samples in this phase."""
    timesteps: Timesteps
    """T: how often the network sees an image, or how many time bins of a recording."""
    optimizer: OptimizerSection
    schedule: Literal["cosine", "constant", "polynomial", "step"] = "cosine"
    """cosine: half a period, from the peak to min_lr; polynomial: to min_lr by (1 - share)^power;
    step: times decay_rate every decay_epochs."""
    warmup_epochs: Annotated[float, Field(ge=0)] = 0.0
    """Linear from warmup_lr at the phase's start."""
    warmup_lr: Annotated[float, Field(ge=0)] = 0.0
    """The learning rate at which warmup_epochs begins."""
    min_lr: Annotated[float, Field(ge=0)] = 0.0
    """What the schedule ends with, and stays at during cooldown_epochs."""
    cooldown_epochs: Annotated[int, Field(ge=0)] = 0
    """The last of the phase's epochs, in which the schedule has ended."""
    lr_changes: Literal["steps", "epochs"] = "steps"
    """With each step, or once an epoch as in timm's trainer, to what it is at the epoch's
    beginning."""
    clock_after_warmup: bool = True
    """Whether the schedule's share begins with the end of the warm-up, or with the phase, so that
    warm-up ends on a part of it that is below the peak, as timm's cosine does."""
    power: Annotated[float, Field(gt=0)] = 1.0
    """Of schedule: polynomial."""
    decay_epochs: Annotated[float, Field(gt=0)] = 30.0
    """Of schedule=step: epochs from one fall of the learning rate to the next."""
    decay_rate: Annotated[float, Field(gt=0, le=1)] = 0.1
    """Of schedule: step."""
    image_size: Pixels | None = None
    """Of training images; null: data.image_size, which is also what evaluation takes."""
    final_image_size: Pixels | None = None
    """Of the phase's last epoch; the epochs before rise to it evenly, in multiples of 32. Null: all
    are of image_size."""
