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
    """Pixels are multiplied by a factor from 1 - brightness to 1 + brightness."""
    contrast: Annotated[float, Field(ge=0)] = 0.0
    """Distances of pixels from the image's mean are multiplied by 1 - contrast to 1 + contrast."""
    saturation: Annotated[float, Field(ge=0)] = 0.0
    """Distances of pixels from their grey are multiplied by 1 - saturation to 1 + saturation."""
    hue: Annotated[float, Field(ge=0, le=0.5)] = 0.0
    """Largest shift of the hue; 0.5 is half a circle."""


class MixingSection(Section):
    """Details of mixup and CutMix, where data.mixup or data.cutmix is above 0."""

    mode: Literal["sample", "batch"] = "sample"
    """sample: each sample with the one before it in its micro-batch, by a lambda of its own. batch:
    as timm does it, sample i with sample B - 1 - i, all by one lambda and one box."""
    probability: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Probability of mixing a sample (with mode=batch, a micro-batch); timm's mixup_prob."""
    switch_probability: Annotated[float, Field(gt=0, lt=1)] = 0.5
    """Probability of CutMix rather than mixup, if both are on; timm's mixup_switch_prob."""
    off_epoch: Annotated[int, Field(ge=0)] = 0
    """The first of the run's epochs, from 0 on, that mixes nothing; 0: all do. timm's
    mixup_off_epoch."""


class ErasingSection(Section):
    """Random erasing of rectangles of training images, after normalisation, as timm's."""

    probability: Fraction = 0.0
    """Probability of random erasing for each image."""
    mode: Literal["pixel", "rand", "const"] = "pixel"
    """Contents of erased rectangles. pixel: noise; rand: a random colour; const: the mean."""
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
    """Interpolation of resizing; antialiased where an image is made smaller."""
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    """Per-channel mean (RGB, in [0, 1]) that is subtracted from the pixels."""
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    """Per-channel standard deviation (RGB, in [0, 1]) that images are divided by."""
    device: Literal["cpu", "gpu"] = "cpu"
    """Device on which DALI decodes; gpu needs a GPU."""
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
