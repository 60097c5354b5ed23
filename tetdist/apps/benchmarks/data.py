"""Benchmark of the loader: images a second from JPEG files to batches."""

import argparse
import contextlib
import statistics
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from tetdist.apps.benchmarks.bench import seconds_of
from tetdist.config.sections.data import DataSection
from tetdist.data.batches import Share, train_batches
from tetdist.data.dali import Workers
from tetdist.datasets.index import build_index
from tetdist.errors import UserError

IMAGES = 3000  # of an epoch
NOT_COUNTED, BATCHES = 6, 15  # of a round


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Measure the rate of the loader, which fills its queue before each round."""
    rates = []
    with tempfile.TemporaryDirectory() as folder:
        gather(options.data, Path(folder))
        with ours(options, Path(folder)) as next_batch:
            for _ in range(options.repeats):
                for _ in range(NOT_COUNTED):
                    next_batch()
                seconds = seconds_of(lambda: [next_batch() for _ in range(BATCHES)])
                rates.append(BATCHES * options.batch / seconds)
    keys = ("size", "batch", "threads", "repeats")
    result = {key: getattr(options, key) for key in keys}
    result |= {"data": options.data and str(options.data), "fastest": max(rates)}
    return result | {"images_per_s": statistics.median(rates)}


def gather(folder: Path | None, root: Path) -> None:
    """Link images of a folder, or made ones, repeatedly in two classes below ROOT/train."""
    sources = images_of(folder) if folder else make_images(root / "made")
    for i in range(IMAGES):
        source = sources[i % len(sources)]
        file = root / "train" / "01"[i % 2] / f"{i:07}{source.suffix}"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.symlink_to(source)


def images_of(folder: Path) -> list[Path]:
    """Return the JPEG files below a folder."""
    files = sorted(p.resolve() for p in folder.rglob("*") if p.suffix.lower() in (".jpg", ".jpeg"))
    if not files:
        raise UserError(f"--data: {folder} has no JPEG files; give another folder")
    return files


def make_images(folder: Path, count: int = 100) -> list[Path]:
    """Make JPEGs with ImageNet's usual size and, thanks to noise, similar numbers of bytes."""
    rng = np.random.default_rng(0)
    folder.mkdir(parents=True)
    files = []
    for i in range(count):
        coarse = Image.fromarray(rng.integers(0, 256, (24, 32, 3), np.uint8))
        smooth = np.asarray(coarse.resize((500, 375), Image.Resampling.BICUBIC), np.int16)
        pixels = np.clip(smooth + rng.normal(0, 10, smooth.shape), 0, 255).astype(np.uint8)
        files.append(folder / f"{i}.jpg")
        Image.fromarray(pixels).save(files[-1], quality=90)
    return files


@contextlib.contextmanager
def ours(options: argparse.Namespace, root: Path) -> Iterator[Callable[[], Any]]:
    """Yield a function that returns the next batch of a training on the CPU."""
    index, _ = build_index(root, "train", workers=1, decode=False)
    share = Share(
        seed=0,
        global_batch=options.batch,
        micro_batch=options.batch,
        rank=0,
        world_size=1,
        epoch=0,
        step_in_epoch=0,
    )
    workers = Workers(device="cpu", device_id=None, threads=options.threads, prefetch=2)
    data = DataSection(root=str(root))
    with train_batches(data, index, share, options.size, workers) as loader:
        yield lambda: next(loader)


def table(result: dict[str, Any]) -> str:
    """Return the result as text."""
    return (
        f"{result['data'] or 'made images'}, {result['size']} pixels, batch {result['batch']}, "
        f"{result['threads']} threads: {result['images_per_s']:.0f} images/s, median of "
        f"{result['repeats']} (fastest {result['fastest']:.0f})"
    )
