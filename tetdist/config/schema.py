"""The configuration of a run: typed, strict, from YAML plus ``key=value`` overrides.

A configuration describes one run completely; every default is written out in the run folder's
config.yaml. Keys that do not exist, values of the wrong type or range and settings that
contradict each other end in a `UserError` that names the dotted key.
"""

import dataclasses
import functools
import json
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, get_type_hints

import pydantic
import timm
import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainSerializer,
    PlainValidator,
)
from pydantic_core import PydanticCustomError

from tetdist import models
from tetdist.config.flags import MOST_PIXELS, MOST_PREFETCHED, MOST_THREADS, MOST_TIMESTEPS
from tetdist.config.rand_augment import EXAMPLE, rand_augment
from tetdist.errors import without_passwords
from tetdist.losses import LOSSES, SelfTarget, TeacherAlignment
from tetdist.models import SpikingNetwork
from tetdist.models.create import create_model
from tetdist.nn import neurons
from tetdist.nn.neurons import LIF, NEURONS, NeuronConfig
from tetdist.optimizers import OPTIMIZERS

TIMM = "timm:"  # before the name of one of timm's networks, where a path could stand

# What is larger is a slip of the finger, which libraries of C would answer otherwise.
Positive = Annotated[int, Field(gt=0, le=10**9)]
Epochs = Annotated[int, Field(gt=0, le=10**6)]
Samples = Annotated[int, Field(gt=0, le=2**20)]
Timesteps = Annotated[int, Field(gt=0, le=MOST_TIMESTEPS)]
Pixels = Annotated[int, Field(gt=0, le=MOST_PIXELS)]
Fraction = Annotated[float, Field(ge=0, le=1)]
# A probability below 1: a share of 1 would leave nothing.
Share = Annotated[float, Field(ge=0, lt=1)]


def _names(value: Any) -> Any:
    """A list of names as a tuple, to which a single name is one of one name."""
    return (value,) if isinstance(value, str) else _as_tuple(value)


def _steps(value: Any) -> Any:
    """The first and the last step of a pair, or of text such as 20..30.

    Raises:
        PydanticCustomError: It is neither.
    """
    if isinstance(value, str) and (found := re.fullmatch(r"(\d+)\.\.(\d+)", value)):
        return int(found[1]), int(found[2])
    pair = _as_tuple(value)
    if not isinstance(pair, tuple) or len(pair) != 2:
        raise PydanticCustomError(
            "steps", "must be the first and the last step, such as [20, 30] or 20..30"
        )
    return pair


def _as_tuple(value: Any) -> Any:
    # What a validator has been given is no JSON any more, where a list is taken for a tuple.
    return tuple(value) if isinstance(value, list) else value


Names = Annotated[tuple[str, ...], BeforeValidator(_names)]


@dataclasses.dataclass(frozen=True)
class OneOf:
    """Says of a text that it is the name of something registered: those that --explain lists."""

    names: Callable[[], Iterable[str]]


class Section(BaseModel):
    # strict: "yes" is no bool and 1.5 no int; an int where a float is asked is fine.
    model_config = ConfigDict(
        extra="forbid",
        strict=True,
        frozen=True,
        allow_inf_nan=False,
        populate_by_name=True,
        serialize_by_alias=True,
        use_attribute_docstrings=True,
        protected_namespaces=(),
    )


def neuron_section_of(kind: str) -> type[Section]:
    """The keys of a kind of neuron beside ``kind``: the fields that its class declares."""
    cls: Any = neurons.class_of(kind)
    return _section_of(cls)


@functools.cache
def _section_of(cls: Any) -> type[Section]:
    hints, keys = get_type_hints(cls), dict[str, Any]()
    for one in dataclasses.fields(cls):
        described = Field(
            default=one.default, description=one.metadata["doc"], **one.metadata["bounds"]
        )
        keys[one.name] = (hints[one.name], described)
    made: type[Section] = pydantic.create_model(f"{cls.__name__}Section", __base__=Section, **keys)
    return made


def _neuron(value: Any) -> NeuronConfig:
    """Make the neuron of a mapping of its kind and numbers; messages.py says what is wrong."""
    if isinstance(value, NeuronConfig):
        return value
    if not isinstance(value, dict):
        raise PydanticCustomError("neuron", "must hold keys and values")
    numbers = dict(value)
    kind = numbers.pop("kind", "lif")
    if kind not in NEURONS:
        text = f"kind: {NEURONS.none_of(str(kind))}"
        raise PydanticCustomError("neuron_numbers", "{text}", {"text": text})
    section = neuron_section_of(kind)
    try:
        return NEURONS[kind](**dict(section.model_validate_json(json.dumps(numbers))))
    except pydantic.ValidationError as error:
        context = {"errors": error.errors(), "known": ["kind", *section.model_fields]}
        raise PydanticCustomError("within", "see its errors", context) from error
    except ValueError as error:
        raise PydanticCustomError("neuron_numbers", "{text}", {"text": str(error)}) from error


Neuron = Annotated[NeuronConfig, PlainValidator(_neuron), PlainSerializer(neurons.as_dict)]


def network_neuron(model: Mapping[str, Any]) -> NeuronConfig:
    """The neuron that the network of a `model:` section was published with.

    It is LIF where there is no such network, which checks.py says.
    """
    name = model.get("name")
    if not isinstance(name, str) or not timm.is_model(name):
        return LIF()
    return models.default_neuron(name)


class ModelSection(Section):
    name: Annotated[str, OneOf(models.names)]
    """A model registered with timm, or one of your own; see imports."""
    num_classes: Annotated[int, Field(gt=1)] | None = None
    """Null: as many as the data set has."""
    neuron: Neuron
    """What is left out is as in the neuron that the network was published with."""
    arguments: dict[str, Any] = {}
    """Further arguments of the model, such as connect_function: add."""

    @pydantic.model_validator(mode="before")
    @classmethod
    def _with_whole_neuron(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        neuron = values.get("neuron", {})
        if not isinstance(neuron, dict):
            return values
        return values | {"neuron": neurons.completed(neuron, network_neuron(values))}

    @property
    def changed_by_kind(self) -> dict[str, tuple[str, str]]:
        """Keys whose values the neuron has by its kind, which is not that of the network's own.

        Each has two values: the own neuron's ("none" where it has no such key), and the present.
        """
        own, kind = network_neuron({"name": self.name}), type(self.neuron)
        old, new = (
            {
                k: v if isinstance(v, str) else json.dumps(v)
                for k, v in dataclasses.asdict(n).items()
            }
            for n in (own, self.neuron)
        )
        return {
            key: (old.get(key, "none"), value)
            for key, value in new.items()
            if kind is not type(own)
            and old.get(key) != value
            and getattr(self.neuron, key) == getattr(kind(), key)
        }

    def build(self, *, num_classes: int, timesteps: int) -> SpikingNetwork:
        """Make the model, initialised; see `create_model`."""
        return create_model(
            self.name,
            num_classes=num_classes,
            timesteps=timesteps,
            neuron=self.neuron,
            arguments=self.arguments,
        )


class ColorJitterSection(Section):
    """torchvision's ColorJitter: brightness 0.4 draws a factor from 0.6 to 1.4."""

    brightness: Annotated[float, Field(ge=0)] = 0.0
    """Pixels are multiplied by a factor from 1 - brightness to 1 + brightness."""
    contrast: Annotated[float, Field(ge=0)] = 0.0
    """Likewise, their distance from the image's mean."""
    saturation: Annotated[float, Field(ge=0)] = 0.0
    """Likewise, their distance from their own grey."""
    hue: Annotated[float, Field(ge=0, le=0.5)] = 0.0
    """Largest shift of the hue; 0.5 is half a circle."""


class MixingSection(Section):
    """How mixup and CutMix mix, where data.mixup or data.cutmix is above 0."""

    mode: Literal["sample", "batch"] = "sample"
    """sample: each sample with the one before it in its micro-batch, by a lambda of its own. batch:
    as timm does it, sample i with sample B - 1 - i, all by one lambda and one box."""
    probability: Annotated[float, Field(gt=0, le=1)] = 1.0
    """That a sample (mode=batch: a micro-batch) is mixed; timm's mixup_prob."""
    switch_probability: Annotated[float, Field(gt=0, lt=1)] = 0.5
    """With mixup and CutMix: that it is by CutMix; timm's mixup_switch_prob."""
    off_epoch: Annotated[int, Field(ge=0)] = 0
    """The first of the run's epochs, from 0 on, that mixes nothing; 0: all do. timm's
    mixup_off_epoch."""


class ErasingSection(Section):
    """Random erasing of rectangles of training images, after normalisation, as timm's."""

    probability: Fraction = 0.0
    """Of an image to have rectangles erased."""
    mode: Literal["pixel", "rand", "const"] = "pixel"
    """What is there instead: noise in every pixel, one random colour, or the mean's."""
    count: Annotated[int, Field(gt=0, le=100)] = 1
    """Most rectangles of an image; it gets from one to so many, which share the area of one."""


POLICIES = ("none", "cifar10", "imagenet", "trivial", "3a")


def _policy(text: str) -> str:
    if text in POLICIES:
        return text
    try:
        if text.split("-")[0] != "rand":
            raise ValueError(f"must be {', '.join(POLICIES)}, or RandAugment, as {EXAMPLE}")
        rand_augment(text)
    except ValueError as error:
        raise PydanticCustomError("policy", "{text}", {"text": str(error)}) from error
    return text


class DataSection(Section):
    kind: Literal["images", "events"] = "images"
    """images: decoded and augmented here. events: pre-binned tensors (T, 2, H, W)."""
    root: str
    """Folder that holds train/ and val/, each with one folder a class."""
    index: str | None = None
    """Folder of the index files; null: ROOT/index."""
    held_out: Share = 0.0
    """Share of the training samples of each class that is kept out of training, and evaluated on
    instead of the validation split, which is left unseen: to choose by. Which ones depends on seed;
    pieces of one recording stay together."""
    image_size: Pixels = 224
    """Height and width that the network sees."""
    resize: Pixels | None = None
    """Shorter side before evaluation's centre crop; null: image_size / 0.875."""
    crop: Literal["resized", "padded"] = "resized"
    """resized: RandomResizedCrop. padded: image_size pixels of the image with a black border, as
    is usual for CIFAR."""
    scale: tuple[Fraction, Fraction] = (0.08, 1.0)
    """RandomResizedCrop: share of the area."""
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    """RandomResizedCrop: width / height."""
    padding: Annotated[int, Field(ge=0)] = 4
    """crop=padded: width of the border."""
    flip: Fraction = 0.5
    """Probability of a horizontal flip."""
    roll: Annotated[int, Field(ge=0)] = 0
    """Events: largest shift in pixels, wrapping around, of a training sample."""
    event_augment: Literal["none", "nda", "snn_augment_wide"] = "none"
    """Events: one operation for each training sample. nda: roll, rotation or shear (Neuromorphic
    Data Augmentation); snn_augment_wide: as in QKFormer's code."""
    event_drop: Fraction = 0.0
    """Events: probability that a training sample loses some by EventDrop, whose paper takes 0.75:
    in a stretch of time, in an area, or at random."""
    auto_augment: Annotated[str, OneOf(lambda: (*POLICIES, EXAMPLE)), AfterValidator(_policy)] = (
        "none"
    )
    """Operations on colours and geometry: AutoAugment's policy for cifar10 or imagenet, trivial:
    TrivialAugment (wide), 3a: 3-Augment, rand-...: RandAugment, with timm's numbers m, n, p, mstd,
    mmax, inc."""
    color_jitter: ColorJitterSection = ColorJitterSection()
    cutout: Annotated[int, Field(ge=0)] = 0
    """Side of a square that is set to 0 (after normalisation); 0: none."""
    erasing: ErasingSection = ErasingSection()
    repeats: Positive = 1
    """Times that a sample comes in a row, augmented differently each time. An epoch is as long as
    without, of fewer samples."""
    mixup: Annotated[float, Field(ge=0)] = 0.0
    """Alpha of mixup, whose lambda is drawn from Beta(alpha, alpha); 0: off."""
    cutmix: Annotated[float, Field(ge=0)] = 0.0
    """Alpha of CutMix; 0: off. With mixup, too, it is one of them."""
    mixing: MixingSection = MixingSection()
    transforms: Names = ()
    """Transforms of one's own, by the names under which they are registered; applied to training
    samples in this order, after all the others but mixup and CutMix."""
    interpolation: Literal["bilinear", "bicubic"] = "bilinear"
    """Of resizing; where an image is made smaller, over all pixels that fall into one."""
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    """Of red, green and blue from 0 to 1, subtracted from the pixels."""
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    """What they are divided by after that."""
    device: Literal["cpu", "gpu"] = "cpu"
    """Where DALI decodes; gpu needs a GPU."""
    threads: Annotated[int, Field(gt=0, le=MOST_THREADS)] = 2
    """DALI's threads, per process."""
    prefetch: Annotated[int, Field(gt=0, le=MOST_PREFETCHED)] = 2
    """Batches decoded ahead."""
    own_process: bool | None = None
    """Load data in a process beside each that trains. Null: where that one drives a GPU, and its
    launches would wait for threads that prepare images."""

    @property
    def index_dir(self) -> Path:
        return Path(self.index) if self.index else Path(self.root) / "index"

    @property
    def resize_side(self) -> int:
        return self.resize or round(self.image_size / 0.875)


class BatchSection(Section):
    global_: Samples = Field(alias="global")
    """Samples of one optimiser step, whatever the number of processes."""
    micro: Samples
    """Samples of one forward pass on one process: what batch norm normalises over."""
    eval: Samples = 64
    """Samples of one evaluation batch on one process."""


class DistillationSection(Section):
    """Softer targets beside the labels: what a teacher, or the network itself, makes of the same
    input. With TET they are those of every timestep, with SDT of the time-mean."""

    teacher: str | None = None
    """A run folder (its last checkpoint), the folder of a checkpoint or an export, a .safetensors
    file (see init_checkpoint), hf:ORG/NAME, or timm:NAME. Null: none."""
    teacher_weights: str | None = None
    """Of a timm:NAME teacher: the file of its weights; null: timm downloads those it knows."""
    weight: Annotated[float, Field(ge=0)] = 0.2
    """Of the divergence from the teacher, where there is one."""
    teacher_alignment: TeacherAlignment = "plain"
    """plain: logits are compared as they are. error_aware, that of SeAl: where a timestep's class
    is wrong, its logit is replaced by that of the right class, and the teacher's of both by the
    smaller one."""
    self_weight: Annotated[float, Field(ge=0)] = 0.0
    """Of the divergence of each timestep from what the timesteps say together; 0: none. For TET
    only."""
    self_target: SelfTarget = "time_mean"
    """time_mean: the mean of all timesteps. correct_mean, that of full-range distillation: of those
    whose class is right, and equal shares of the classes where none is. similarity, that of SeAl:
    each timestep's own mean of the others, by their confidence and similarity to it."""
    temperature: Annotated[float, Field(gt=0)] = 2.0
    """Of both divergences: both sides' logits are divided by it; above 1 it shows more of the
    lesser classes."""


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


class SegmentsSection(Section):
    timesteps: Timesteps
    """Run each block over segments of so many timesteps, and recompute segment by segment."""


class BatchNormSection(Section):
    sync: bool = False
    """Normalise over the micro-batches of all processes together, not over each one's own. Batch
    statistics then depend on the number of processes, as they do not otherwise."""


class EmaSection(Section):
    """A moving average of the weights, which is evaluated beside them (docs/metrics.md). A run has
    it from its first step or not at all."""

    decay: Annotated[float, Field(gt=0, lt=1)] | None = None
    """The share that the average keeps at each step, such as 0.9998; null: there is none. Running
    statistics are averaged likewise. As in timm's ModelEmaV3 the first step is taken whole."""
    warmup: bool = False
    """Let the share rise to decay as 1 - step^(-2/3) does, timm's way, so that the average of the
    beginning is one of fewer steps."""


class SaveSection(Section):
    every_steps: Positive | None = None
    """Besides each epoch's end; null: only there."""
    keep_last: Annotated[int, Field(ge=2)] = 2
    """At least 2: the newest could be the one that a failing disk ruined."""


def _without_passwords(uri: str | None) -> str | None:
    # Whatever is written of a configuration is serialised; only the process itself has the rest.
    return None if uri is None else without_passwords(uri)


class TrackingSection(Section):
    mlflow: bool = True
    """Whether MLflow gets the run."""
    uri: Annotated[str | None, PlainSerializer(_without_passwords)] = None
    """MLflow's tracking URI; null: the SQLite file RUNS_DIR/mlflow.db. Give a server's user and
    password in MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD: no file keeps a password that
    is given here, so a continued run needs it again."""
    experiment: str = "tetdist"
    """MLflow's; also the project of wandb, where WANDB_PROJECT does not name one."""
    log_checkpoint: Literal["none", "last", "best"] = "none"
    """Copy this checkpoint's model.safetensors to MLflow when the run is finished."""
    trackers: Names = ()
    """Beside MLflow or instead of it: tensorboard, wandb, or your own; see imports."""
    register_: str | None = Field(default=None, alias="register")
    """Name of a model in MLflow's registry that gets the logged checkpoint as its next version."""


class ProfileSection(Section):
    steps: Annotated[tuple[Positive, Positive], BeforeValidator(_steps)]
    """First and last of the optimiser steps, counted from 1: [20, 30], or 20..30. It ends with the
    epoch at the latest."""


class RunConfig(Section):
    name: str
    """Of the run and its folder, of letters, digits and any of . _ -; a file without it gives its
    own."""
    imports: tuple[str, ...] = ()
    """Python files of your own, beside the configuration, that register models, neurons, losses,
    optimisers, transforms or trackers; docs/extending.md. --import FILE adds one."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    """Of everything that is drawn: initial weights, order of samples, augmentation, dropout."""
    model: ModelSection
    data: DataSection
    batch: BatchSection
    loss: LossSection = LossSection()
    phases: Annotated[tuple[PhaseSection, ...], Field(min_length=1)]
    precision: Literal["bf16", "fp32", "tf32", "fp16", "fp64"] = "bf16"
    """bf16, fp16 (GPU only): of convolutions, beside parameters in float32. tf32 (GPU only): fp32
    with the inputs of convolutions rounded to ten bits. fp64: for checks."""
    batch_norm: BatchNormSection = BatchNormSection()
    execution: Literal["fused", "reference"] = "fused"
    """reference runs the plain definitions of normalisation and neurons."""
    recompute: Literal["none", "blocks"] | SegmentsSection = "none"
    """Activation memory. blocks: keep each block's input only, compute the rest again; the same
    result to the bit. {timesteps: k}: the same over segments of k timesteps, for long T; batch
    norm then normalises each segment by itself, which is another network in training."""
    gradient_clipping: Annotated[float, Field(gt=0)] | None = None
    """Largest norm of the gradient, or what clip_mode says; null: it is not clipped."""
    clip_mode: Literal["norm", "value", "agc"] = "norm"
    """What gradient_clipping limits. norm: the norm of the whole gradient; value: each number of
    it; agc (adaptive): the gradient's norm of each filter, to so many times the weights' norm, but
    for the classifier, 0.01 say."""
    ema: EmaSection = EmaSection()
    non_finite_limit: Positive = 5
    """Steps in a row without a finite gradient after which the run ends; until then each of them
    changes nothing and is counted."""
    engine: Literal["deepspeed", "torch"] = "deepspeed"
    """torch: a few lines of plain torch, the check on DeepSpeed's result."""
    zero_stage: Literal[0, 1, 2] = 0
    """DeepSpeed's ZeRO. 1: the optimiser's state is divided among processes; 2: gradients, too."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: cuda where torch sees a GPU, else cpu."""
    cuda_graphs: bool = False
    """Have a GPU start a micro-batch's kernels, forward and backward, all at once: for small
    micro-batches, where it would wait for the host. With engine=torch. What a micro-batch needs
    stays reserved between them, beside what an evaluation takes. Shown right on no GPU yet: run
    tools/check_gpu.py there first."""
    deterministic: bool = False
    """Only algorithms that repeat to the bit on a GPU; slower. (On a CPU they all do.)"""
    max_steps: Positive | None = None
    """End after so many optimiser steps in all, for a try; schedules stay those of the phases."""
    log_every: Positive = 20
    """Optimiser steps between two lines of metrics."""
    plots: bool = True
    """Draw the pictures in RUN/plots, which takes a second or two at the first evaluation, at the
    last and now and then between."""
    reference: str | None = None
    """A published training on ImageNet, such as sew34: its accuracy after as many images is in the
    metrics and plots beside each evaluation, and a run that is far behind warns. More by
    tools/compare_runs.py --reference; an unknown name lists those that there are."""
    evaluate_every: Positive = 1
    """Epochs between two evaluations; the last epoch is always evaluated."""
    init_checkpoint: str | None = None
    """Weights and running statistics to begin with: a run folder (its last checkpoint), the folder
    of a checkpoint or an export, a .safetensors file (tools/convert.py makes one of other
    libraries' weights), or hf:ORG/NAME[@REVISION]. The optimiser starts anew."""
    start_phase: Annotated[int, Field(ge=0)] = 0
    """Begin with this phase, from init_checkpoint, as if those before it were done."""
    peer_timeout: Annotated[float, Field(gt=0)] = 600.0
    """Seconds without any progress of a process after which all others end."""
    record_samples: bool = False
    """Debugging aid: write ids and checksums of the samples of each step to samples-RANK.jsonl."""
    profile: ProfileSection | None = None
    """Time the operations of some steps on rank 0, by torch.profiler: RUN/profile/ gets a trace and
    a table of the dearest. Results stay the same."""
    resume: Literal["auto", "never", "must"] = "auto"
    """What to do about checkpoints in the run folder: auto continues if there are any."""
    runs_dir: str = "runs"
    """Folder of the run's folder, and of MLflow's database unless tracking.uri says another."""
    save: SaveSection = SaveSection()
    tracking: TrackingSection = TrackingSection()
    cluster: dict[str, Any] = {}
    """For launch/slurm.py, which checks it: partition, nodes, gpus_per_node, time, ..."""

    @property
    def run_dir(self) -> Path:
        return Path(self.runs_dir) / self.name

    @property
    def tracking_uri(self) -> str | None:
        if not self.tracking.mlflow:
            return None
        if self.tracking.uri:
            return self.tracking.uri
        return f"sqlite:///{(Path(self.runs_dir) / 'mlflow.db').resolve()}"

    def as_dict(self) -> dict[str, Any]:
        """Plain nested dictionaries and lists, as in YAML."""
        return self.model_dump(mode="json")

    def as_yaml(self) -> str:
        return yaml.safe_dump(self.as_dict(), sort_keys=False)


def phase_image_sizes(config: RunConfig, phase: PhaseSection) -> tuple[int, int]:
    """Training images' size in a phase's first epoch and in its last."""
    first = phase.image_size or config.data.image_size
    return first, phase.final_image_size or first
