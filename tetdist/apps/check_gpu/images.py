"""Check of images: those decoded on the GPU are those decoded on the CPU."""

from pathlib import Path
from typing import Any

import torch

from tetdist.apps.benchmarks.data import make_images
from tetdist.apps.check_gpu.check import Finding, Machine
from tetdist.config.loading import parse
from tetdist.config.schema import RunConfig
from tetdist.data.build import eval_loader
from tetdist.datasets.index import build_index

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
        with eval_loader(config, index, here.alone) as batches:
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


def make_splits(root: Path) -> None:
    """Make JPEG files, and two splits of two classes with a link to each file."""
    for i, source in enumerate(make_images(root / "made")):
        for split in ("train", "val"):
            file = root / split / "01"[i % 2] / source.name
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
