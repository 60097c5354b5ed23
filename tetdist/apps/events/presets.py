"""Published data sets of event cameras: parameters and splits of published results.

A preset also describes the data set's folder, so that other folders are refused. docs/events.md has
the sources of its parameters, and what is known of its splits.
"""

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


@dataclass(frozen=True, kw_only=True)
class Preset:
    """Published data set, with the settings that convert its recordings to tensors.

    Attributes:
        layout: Its layout, one of those that `list_sources` reads.
        some_classes: Class names; any folder of this data set has at least one of them.
        classes: Number of classes of the whole data set.
        sensor: Size of the sensor, if the format does not store it.
        timesteps, size, values: See `Binning`.
        splits: The published results that used each split.
    """

    title: str
    tree: str
    layout: Layout
    suffix: str
    some_classes: tuple[str, ...]
    classes: int
    recordings: int
    sensor: Sensor | None = None
    timesteps: int = 10
    size: Sensor
    values: Values = "count"
    splits: dict[str, str]

    def options(self) -> dict[str, Any]:
        """Return the values that the preset sets, by option of tools/prebin_dvs.py."""
        options: dict[str, Any] = {
            "timesteps": self.timesteps,
            "size": self.size,
            "bins": "count",
            "values": self.values,
            "split": ",".join(self.splits),
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
        size=Sensor(48, 48),
        values="published",
        splits={
            "first-90-percent": (
                "TET's code of 2024; the paper's 9,000 to train and 1,000 to test (83.17 %)"
            ),
            "first-70-percent": "TET's code of 2022",
            "0-99-test": "TEBN, PSN; easier than a random split (spikingjelly's documentation)",
            "first-90-percent-by-letters": (
                "SEW-ResNet, QKFormer, Spike-driven Transformer (spikingjelly's code)"
            ),
            "stratified-9-1": (
                "no result with this seed; SeAl and temporal-decoupling distillation draw 9,000 and"
                " 1,000 over all classes"
            ),
        },
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
        timesteps=16,
        size=Sensor(128, 128),
        splits={
            "published": (
                "SEW-ResNet, QKFormer, Spike-driven Transformer: 1,176 gestures to train, 288 to"
                " test; tonic's loader has 1,077 and 264, so its results are on other gestures"
            ),
        },
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
        size=Sensor(48, 48),
        splits={
            "first-90-percent": (
                "Neuromorphic Data Augmentation, approximately: its code takes the first 90 % in"
                " the file system's order, which is not reproducible"
            ),
            "stratified-9-1": "no result with this seed; there is no official split",
        },
    ),
    "n-cars": Preset(
        title="N-CARS",
        tree="n-cars_train/cars/*.dat, n-cars_train/background/*.dat, and n-cars_test/ alike",
        layout="parts",
        suffix=".dat",
        some_classes=("cars", "background"),
        classes=2,
        recordings=24_029,
        sensor=Sensor(120, 100),
        size=Sensor(48, 48),
        splits={"published": "all results on N-CARS: 15,422 to train and 8,607 to test"},
    ),
    "nmnist": Preset(
        title="N-MNIST",
        tree="Train/0/*.bin to Train/9/*.bin, and Test/ alike",
        layout="parts",
        suffix=".bin",
        some_classes=tuple("0123456789"),
        classes=10,
        recordings=70_000,
        size=Sensor(34, 34),
        splits={"published": "all results on N-MNIST: 60,000 to train and 10,000 to test"},
    ),
}


def expectation(name: str) -> str:
    """Return a preset's expected data set, as the beginning of a sentence."""
    preset = PRESETS[name]
    return (
        f"--preset {name} expects {counted(preset.classes, 'class')} in"
        f" {counted(preset.recordings, 'recording')}, {preset.tree}"
    )


def check_source(name: str, root: Path, sources: Sequence[Source]) -> str | None:
    """Check that a folder holds the recordings of a preset's data set.

    Returns:
        A warning if its numbers of classes or recordings differ from the data set's.
    """
    preset = PRESETS[name]
    usable = [source for source in sources if source.pieces]
    classes = {piece.class_name for source in usable for piece in source.pieces}
    others = [source.path for source in usable if not source.path.lower().endswith(preset.suffix)]
    if _layout(usable) != preset.layout:
        difference = f"{root} has another layout, such as {usable[0].path}"
    elif others:
        difference = f"{others[0]} is not {preset.suffix}"
    elif not classes.intersection(preset.some_classes):
        difference = f"no class is named {' or '.join(preset.some_classes[:3])}"
    elif (len(classes), len(usable)) != (preset.classes, preset.recordings):
        return (
            f"warning: {root} holds {counted(len(classes), 'class')} in"
            f" {counted(len(usable), 'recording')}, but {preset.title} has {preset.classes} in"
            f" {preset.recordings:,}, so results are not those of the whole data set"
        )
    else:
        return None
    raise UserError(
        f"{expectation(name)}, but {difference}; give the data set's folder, or --timesteps and so"
        " on instead of the preset"
    )


def _layout(sources: Sequence[Source]) -> Layout:
    if any(piece.window for source in sources for piece in source.pieces):
        return "labels"
    return "parts" if any(source.part for source in sources) else "classes"
