"""Comparison of a run with a published training curve, from the third epoch on.

published_curves.yaml holds the published curves and their recipes. A run with other epochs, batches
or augmentation has another curve; the comparison lists the differences, and the user must judge
whether they explain a gap.
"""

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tetdist.apps.reports import runs_table
from tetdist.apps.reports.runs_table import RunRecord
from tetdist.config.yaml_files import read_yaml
from tetdist.errors import UserError
from tetdist.tables import aligned, number

CURVES = Path(__file__).with_name("published_curves.yaml")
# Size of the training split and number of classes of ImageNet, which all published curves use.
IMAGES, IMAGENET_CLASSES = 1_281_167, 1000
CHANCE = 100 / IMAGENET_CLASSES  # percent
HELD_OUT = 0.05  # largest fraction of missing images with which a run still trains on ImageNet
# Tolerance in points of top-1 for differences between seeds and between positions in an epoch. It
# is our choice, wide where curves are steep, since nobody has published several seeds. It is at
# most SHARE of the reference's top-1, which matters in the first epochs.
EARLY, LATER, SHARE = 5.0, 1.5, 0.5
STEEP_EPOCHS = 10


@dataclass(frozen=True)
class Reference:
    """Published training on ImageNet."""

    name: str
    what: str  # network, loss and T
    source: str  # of the curve
    caveat: str | None  # limitation of the numbers
    epochs: int  # of the whole training
    top1: dict[float, float]  # percent, by epoch
    recipe: dict[str, Any]  # as keys of our configuration
    begins_with: str | None = None  # source of its initial weights; None: random weights
    of_average: bool = False  # True if the top-1 is that of a moving average of the weights

    def at(self, epochs: float) -> float | None:
        """Return the top-1 after a number of epochs, interpolated in the logarithm of the epochs;
        None before the first and after the last published one."""
        known = sorted(self.top1)
        if not (1 - HELD_OUT) * known[0] <= epochs <= 1.01 * known[-1]:
            return None
        # An epoch has fewer images if some are held out, or without the incomplete batch.
        top1 = [self.top1[epoch] for epoch in known]
        return float(np.interp(math.log(epochs), np.log(known), top1))

    def reached(self, top1: float) -> float | None:
        """Return the epoch at which it first reached a top-1; None: never, or before its first."""
        known = sorted(self.top1)
        if self.top1[known[0]] == top1:
            return known[0]
        for before, after in itertools.pairwise(known):
            low, high = self.top1[before], self.top1[after]
            if low < top1 <= high:
                return before * (after / before) ** ((top1 - low) / (high - low))
        return None

    def obstacle(self, classes: int, has_average: bool) -> str | None:
        """Return why a run with these data cannot be compared with it; None if it can."""
        if classes != IMAGENET_CLASSES:
            theirs = f"{self.name} has ImageNet's {IMAGENET_CLASSES:,} classes"
            return f"{theirs} and these data have {classes:,}"
        if self.of_average and not has_average:
            return f"{self.name} is of a moving average and this run keeps none (set ema.decay)"
        return None

    def beside(self, images: int) -> dict[str, float]:
        """Return the metrics' entry: the published top-1 after as many images, if known."""
        top1 = self.at(images / IMAGES)
        return {} if top1 is None else {"reference_top1": top1}

    def warning(self, top1: float, images: int) -> str | None:
        """Return a warning if a run is far behind after as many of ImageNet's images."""
        epochs = images / IMAGES
        there = self.at(epochs)
        if there is None or is_chance(there) or there - top1 <= tolerated(epochs, there):
            return None
        return (
            f"{there - top1:.1f} points behind {self.name}, which had {there:.2f} % after as many "
            "images; tools/compare_runs.py --reference lists the differences"
        )


@dataclass(frozen=True)
class Point:
    """Evaluation of the run with the reference's top-1; None where the reference has none."""

    epoch: float  # of the run's data
    top1: float  # percent
    images: int  # that the run has seen, with repetitions
    at_epoch: float | None  # the reference's top-1 after as many epochs
    at_images: float | None  # the reference's top-1 after as many images


@dataclass(frozen=True)
class Verdict:
    """Verdict on a run; ``on_the_way`` is None if no comparison is possible."""

    run: str
    reference: str
    on_the_way: bool | None
    sentence: str
    points: list[Point]
    differences: dict[str, tuple[Any, Any]]  # by key: the run's value, the reference's


def references() -> dict[str, Reference]:
    """Return all published curves, by name."""
    found = {}
    for name, about in read_yaml(CURVES).items():
        top1 = {float(epoch): value for epoch, value in about.pop("top1").items()}
        found[name] = Reference(name=name, top1=top1, caveat=about.pop("caveat", None), **about)
    return found


def find_reference(name: str, key: str = "--reference") -> Reference:
    """Return the published curve that a flag or a key of the configuration names.

    Raises:
        UserError: There is no such curve; the text lists all.
    """
    known = references()
    if name not in known:
        raise UserError(
            f"{key}: there is no published curve {name!r}; choose from {', '.join(known)}"
        )
    return known[name]


def verdict(record: RunRecord, reference: Reference) -> Verdict:
    """Compare a run's evaluations with a published curve at equal epochs and at equal images."""
    if record.configuration is None:
        raise UserError(
            f"{record.name}: --reference needs the run's folder, because its config.yaml has the "
            "batch size"
        )
    batch = record.configuration["batch.global"]
    lines = record.of_kind("val_ema" if reference.of_average else "val")
    points = [
        Point(
            line["epoch"],
            line["top1"],
            line["step"] * batch,
            reference.at(line["epoch"]),
            reference.at(line["step"] * batch / IMAGES),
        )
        for line in lines
    ]
    phase = lines[-1].get("phase", 0) if lines else 0
    differences = _differences(_of_the_batch(record.configuration, phase), reference, phase)
    ends = [of_kind[-1] for of_kind in (record.of_kind("train"), lines) if of_kind]
    diverged = [line for line in ends if not math.isfinite(line.get("loss", 0.0))]
    if diverged:
        reason = f"its loss after {diverged[0]['epoch']:g} epochs is {diverged[0]['loss']}"
        judged: tuple[bool | None, str] = (False, f"{record.name} has diverged: {reason}.")
    else:
        judged = _judge(record.name, points, reference)
    on_the_way, sentence = judged
    if differences:
        listed = [
            f"{key} {'unset' if ours is None else ours} "
            f"(theirs {'unset' if theirs is None else theirs})"
            for key, (ours, theirs) in differences.items()
        ]
        sentence += f" Its configuration differs in {', '.join(listed)}."
    return Verdict(record.name, reference.name, on_the_way, sentence, points, differences)


def _judge(name: str, points: Sequence[Point], reference: Reference) -> tuple[bool | None, str]:
    compared = [point for point in points if point.at_images is not None]
    per_epoch = points[-1].images / points[-1].epoch if points else IMAGES
    last = compared[-1] if compared else None
    if not is_imagenet(per_epoch):
        text = (
            f"{name} cannot be compared with {reference.name}: its epochs have {per_epoch:,.0f} "
            f"images, those of ImageNet {IMAGES:,}."
        )
        if last is not None:
            text += (
                f" After as many images as {last.images / IMAGES:.1f} epochs of ImageNet, it has "
                f"{last.top1:.2f} %, where {reference.name} had about {last.at_images:.2f} %."
            )
        return None, text
    if last is None:
        what = "evaluation of an average (ema.decay)" if reference.of_average else "evaluation"
        return None, (
            f"{name} cannot be compared with {reference.name} yet: it has no {what} after "
            f"{min(reference.top1):g} to {max(reference.top1):g} epochs of ImageNet's images."
        )
    assert last.at_images is not None
    has = f"{last.top1:.2f} % after {last.epoch:g} epochs"
    had = f"{reference.name} had about {last.at_images:.2f} %"
    epochs = last.images / IMAGES  # of the reference
    if is_chance(last.at_images):
        return None, (
            f"{name} has {has}, where {reference.name} was still at chance ({last.at_images:.2f} "
            "%), so it is too early for a verdict."
        )
    behind = last.at_images - last.top1
    if behind <= tolerated(epochs, last.at_images):
        ahead = f", {-behind:.1f} points ahead" if behind < -LATER else ""
        return True, f"{name} is on track{ahead}: {has}, where {had}."
    since = reference.reached(last.top1)
    if since is not None and since < epochs:
        had += f", and {last.top1:.2f} % after {since:.1f} epochs"
    return False, f"{name} is {behind:.1f} points behind: {has}, where {had}."


def tolerated(epochs: float, top1: float) -> float:
    """Return the points by which a run may be behind a reference with this top-1 and epoch."""
    return min(EARLY if epochs <= STEEP_EPOCHS else LATER, SHARE * top1)


def is_chance(top1: float) -> bool:
    """Return whether a top-1 on ImageNet, in percent, may be chance."""
    return top1 < 2 * CHANCE


def is_imagenet(images: float) -> bool:
    """Return whether a training split of this size can be ImageNet's, or most of it."""
    return abs(images / IMAGES - 1) <= HELD_OUT


def _of_the_batch(configuration: Mapping[str, Any], phase: int) -> dict[str, Any]:
    """Return the configuration with a phase's learning rate scaled to the batch size."""
    lr = f"phases.{phase}.optimizer.lr"
    per = configuration.get(f"{lr}_per")
    if per is None:
        return dict(configuration)
    return {**configuration, lr: configuration[lr] * configuration["batch.global"] / per}


def _differences(
    configuration: Mapping[str, Any], reference: Reference, phase: int
) -> dict[str, tuple[Any, Any]]:
    """Return the run's and the reference's values of differing keys, in the run's present phase."""
    kind = "model.neuron.kind"
    recipe = {
        key.replace("phases.0.", f"phases.{phase}."): value
        for key, value in reference.recipe.items()
    }
    found = {
        key: (configuration.get(key), theirs)
        for key, theirs in recipe.items()
        if configuration.get(key) != theirs
    }
    if kind in found:  # for another kind of neuron, the other keys of neurons do not compare
        found = {key: pair for key, pair in found.items() if "model.neuron." not in key} | {
            kind: found[kind]
        }
    if (begins_with := configuration.get("init_checkpoint")) is None:
        if reference.begins_with is not None:
            found["init_checkpoint"] = (None, reference.begins_with)
    elif reference.begins_with is None:
        found["init_checkpoint"] = (begins_with, None)
    return found


def curve(reference: Reference, until: float) -> tuple[list[float], list[float]]:
    """Return epochs and top-1 of the published curve, up to a number of epochs."""
    epochs = [epoch for epoch in sorted(reference.top1) if epoch <= until]
    if epochs and epochs[-1] < until and reference.at(until) is not None:
        epochs.append(until)
    return epochs, [top1 for epoch in epochs if (top1 := reference.at(epoch)) is not None]


def report(verdicts: Sequence[Verdict], published: Reference) -> str:
    """Return the comparison of runs with a published training as text."""
    of_published = f"{published.what}, {published.epochs} epochs ({published.source})"
    caveat = f"\n  caveat: {published.caveat}" if published.caveat else ""
    texts = [f"{published.name}: {of_published}{caveat}"]
    for found in verdicts:
        rows = [["epoch", "top-1 %", f"{found.reference} at equal epochs", "at equal images"]]
        for point in found.points:
            values = (point.top1, point.at_epoch, point.at_images)
            rows.append([f"{point.epoch:g}", *(number(value, ".2f") for value in values)])
        texts.append(f"{found.run}\n{aligned(rows, right=range(4))}\n{found.sentence}")
    return "\n\n".join(texts)


def plot(records: Sequence[RunRecord], published: Reference | None, out: Path) -> None:
    """Draw the curves of runs together with a published one.

    Raises:
        UserError: matplotlib is not installed.
        OSError: The file cannot be written.
    """
    if published is None:
        runs_table.plot(records, out)
        return
    if published.of_average:
        records = [record.of_average() for record in records]
    evaluated = [line["epoch"] for record in records for line in record.of_kind("val")]
    # Cut the published curve at the runs' last epoch; the rest would squeeze their curves.
    shown = curve(published, max(evaluated, default=1.0))
    runs_table.plot(records, out, (f"{published.name} (published)", *shown))
