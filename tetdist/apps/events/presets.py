"""Published data sets of event cameras: the parameters and splits that results on them have.

A preset says where each of its numbers is from and what is known of how hard each split is. It also
says what the data set's folder looks like, so that another one is not taken for it.
"""

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from tetdist.apps.events.binning import Values
from tetdist.apps.events.folders import Source
from tetdist.apps.events.recording import Sensor
from tetdist.errors import UserError
from tetdist.wording import counted

# CLASS/FILE; PART/CLASS/FILE; FILE with FILE_labels.csv.
Layout = Literal["classes", "parts", "labels"]


@dataclass(frozen=True)
class PresetSplit:
    """A split that a preset makes.

    Attributes:
        name: One of `splits.NAMES`.
        behind: Which published results were measured on it.
        ease: What is known of how easy it is.
    """

    name: str
    behind: str
    ease: str


@dataclass(frozen=True)
class Preset:
    """A published data set, and how its recordings become tensors.

    Attributes:
        title: Its name in the literature.
        tree: What its folder holds, for a person.
        layout: The same as one of the layouts that `list_sources` reads.
        suffix: Suffix of its recordings.
        some_classes: Names of classes, of which any folder of this data set has some.
        classes: How many classes the whole data set has.
        recordings: How many files with recordings.
        sensor: Size of the sensor, where the format does not say it.
        timesteps: T.
        size: Width and height of the frames.
        bins: As in `Binning`.
        values: As in `Binning`.
        splits: The splits that are made.
        origin: Where these parameters are from.
    """

    title: str
    tree: str
    layout: Layout
    suffix: str
    some_classes: tuple[str, ...]
    classes: int
    recordings: int
    sensor: Sensor | None
    timesteps: int
    size: Sensor
    bins: str
    values: Values
    splits: tuple[PresetSplit, ...]
    origin: str

    def options(self) -> dict[str, Any]:
        """Values that the preset sets, by the option of tools/prebin_dvs.py."""
        options: dict[str, Any] = {
            "timesteps": self.timesteps,
            "size": self.size,
            "bins": self.bins,
            "values": self.values,
            "split": ",".join(split.name for split in self.splits),
        }
        return options | {"sensor": self.sensor} if self.sensor else options


_CIFAR10 = "airplane automobile bird cat deer dog frog horse ship truck"

PRESETS = {
    "cifar10-dvs": Preset(
        title="CIFAR10-DVS",
        tree="airplane/*.aedat to truck/*.aedat",
        layout="classes",
        suffix=".aedat",
        some_classes=tuple(_CIFAR10.split()),
        classes=10,
        recordings=10_000,
        sensor=None,
        timesteps=10,
        size=Sensor(48, 48),
        bins="count",
        values="published",
        splits=(
            PresetSplit(
                "first-90-percent",
                "TET's code of 2024; the paper's 9,000 to train and 1,000 to test (83.17 %)",
                "not known; neighbours in the order of numbers are kept apart",
            ),
            PresetSplit(
                "first-70-percent",
                "TET's code of 2022",
                "not known; 7,000 to train are fewer than the others' 9,000",
            ),
            PresetSplit(
                "0-99-test",
                "TEBN, PSN",
                "easy: spikingjelly's documents say typically much higher than on a random split",
            ),
            PresetSplit(
                "first-90-percent-by-letters",
                "SEW-ResNet, QKFormer, Spike-driven Transformer (spikingjelly's code)",
                "as first-90-percent, of whose 100 to test of each class it has 91",
            ),
            PresetSplit(
                "stratified-9-1",
                "none by its seed; SeAl and temporal-decoupling distillation draw 9,000 and 1,000"
                " over all classes",
                "what spikingjelly's documents compare 0-99-test with",
            ),
        ),
        origin="TET's paper and code (Deng et al., ICLR 2022)",
    ),
    "dvs128-gesture": Preset(
        title="DVS128 Gesture",
        tree="user01_fluorescent.aedat and others, each with its _labels.csv, and"
        " trials_to_train.txt and trials_to_test.txt",
        layout="labels",
        suffix=".aedat",
        some_classes=tuple(str(number) for number in range(1, 12)),
        classes=11,
        recordings=122,
        sensor=None,
        timesteps=16,
        size=Sensor(128, 128),
        bins="count",
        values="count",
        splits=(
            PresetSplit(
                "published",
                "SEW-ResNet, QKFormer, Spike-driven Transformer: 1,176 gestures to train, 288 to"
                " test; tonic's loader has 1,077 and 264, so results with it are on others",
                "nobody is in both parts; one gesture of the 288 is 0.35 %",
            ),
        ),
        origin="the codes of SEW-ResNet and QKFormer, which bin as spikingjelly does",
    ),
    "n-caltech101": Preset(
        title="N-Caltech101",
        tree="accordion/*.bin to yin_yang/*.bin, the folder Caltech101 of its archive",
        layout="classes",
        suffix=".bin",
        some_classes=("BACKGROUND_Google", "Faces_easy", "Motorbikes", "airplanes"),
        classes=101,
        recordings=8709,
        sensor=Sensor(240, 180),
        timesteps=10,
        size=Sensor(48, 48),
        bins="count",
        values="count",
        splits=(
            PresetSplit(
                "first-90-percent",
                "Neuromorphic Data Augmentation, nearly: its code takes the first 90 % in whatever"
                " order the file system lists them, which nobody can repeat",
                "not known; of some classes 4 recordings are to test",
            ),
            PresetSplit(
                "stratified-9-1",
                "none by its seed; there is no official split",
                "not known; of some classes 4 recordings are to test",
            ),
        ),
        origin="the code of Neuromorphic Data Augmentation (Li et al., ECCV 2022), but for its"
        " resizing, which takes single pixels",
    ),
    "n-cars": Preset(
        title="N-CARS",
        tree="n-cars_train/cars/*.dat, n-cars_train/background/*.dat and n-cars_test/ likewise",
        layout="parts",
        suffix=".dat",
        some_classes=("cars", "background"),
        classes=2,
        recordings=24_029,
        sensor=Sensor(120, 100),
        timesteps=10,
        size=Sensor(48, 48),
        bins="count",
        values="count",
        splits=(
            PresetSplit(
                "published",
                "all results on N-CARS: 15,422 to train and 8,607 to test",
                "two classes; always saying cars is 51 %",
            ),
        ),
        origin="ours, those of N-Caltech101: no released code for spiking networks was found",
    ),
    "nmnist": Preset(
        title="N-MNIST",
        tree="Train/0/*.bin to Train/9/*.bin and Test/ likewise",
        layout="parts",
        suffix=".bin",
        some_classes=tuple("0123456789"),
        classes=10,
        recordings=70_000,
        sensor=None,
        timesteps=10,
        size=Sensor(34, 34),
        bins="count",
        values="count",
        splits=(
            PresetSplit(
                "published",
                "all results on N-MNIST: 60,000 to train and 10,000 to test",
                "easy: most published results are above 99 %",
            ),
        ),
        origin="T of parametric LIF neurons (Fang et al., ICCV 2021), and the sensor's size",
    ),
}


def expectation(name: str) -> str:
    """Return a preset's description of its data set, as the beginning of a sentence."""
    preset = PRESETS[name]
    return (
        f"--preset {name} expects {counted(preset.classes, 'class')} in"
        f" {counted(preset.recordings, 'recording')}, {preset.tree}"
    )


def check_source(name: str, root: Path, sources: Sequence[Source]) -> str | None:
    """See that a folder holds the recordings of a preset's data set.

    Args:
        name: One of `PRESETS`.
        root: The folder.
        sources: What it holds.

    Returns:
        What is to be said where its numbers of classes or recordings are not the data set's.

    Raises:
        UserError: It looks otherwise.
    """
    preset = PRESETS[name]
    usable = [source for source in sources if source.pieces]
    classes = {piece.class_name for source in usable for piece in source.pieces}
    others = [source.path for source in usable if not source.path.lower().endswith(preset.suffix)]
    if _layout(usable) != preset.layout:
        difference = f"{root} is laid out otherwise, see {usable[0].path}"
    elif others:
        difference = f"{others[0]} is no {preset.suffix}"
    elif not classes.intersection(preset.some_classes):
        difference = f"no class is called {' or '.join(preset.some_classes[:3])}"
    elif (len(classes), len(usable)) != (preset.classes, preset.recordings):
        return (
            f"{root} holds {counted(len(classes), 'class')} in {counted(len(usable), 'recording')},"
            f" and {preset.title} is {preset.classes} in {preset.recordings:,}: results are not"
            " those of the whole data set"
        )
    else:
        return None
    raise UserError(
        f"{expectation(name)}, and {difference}: name that folder, or give --timesteps and so on"
        " instead of the preset"
    )


def _layout(sources: Sequence[Source]) -> Layout:
    if any(piece.window for source in sources for piece in source.pieces):
        return "labels"
    return "parts" if any(source.part for source in sources) else "classes"


def presets_in_words() -> str:
    """All presets, their parameters and their splits, for a person."""
    return "\n\n".join(_in_words(name, preset) for name, preset in PRESETS.items())


def _in_words(name: str, preset: Preset) -> str:
    flags = [f"--{option} {value}" for option, value in preset.options().items()]
    lines = [
        f"{name}: {preset.title}, {preset.classes} classes in {preset.recordings:,} recordings",
        f"  SOURCE      {preset.tree}",
        f"  options     {' '.join(flags)}",
        f"  origin      {preset.origin}",
    ]
    for split in preset.splits:
        lines += [f"  {split.name}", f"    behind    {split.behind}", f"    ease      {split.ease}"]
    return "\n".join(textwrap.fill(line, 100, subsequent_indent=" " * 14) for line in lines)
