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
    """Factor of the learning rate for each layer below the classifier (stem, blocks, classifier);
    metrics show the classifier's rate. Null: all layers have the same; timm's layer_decay."""
    momentum: Share = 0.9
    """SGD momentum."""
    nesterov: bool = False
    """Use Nesterov momentum (SGD)."""
    betas: tuple[Share, Share] = (0.9, 0.999)
    """Decays of the averages of gradients and of their squares; not of sgd."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """Share of a weight that is added to its gradient; adamw and its like subtract it, times the
    learning rate, from the weight itself."""
    decay_norms: bool = True
    """Apply weight decay to batch norm parameters and biases, too."""
    decay_neurons: bool = False
    """Apply weight decay to learnable neuron parameters; it pulls plif's decay to 0.5."""
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
    """Final learning rate; also the rate during cooldown_epochs."""
    cooldown_epochs: Annotated[int, Field(ge=0)] = 0
    """The last of the phase's epochs, in which the schedule has ended."""
    lr_changes: Literal["steps", "epochs"] = "steps"
    """Interval at which the learning rate changes. steps: each step; epochs: once an epoch, as in
    timm's trainer, to the rate at the epoch's beginning."""
    clock_after_warmup: bool = True
    """Start the schedule at the end of the warm-up. False: it starts with the phase, so that the
    warm-up ends below the peak, as with timm's cosine."""
    power: Annotated[float, Field(gt=0)] = 1.0
    """Exponent of schedule=polynomial."""
    decay_epochs: Annotated[float, Field(gt=0)] = 30.0
    """Epochs between two drops of the learning rate (schedule=step)."""
    decay_rate: Annotated[float, Field(gt=0, le=1)] = 0.1
    """Factor of the learning rate at each drop (schedule=step)."""
    image_size: Pixels | None = None
    """Height and width of training images, in pixels; null: data.image_size, as in evaluation."""
    final_image_size: Pixels | None = None
    """Height and width of training images in the phase's last epoch, in pixels; sizes rise to it
    evenly, in multiples of 32. Null: image_size in all epochs."""
