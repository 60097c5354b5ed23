"""The first hour on a machine: behind the checks an epoch on ImageNet, beside a published one.

The recipe trains in processes of its own, as the command `train` would: first a few steps, whose
rate tells how many fit into the hour, and then to the end of the epoch or of the hour.
"""

import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tetdist import order
from tetdist.apps.check_gpu import remedies
from tetdist.apps.check_gpu.check import (
    BAD,
    EXPECTED,
    IMPOSSIBLE,
    THROTTLED,
    TOO_FAST,
    Finding,
    Machine,
    word,
)
from tetdist.apps.check_gpu.rates import REACHED, SLOWLY
from tetdist.apps.check_gpu.run_train import run_train
from tetdist.apps.reports.reference import CHANCE, IMAGES, Reference, find_reference, tolerated
from tetdist.config import loading
from tetdist.errors import UserError
from tetdist.tracking.metrics_file import read_metrics
from tetdist.training.setup import open_data

RECIPE, HOUR = "sew34_t4.yaml", 3600.0
FIRST_STEPS = 50
# A CPU trains a smaller network on smaller images.
SMALL = (
    *("model.name=spiking_convnet", "model.arguments={}", "data.image_size=28", "data.resize=28"),
    *("batch.micro=16", "batch.global=64", "engine=torch"),
)
LOADING = (
    "the step itself is as fast as rates says, and waits for images: give each GPU more cores, put "
    "the data on a faster disk, or set data.device=gpu"
)
BEHIND = "compare the run by tools/compare_runs.py --reference sew34, and report both with the file"


@dataclass(frozen=True)
class Hour:
    """Training of the first hour.

    Attributes:
        obstacle: Reason why the data cannot be compared with it, if any.
        images_per_s: Rate computed for all GPUs; None: unknown.
        begun: When the hour began, by `time.monotonic`.
    """

    overrides: tuple[str, ...]
    batch: int
    steps: int
    reference: Reference
    obstacle: str | None
    images_per_s: float | None
    processes: int
    folder: Path
    begun: float

    def expected(self) -> str:
        """Return the numbers to be expected."""
        images = self.steps * self.batch
        rate, top1 = "unknown on this device", f"not comparable: {self.obstacle}"
        if self.images_per_s is not None:
            minutes = images / self.images_per_s / 60
            rate = f"{self.images_per_s:.0f} computed, {minutes:.0f} minutes an epoch"
        if self.obstacle is None:
            there = published(self.reference, images)
            top1 = f"{there:.1f} % after an epoch ({self.reference.name}, published)"
        return f"images/s {rate}; epoch {images:,} images; top-1 {top1}"


def published(reference: Reference, images: int) -> float:
    """Return the published top-1 after at most an epoch; before its end, between chance and it."""
    epochs, first = images / IMAGES, min(reference.top1)
    if (known := reference.at(epochs)) is not None:
        return known
    return CHANCE + (reference.top1[first] - CHANCE) * epochs / first


def prepare(here: Machine, overrides: Sequence[str]) -> Hour:
    """Read the recipe and open the data."""
    name = here.world.from_rank_0(time.strftime("first_hour_%Y%m%d_%H%M%S"))
    changes = [*(SMALL if here.small else ()), "tracking.mlflow=false", "log_every=10"]
    changes += [*overrides, f"name={name}", f"device={here.device.type}"]
    # The last one of a key counts.
    changes = list({change.partition("=")[0]: change for change in changes}.values())
    config = loading.load(RECIPE, changes)
    train, _ = open_data(config, here.world)
    reference = find_reference(config.reference or "sew34")
    return Hour(
        overrides=tuple(changes),
        batch=config.batch.global_,
        steps=order.steps_per_epoch(len(train), config.batch.global_),
        reference=reference,
        obstacle=reference.obstacle(len(train.classes), has_average=False),
        images_per_s=None,
        processes=here.world.world_size,
        folder=config.run_dir,
        begun=time.monotonic(),
    )


def train(here: Machine, hour: Hour) -> Finding:
    """Train for an epoch, or as many steps as fit into the rest of the hour; all processes."""
    first, started = min(FIRST_STEPS, hour.steps), time.monotonic()
    lines = _train_until(first, here, hour)
    rate = _images_per_s(lines)
    now = time.monotonic()
    # The start of the processes, and the evaluation.
    besides = now - started - first * hour.batch / rate
    left = 0.95 * (HOUR - (now - hour.begun) - besides)
    fitting = first + max(0, int(left * rate / hour.batch))
    steps = here.world.from_rank_0(min(hour.steps, fitting))
    if steps > first:
        lines = _train_until(steps, here, hour)
    return judged(hour, lines)


def _train_until(step: int, here: Machine, hour: Hour) -> list[dict[str, Any]]:
    """Train, or go on, until a step; return the run's metrics."""
    arguments = ("--config", RECIPE, *hour.overrides, f"max_steps={step}")
    done = run_train(here, *arguments, alone=hour.processes == 1)
    if any(here.world.gather(done.returncode)):
        raise UserError("the training failed; read its message above")
    return read_metrics(hour.folder / "metrics.jsonl")


def _images_per_s(lines: Sequence[Mapping[str, Any]]) -> float:
    return statistics.median_high(x["samples_per_s"] for x in lines if x["kind"] == "train")


def judged(hour: Hour, lines: Sequence[Mapping[str, Any]]) -> Finding:
    """Judge a training by its metrics."""
    windows = [one for one in lines if one["kind"] == "train"]
    top1 = [one["top1"] for one in lines if one["kind"] == "val"][-1]
    images, rate = windows[-1]["step"] * hour.batch, _images_per_s(lines)
    wait = statistics.median(one["data_wait"] for one in windows)
    numbers = {"expected": hour.expected(), "seconds": time.monotonic() - hour.begun}
    numbers |= {"images": images, "images_per_s": rate, "data_wait": wait, "top1": top1}
    text = f"top-1 {top1:.2f} % after {images:,} images, {rate:.0f} images/s"
    reached, remedy = EXPECTED, None
    if hour.images_per_s is not None:
        reached = word(rate / hour.images_per_s, REACHED, SLOWLY)
        text += f" {reached} (computed {hour.images_per_s:.0f})"
    if reached == TOO_FAST:
        remedy = IMPOSSIBLE
    elif reached != EXPECTED and wait > 10:
        remedy = LOADING
    elif reached != EXPECTED:
        remedy = THROTTLED if hour.processes == 1 else remedies.NETWORK
    is_bad = reached in BAD
    if hour.obstacle is not None:
        text += f"; not compared: {hour.obstacle}"
    else:
        numbers["published_top1"] = there = published(hour.reference, images)
        text += f"; {hour.reference.name} had {there:.2f} % after as many"
        if there - top1 > tolerated(images / IMAGES, there):
            is_bad, text, remedy = True, f"{text}: far behind", BEHIND
    return Finding("bad" if is_bad else "ok", text, remedy, numbers)
