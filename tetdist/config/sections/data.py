"""The section ``data``: where samples are, how they are read and changed."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, Field
from pydantic_core import PydanticCustomError

from tetdist.config.fields import Fraction, Names, OneOf, Pixels, Positive, Section, Share
from tetdist.config.flags import MOST_PREFETCHED, MOST_THREADS
from tetdist.config.rand_augment import EXAMPLE, rand_augment


class ColorJitterSection(Section):
    """torchvision's ColorJitter: brightness 0.4 draws a factor from 0.6 to 1.4."""

    brightness: Annotated[float, Field(ge=0)] = 0.0
    """Strength of brightness jitter: pixels are multiplied by a factor from 1 - brightness to 1 +
    brightness, as torchvision's ColorJitter; 0: off."""
    contrast: Annotated[float, Field(ge=0)] = 0.0
    """Strength of contrast jitter: distances from the image's mean grey are multiplied by 1 -
    contrast to 1 + contrast; 0: off."""
    saturation: Annotated[float, Field(ge=0)] = 0.0
    """Strength of saturation jitter: distances of pixels from their grey are multiplied by 1 -
    saturation to 1 + saturation; 0: off."""
    hue: Annotated[float, Field(ge=0, le=0.5)] = 0.0
    """Largest hue shift, as a fraction of the colour circle: 0.5 is half of it; 0: off."""


class MixingSection(Section):
    """Details of mixup and CutMix, where data.mixup or data.cutmix is above 0."""

    mode: Literal["sample", "batch"] = "sample"
    """Partners of mixup and CutMix. sample: each sample is mixed with the one before it in its
    micro-batch, with its own lambda. batch, timm's way: sample i is mixed with sample B - 1 - i,
    all with one lambda and one box."""
    probability: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Probability of mixing a sample (with mode=batch, a micro-batch); timm's mixup_prob."""
    switch_probability: Annotated[float, Field(gt=0, lt=1)] = 0.5
    """Probability of CutMix rather than mixup, if both are on; timm's mixup_switch_prob."""
    off_epoch: Annotated[int, Field(ge=0)] = 0
    """First epoch of the run, counted from 0, without mixup and CutMix; 0: all epochs mix. timm's
    mixup_off_epoch."""


class ErasingSection(Section):
    """Random erasing of rectangles of training images, after normalisation, as timm's."""

    probability: Fraction = 0.0
    """Probability of random erasing for each image; timm's reprob."""
    mode: Literal["pixel", "rand", "const"] = "pixel"
    """Contents of erased rectangles. pixel: noise; rand: a random colour; const: the mean. timm's
    remode."""
    count: Annotated[int, Field(gt=0, le=100)] = 1
    """Maximum number of erased rectangles an image; they share one rectangle's area. timm's
    recount."""


POLICIES = ("none", "cifar10", "imagenet", "trivial", "3a")


def _policy(text: str) -> str:
    if text in POLICIES:
        return text
    try:
        if text.split("-")[0] != "rand":
            raise ValueError(f"must be {', '.join(POLICIES)}, or RandAugment, such as {EXAMPLE}")
        rand_augment(text)
    except ValueError as error:
        raise PydanticCustomError("policy", "{text}", {"text": str(error)}) from error
    return text


class DataSection(Section):
    kind: Literal["images", "events"] = "images"
    """Type of the data. images: files that are decoded and augmented here; events: pre-binned
    tensors (T, 2, H, W)."""
    root: str
    """Folder that holds train/ and val/, each with one folder a class."""
    index: str | None = None
    """Folder of the index files; null: ROOT/index."""
    held_out: Share = 0.0
    """Fraction of each class's training samples that is held out: not trained on, and evaluated
    instead of the validation split. seed decides which; pieces of one recording stay together."""
    image_size: Pixels = 224
    """Height and width of the network's input, in pixels."""
    resize: Pixels | None = None
    """Length in pixels that evaluation resizes an image's shorter side to, before the centre crop;
    null: image_size / 0.875."""
    crop: Literal["resized", "padded"] = "resized"
    """Crop of training images. resized: torchvision's RandomResizedCrop; padded: a crop of
    image_size pixels from the image with a black border, as usual for CIFAR."""
    scale: tuple[Fraction, Fraction] = (0.08, 1.0)
    """Smallest and largest fraction of the image's area in a crop (crop=resized)."""
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    """Smallest and largest width / height of a crop (crop=resized)."""
    padding: Annotated[int, Field(ge=0)] = 4
    """Width of the border in pixels (crop=padded)."""
    flip: Fraction = 0.5
    """Probability of a horizontal flip of a training sample."""
    roll: Annotated[int, Field(ge=0)] = 0
    """Largest random shift of a training sample in pixels, wrapping around (kind=events); 0:
    off."""
    event_augment: Literal["none", "nda", "snn_augment_wide"] = "none"
    """Augmentation of event tensors, one operation for each training sample. nda: roll, rotation or
    shear (Neuromorphic Data Augmentation); snn_augment_wide: as in QKFormer's code."""
    event_drop: Fraction = 0.0
    """Probability of EventDrop for a training sample: it loses events in a stretch of time, in an
    area, or at random (kind=events). EventDrop's paper takes 0.75."""
    auto_augment: Annotated[str, OneOf(lambda: (*POLICIES, EXAMPLE)), AfterValidator(_policy)] = (
        "none"
    )
    """Policy of colour and geometry operations. cifar10, imagenet: AutoAugment's; trivial:
    TrivialAugment (wide); 3a: 3-Augment; rand-...: RandAugment with timm's numbers m, n, p, mstd,
    mmax, inc."""
    color_jitter: ColorJitterSection = ColorJitterSection()
    cutout: Annotated[int, Field(ge=0)] = 0
    """Side in pixels of a square of each training image that is set to 0 after normalisation; 0:
    off."""
    erasing: ErasingSection = ErasingSection()
    repeats: Positive = 1
    """Number of copies of a sample in a row, augmented differently (repeated augmentation; timm's
    aug_repeats). An epoch keeps its length and has fewer samples; 1: off."""
    mixup: Annotated[float, Field(ge=0)] = 0.0
    """Mixup's alpha: lambda is drawn from Beta(alpha, alpha); 0: off. timm's mixup."""
    cutmix: Annotated[float, Field(ge=0)] = 0.0
    """CutMix's alpha; 0: off. If mixup is on as well, each mixing uses one of the two. timm's
    cutmix."""
    mixing: MixingSection = MixingSection()
    transforms: Names = ()
    """Names of your own registered transforms; they change training samples in this order, after
    all others but mixup and CutMix."""
    interpolation: Literal["bilinear", "bicubic"] = "bilinear"
    """Interpolation of resizing; antialiased when an image is made smaller."""
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    """Per-channel mean (RGB, in [0, 1]) that is subtracted from the pixels."""
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    """Per-channel standard deviation (RGB, in [0, 1]) that images are divided by."""
    device: Literal["cpu", "gpu"] = "cpu"
    """Device on which DALI decodes; gpu needs a GPU."""
    threads: Annotated[int, Field(gt=0, le=MOST_THREADS)] = 2
    """Number of DALI threads a process."""
    prefetch: Annotated[int, Field(gt=0, le=MOST_PREFETCHED)] = 2
    """Number of batches decoded ahead."""
    own_process: bool | None = None
    """Load data in a separate process beside each training process. Null: only if training runs on
    a GPU, whose kernel launches would wait for the threads that prepare images."""

    @property
    def index_dir(self) -> Path:
        return Path(self.index) if self.index else Path(self.root) / "index"

    @property
    def resize_side(self) -> int:
        return self.resize or round(self.image_size / 0.875)
