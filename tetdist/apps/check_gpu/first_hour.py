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
from tetdist.apps.benchmarks.scaling import free_port
from tetdist.apps.check_gpu import links, remedies
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
from tetdist.distributed.starters import as_starter
from tetdist.errors import UserError
from tetdist.tables import aligned
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
        link: Description of the link between the GPUs of a host.
        folder: The run's folder.
        begun: When the hour began, by `time.monotonic`.
    """

    overrides: tuple[str, ...]
    batch: int
    steps: int
    reference: Reference
    obstacle: str | None
    images_per_s: float | None
    link: str
    folder: Path
    begun: float

    def expected(self) -> dict[str, Any]:
        """Return the numbers to be expected, for the JSON file."""
        images = self.steps * self.batch
        rate, top1 = self.images_per_s, None
        if self.obstacle is None:
            top1 = published(self.reference, images)
        minutes = None if rate is None else images / rate / 60
        return {"images": images, "images_per_s": rate, "minutes": minutes, "top1": top1}

    def table(self) -> str:
        """Return the expected numbers as text."""
        found = self.expected()
        rate, top1 = "unknown for this device", f"not comparable: {self.obstacle}"
        if found["images_per_s"] is not None:
            rate = f"{found['images_per_s']:.0f} computed, {found['minutes']:.0f} minutes an epoch"
        if found["top1"] is not None:
            top1 = f"{found['top1']:.1f} % after an epoch ({self.reference.name}, published)"
        epoch = f"{found['images']:,} images in {self.steps:,} steps"
        rows = [["links", self.link], ["images/s", rate], ["epoch", epoch], ["top-1", top1]]
        return f"expected of the hour: no bad check, and\n{aligned(rows)}"


def published(reference: Reference, images: int) -> float | None:
    """Return the published top-1 after as many images; within its first epoch, between chance and
    that epoch's."""
    epochs = images / IMAGES
    first = min(reference.top1)
    if (known := reference.at(epochs)) is not None or epochs > first:
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
    rate, batch, link = None, config.batch, "unknown"
    card = cards.find(torch.cuda.get_device_name(here.device)) if here.on_gpu else None
    if card is not None:
        rate = here.world.world_size * computed_images_per_s(batch.micro, card)[OWN]
    if here.on_gpu and here.world.world_size > 1 and (found := links.link_of(here)) is not None:
        link = f"{links.REACHED * found[1]:.0f} GB/s or more by {found[0]}"
    steps = order.steps_per_epoch(len(train), batch.global_)
    obstacle = reference.obstacle(len(train.classes), has_average=False)
    of_batch = (tuple(changes), batch.global_, steps)
    return Hour(*of_batch, reference, obstacle, rate, link, config.run_dir, time.monotonic())


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
    value, last = next(one for one in reversed(lines) if one["kind"] == "val"), windows[-1]
    images, rate = last["step"] * hour.batch, _images_per_s(lines)
    wait = statistics.median(one["data_wait"] for one in windows)
    measured = {"images": images, "images_per_s": rate, "top1": value["top1"], "data_wait": wait}
    measured |= {"seconds": time.monotonic() - hour.begun, "loss": last["loss"]}
    numbers: dict[str, Any] = {"expected": hour.expected(), "measured": measured}
    text = f"top-1 {value['top1']:.2f} % after {images:,} images, {rate:.0f} images/s"
    status: Status = "ok"
    remedy = None
    if hour.images_per_s is not None:
        reached = word(rate / hour.images_per_s, REACHED, SLOWLY)
        text += f" {reached} (computed {hour.images_per_s:.0f})"
        if reached != EXPECTED:
            remedy = LOADING if wait > 10 else remedies.NETWORK
            status = "bad" if reached == TOO_SLOW else "ok"
    there = None if hour.obstacle else published(hour.reference, images)
    numbers["published_top1"] = there
    if there is None:
        return Finding(status, f"{text}; not compared: {hour.obstacle}", remedy, numbers)
    text += f"; {hour.reference.name} had {there:.2f} % after as many"
    if there - value["top1"] > tolerated(images / IMAGES, there):
        return Finding("bad", f"{text}: far behind", BEHIND, numbers)
    return Finding(status, text, remedy, numbers)
