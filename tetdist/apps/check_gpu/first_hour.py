"""The first hour on a machine: behind the checks an epoch on ImageNet, beside a published one.

The recipe trains in processes of its own, as the command `train` would: first a few steps, whose
rate tells how many fit into the hour, and then to the end of the epoch or of the hour.
"""

import os
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tetdist import order
from tetdist.apps.check_gpu import remedies
from tetdist.apps.check_gpu.check import (
    EXPECTED,
    TOO_SLOW,
    Finding,
    Machine,
    Report,
    Result,
    Status,
    word,
)
from tetdist.apps.check_gpu.rates import OWN, REACHED, SLOWLY, computed_images_per_s
from tetdist.apps.check_gpu.run import finding_of
from tetdist.apps.reports.reference import CHANCE, IMAGES, Reference, find_reference, tolerated
from tetdist.apps.roofline import cards
from tetdist.config import loading
from tetdist.distributed.meeting import free_port
from tetdist.distributed.starters import as_starter
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
        overrides: Changes of the recipe.
        batch: Images of a step.
        steps: Steps of an epoch.
        reference: The published training.
        obstacle: Reason why the data cannot be compared with it, if any.
        images_per_s: Rate computed for all GPUs; None: unknown.
        folder: The run's folder.
        begun: When the hour began, by `time.monotonic`.
    """

    overrides: tuple[str, ...]
    batch: int
    steps: int
    reference: Reference
    obstacle: str | None
    images_per_s: float | None
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
    """Read the recipe and open the data.

    Raises:
        UserError: The recipe cannot train on these data.
    """
    name = here.world.from_rank_0(time.strftime("first_hour_%Y%m%d_%H%M%S"))
    changes = [*(SMALL if here.small else ()), "tracking.mlflow=false", "log_every=10"]
    changes += [*overrides, f"name={name}", f"device={here.device.type}"]
    # The last one of a key counts.
    changes = list({change.partition("=")[0]: change for change in changes}.values())
    config = loading.load(RECIPE, changes)
    train, _ = open_data(config, here.world)
    reference = find_reference(config.reference or "sew34")
    rate, batch = None, config.batch
    card = cards.find(torch.cuda.get_device_name(here.device)) if here.on_gpu else None
    if card is not None:
        rate = here.world.world_size * computed_images_per_s(batch.micro, card)[OWN]
    return Hour(
        overrides=tuple(changes),
        batch=batch.global_,
        steps=order.steps_per_epoch(len(train), batch.global_),
        reference=reference,
        obstacle=reference.obstacle(len(train.classes), has_average=False),
        images_per_s=rate,
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


def add(report: Report, here: Machine, hour: Hour) -> None:
    """Train, show the finding, and add it to the report as the last check."""
    started = time.monotonic()
    found = finding_of(lambda machine: train(machine, hour), here)
    report.results.append(Result("epoch", [found], time.monotonic() - started))
    report.not_reached.remove("epoch")
    if here.world.rank == 0:
        print(report.results[-1].line(), flush=True)


def _train_until(step: int, here: Machine, hour: Hour) -> list[dict[str, Any]]:
    """Train, or go on, until a step; return the run's metrics.

    Raises:
        UserError: The training failed on a process.
    """
    # The processes meet at a port of their own, since these ones hold the launcher's.
    environment = {k: v for k, v in os.environ.items() if k != "TORCHELASTIC_USE_AGENT_STORE"}
    if here.world.world_size == 1:
        environment |= as_starter()
    else:
        environment["MASTER_PORT"] = str(here.world.from_rank_0(free_port()))
    command = [sys.executable, "-m", "tetdist", "train", "--config", RECIPE, *hour.overrides]
    done = subprocess.run([*command, f"max_steps={step}"], env=environment, check=False)
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
    numbers: dict[str, Any] = {"expected": hour.expected()}
    numbers["seconds"] = time.monotonic() - hour.begun
    numbers |= {"images": images, "images_per_s": rate, "data_wait": wait, "top1": top1}
    text = f"top-1 {top1:.2f} % after {images:,} images, {rate:.0f} images/s"
    status: Status = "ok"
    remedy = None
    if hour.images_per_s is not None:
        reached = word(rate / hour.images_per_s, REACHED, SLOWLY)
        text += f" {reached} (computed {hour.images_per_s:.0f})"
        if reached != EXPECTED:
            remedy = LOADING if wait > 10 else remedies.NETWORK
            status = "bad" if reached == TOO_SLOW else "ok"
    if hour.obstacle is not None:
        return Finding(status, f"{text}; not compared: {hour.obstacle}", remedy, numbers)
    numbers["published_top1"] = there = published(hour.reference, images)
    text += f"; {hour.reference.name} had {there:.2f} % after as many"
    if there - top1 > tolerated(images / IMAGES, there):
        return Finding("bad", f"{text}: far behind", BEHIND, numbers)
    return Finding(status, text, remedy, numbers)
