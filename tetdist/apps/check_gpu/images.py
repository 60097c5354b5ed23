"""Checks of images: the same on CPU and GPU, and loaded fast enough."""

import dataclasses
import itertools
import time
from pathlib import Path
from typing import Any

import torch

from tetdist.apps.benchmarks.data import make_images
from tetdist.apps.check_gpu.check import Finding, Machine
from tetdist.apps.check_gpu.rates import images_per_s_of_a_step
from tetdist.config.loading import parse
from tetdist.config.schema import RunConfig
from tetdist.data.build import eval_loader, train_loader
from tetdist.datasets.index import build_index
from tetdist.distributed.world import World, cores_of

# Levels of 255 by which an image may differ on average. Both decoders are within the standard's
# tolerance, but their filters differ.
LARGEST_DIFFERENCE = 2.0


def check_pixels(here: Machine) -> Finding:
    """Compare images decoded and resized on the GPU with the same ones on the CPU."""
    if not here.on_gpu:
        return Finding("left out", "comparing the decoders needs a GPU")
    root = here.folder / "pixels"
    make_splits(root)
    index, _ = build_index(root, "val", workers=1, decode=False)
    two = []
    for device in ("cpu", "gpu"):
        config = _config(root, {"device": device}, batch=25)
        with eval_loader(config, index, _alone(here)) as batches:
            two.append(torch.cat([batch.images.cpu() for batch in batches]))
    difference = float((two[0] - two[1]).abs().mean() * 255 * 0.226)
    text = (
        f"{len(two[0])} images decoded on GPU and CPU: {difference:.2f} levels of 255 apart on "
        "average"
    )
    numbers = {"levels": difference, "images": len(two[0])}
    if not difference <= LARGEST_DIFFERENCE:
        return Finding("bad", text, "train with data.device=cpu, which is exact", numbers)
    return Finding("ok", text, None, numbers)


def check_loading(here: Machine) -> Finding:
    """Compare the images a second that this process loads from JPEG files and trains on."""
    root = here.folder / "loading"
    make_splits(root, copies=1 if here.small else 40)
    index, _ = build_index(root, "train", workers=1, decode=False)
    size, batch = (33, 4) if here.small else (224, 32)
    threads = cores_of(here.world)[0]
    config = _config(root, {"threads": threads, "image_size": size}, batch=batch)
    counted = 5 if here.small else 60
    with train_loader(config, index, _alone(here), 0, size) as batches:
        for _ in itertools.islice(batches, 5):
            pass
        started = time.perf_counter()
        for _ in itertools.islice(batches, counted):
            pass
        loaded = counted * batch / (time.perf_counter() - started)
    trained = images_per_s_of_a_step(here, batch)
    numbers: dict[str, Any] = {"loaded_per_s": loaded, "trained_per_s": trained, "threads": threads}
    text = (
        f"{loaded:.0f} images/s of {size} pixels from {threads} threads, "
        f"{trained:.0f}/s trained on (sew_resnet34)"
    )
    if here.on_gpu and loaded < trained:
        return Finding(
            "bad",
            text,
            f"give each GPU {trained / loaded:.1f} times its {threads} cores, or set "
            "data.device=gpu",
            numbers,
        )
    return Finding("ok", text, None, numbers)


def _alone(here: Machine) -> World:
    """Return a world of this process alone, because each process decodes all images."""
    return dataclasses.replace(here.world, rank=0, world_size=1)


def make_splits(root: Path, copies: int = 1) -> None:
    """Make JPEG files, and two splits of two classes with `copies` links to each file."""
    for i, source in enumerate(make_images(root / "made")):
        for split, k in itertools.product(("train", "val"), range(copies)):
            file = root / split / "01"[i % 2] / f"{k}-{source.name}"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.symlink_to(source)


def _config(root: Path, data: dict[str, Any], *, batch: int) -> RunConfig:
    return parse(
        {
            "name": "check",
            "model": {"name": "sew_resnet34"},
            "data": {"root": str(root), **data},
            "batch": {"global": batch, "micro": batch, "eval": batch},
            "phases": [{"epochs": 1, "timesteps": 4, "optimizer": {"kind": "sgd", "lr": 0.1}}],
        },
        "the check",
    )
