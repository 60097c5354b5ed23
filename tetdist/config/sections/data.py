"""The section ``data``: where samples are, how they are read and changed."""

from pathlib import Path
from typing import Annotated, ClassVar, Literal, Self

from pydantic import AfterValidator, Field, model_validator

from tetdist.config.fields import Fraction, Names, OneOf, OpenFraction, Pixels, Positive, Section
from tetdist.config.flags import MOST_PIXELS, MOST_PREFETCHED, MOST_THREADS
from tetdist.config.rand_augment import EXAMPLE, rand_augment
from tetdist.errors import WrongValue

Kind = Literal["images", "events"]
Amount = Annotated[float, Field(ge=0)]


class ImagesAsEventsSection(Section):
    """Conversion of images to events by differences of their brightness (I2E)."""

    timesteps: ClassVar[int] = 8
    ratio: Annotated[float, Field(gt=0, lt=1)] = 0.12
    """Smallest difference in brightness that makes an event, as a fraction of the image's range of
    brightness (I2E's ratio: 0.12 for ImageNet at 224 pixels, 0.15 for Fashion-MNIST at 32)."""


class MixingSection(Section):
    """Details of mixup and CutMix, used if data.mixup or data.cutmix is above 0."""

    mode: Literal["sample", "batch"] = "sample"
    """Choice of partners in mixup and CutMix. sample: each sample is mixed with the one before it
    in its micro-batch, with its own lambda. batch (timm's way): the micro-batch is mixed with
    itself in reverse order, with one lambda and box for all samples."""
    probability: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Probability of mixing a sample (with mode=batch, a micro-batch); timm's mixup_prob."""
    off_epoch: Annotated[int, Field(ge=0, le=10**6)] = 0
    """First epoch of the run, counted from 0, without mixup and CutMix (timm's mixup_off_epoch); 0:
    all epochs mix."""


class ErasingSection(Section):
    """Random erasing of rectangles of training images, after normalisation, as timm's."""

    probability: Fraction = 0.0
    """Probability of random erasing for each image; timm's reprob."""
    mode: Literal["pixel", "rand", "const"] = "pixel"
    """Contents of erased rectangles (timm's remode). pixel: noise; rand: a random colour; const:
    the mean colour."""


POLICIES = ("none", "cifar10", "imagenet", "trivial", "3a")


def _policy(text: str) -> str:
    if text.split("-")[0] == "rand":
        rand_augment(text)
    elif text not in POLICIES:
        raise ValueError(f"must be {', '.join(POLICIES)}, or RandAugment, such as {EXAMPLE}")
    return text


class DataSection(Section):
    kind: Kind = "images"
    """Type of the data. images: image files; events: pre-binned event tensors (T, 2, H, W)."""
    root: str
    """Folder that holds train/ and val/, each with one folder per class."""
    index: str | None = None
    """Folder of the index files, which list all samples; null: the folder index in data.root."""
    held_out: OpenFraction = 0.0
    """Fraction of each class's training samples that is not trained on, but evaluated in place of
    the validation split. It depends on seed; all labelled intervals of a file stay together."""
    image_size: Pixels = 224
    """Height and width of the network's input, in pixels."""
    resize: Pixels | None = None
    """Length of an image's shorter side in evaluation, in pixels, before the centre crop of
    image_size; null: image_size / 0.875."""
    crop: Literal["resized", "padded"] = "resized"
    """Random crop of training images. resized: torchvision's RandomResizedCrop; padded: a square
    of image_size pixels, cut after a black border is added to the image, as usual for CIFAR."""
    scale: tuple[Fraction, Fraction] = (0.08, 1.0)
    """Smallest and largest area of a crop, as a fraction of the image's area."""
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    """Smallest and largest aspect ratio of a crop, width / height."""
    padding: Annotated[int, Field(ge=0, le=MOST_PIXELS)] = 4
    """Width of the black border around an image before it is cropped, in pixels."""
    flip: Fraction = 0.5
    """Probability of a horizontal flip of a training sample; timm's hflip."""
    roll: Annotated[int, Field(ge=0, le=MOST_PIXELS)] = 0
    """Largest random shift of a training sample in pixels, wrapping around; 0: off."""
    event_augment: Literal["none", "nda", "snn_augment_wide"] = "none"
    """Augmentation of event tensors, one random operation per training sample. nda: roll, rotation
    or shear (Neuromorphic Data Augmentation); snn_augment_wide: shear, shift, rotation,
    cutout or none of them, as in QKFormer's code."""
    auto_augment: Annotated[str, OneOf(lambda: (*POLICIES, EXAMPLE)), AfterValidator(_policy)] = (
        "none"
    )
    """Augmentation policy: random colour and geometry operations. cifar10, imagenet:
    AutoAugment's policies; trivial: TrivialAugment (wide); 3a: 3-Augment; rand-...: RandAugment
    with parameters m, n, p, mstd, mmax, inc. 3a and rand-... are as in timm's aa."""
    color_jitter: tuple[Amount, Amount, Amount, Annotated[float, Field(ge=0, le=0.5)]] = (0.0,) * 4
    """Largest random changes of brightness, contrast, saturation and hue, as torchvision's
    ColorJitter: pixels are multiplied by a factor from 1 - brightness to 1 + brightness; contrast
    and saturation scale their distances from the image's mean grey and from their own grey; hue (at
    most 0.5) is shifted by this fraction of the colour circle, either way. 0: off."""
    cutout: Annotated[int, Field(ge=0, le=MOST_PIXELS)] = 0
    """Side in pixels of a random square set to 0 in each (normalised) training sample; 0: off."""
    erasing: ErasingSection = ErasingSection()
    repeats: Positive = 1
    """Number of copies of each sample in a step, augmented differently (repeated augmentation;
    timm's aug_repeats). An epoch keeps its number of steps, so it shows fewer samples; 1: off."""
    mixup: Amount = 0.0
    """Mixup's alpha: lambda is drawn from Beta(alpha, alpha); 0: off (timm's mixup)."""
    cutmix: Amount = 0.0
    """CutMix's alpha: lambda is drawn from Beta(alpha, alpha); 0: off (timm's cutmix). If mixup is
    on, too, each mixing uses one of the two, equally often."""
    mixing: MixingSection = MixingSection()
    transforms: Names = ()
    """Names of your own transforms (see imports). They change training samples in this order, after
    all other augmentation except mixup and CutMix."""
    interpolation: Literal["bilinear", "bicubic"] = "bilinear"
    """Interpolation when an image is resized, with antialiasing when it gets smaller."""
    images_as_events: ImagesAsEventsSection | None = None
    """Conversion of each augmented image to eight frames of ON and OFF events (I2E), which the
    network sees in place of the image; null: off."""
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    """Per-channel mean (RGB, in [0, 1]) that is subtracted from the pixels."""
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    """Per-channel standard deviation (RGB, in [0, 1]); pixels less data.mean are divided by it."""
    device: Literal["cpu", "gpu"] = "cpu"
    """Device on which DALI (NVIDIA's data loader) decodes images; gpu needs training on a GPU, and
    gives slightly other pixels, so a resumed run must keep it."""
    threads: Annotated[int, Field(gt=0, le=MOST_THREADS)] = 2
    """Number of threads per process for each step of loading: reading, decoding, augmentation."""
    prefetch: Annotated[int, Field(gt=0, le=MOST_PREFETCHED)] = 2
    """Number of batches (in training: micro-batches) loaded ahead of the one in use."""

    @model_validator(mode="after")
    def _refuse_contradictions(self) -> Self:
        if self.scale[0] > self.scale[1] or self.scale[1] == 0:
            raise WrongValue("scale", "must ascend and end above 0", list(self.scale))
        if not 0 < self.ratio[0] <= self.ratio[1]:
            raise WrongValue("ratio", "must ascend, with both values above 0", list(self.ratio))
        if min(self.std) <= 0:
            raise WrongValue("std", "must be above 0", list(self.std))
        if self.resize is not None and self.resize < self.image_size:
            raise WrongValue(
                "resize",
                f"is smaller than data.image_size, {self.image_size}, so the centre crop would "
                "not fit; set it to the image size or more",
                self.resize,
            )
        if self.images_as_events and self.kind == "events":
            raise WrongValue("images_as_events", "needs data.kind=images, not events; remove it")
        if self.images_as_events and self.erasing.probability:
            raise WrongValue(
                "erasing.probability",
                "cannot go with data.images_as_events, since erasing fills in normalised colours; "
                "set it to 0",
                f"{self.erasing.probability:g}",
            )
        if self.auto_augment.startswith("rand") and any(self.color_jitter):
            raise WrongValue(
                "color_jitter",
                f"cannot go with data.auto_augment={self.auto_augment}, which "
                "changes colours itself (timm drops the jitter then); leave one of them out",
            )
        if self.device == "gpu" and self.transforms:
            raise WrongValue("transforms", "needs data.device=cpu, not gpu; set that")
        if self.crop == "padded" and self.padding >= self.image_size:
            raise WrongValue(
                "padding",
                f"is not below data.image_size, {self.image_size}, so a crop could be all border",
                self.padding,
            )
        return self

    @property
    def input_kind(self) -> Kind:
        """Type of the network's input."""
        return "events" if self.images_as_events else self.kind

    @property
    def index_dir(self) -> Path:
        return Path(self.index) if self.index else Path(self.root) / "index"

    @property
    def resize_side(self) -> int:
        return self.resize or round(self.image_size / 0.875)
