"""Benchmark of images a second from JPEG files to batches: our pipeline and others, in turns.

The contestants read the same files with the same batch size and number of threads or workers. All
fill their queues while another one is timed, so the first batches of a turn are not counted.
"""

import argparse
import contextlib
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from PIL import Image

from tetdist.apps.benchmarks.turns import ratio
from tetdist.tables import aligned

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
SCALE, RATIO = (0.08, 1.0), (3 / 4, 4 / 3)
NOT_COUNTED = 6
MIB = 2**20

Step = Callable[[], Any]


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Measure all rates, the data wait of a training, and the memory after each epoch."""
    with contextlib.ExitStack() as stack:
        root = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        files = gather(options, root)
        # Fork torchvision's workers before DALI starts threads.
        steps = {
            "torchvision": torchvision_loader(options, root),
            "DALI's reader": dali_reader(options, files),
            "tetdist": stack.enter_context(ours(options, root)),
            "decoding alone": dali_reader(options, files, only_decode=True),
        }
        rates = in_turns(options, steps)
        print("rates measured", file=sys.stderr, flush=True)
        keys = ("images", "size", "batch", "threads", "repeats")
        return {key: getattr(options, key) for key in keys} | {
            "data": options.data and str(options.data),
            "rows": [row(name, rates) for name in steps],
            "wait": training_wait(options, root) if options.wait else None,
            "memory_mib": memory(options, root),
        }


def row(name: str, rates: dict[str, list[float]]) -> dict[str, Any]:
    return {
        "name": name,
        "images_per_s": statistics.median(rates[name]),
        "fastest": max(rates[name]),
        "of_torchvision": ratio(rates[name], rates["torchvision"]),
        "of_dali": ratio(rates[name], rates["DALI's reader"]),
        "of_decoding": ratio(rates[name], rates["decoding alone"]),
    }


def in_turns(options: argparse.Namespace, steps: dict[str, Step]) -> dict[str, list[float]]:
    """Return the images a second of each contestant, by round."""
    rates: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(options.repeats):
        for name, step in steps.items():
            for _ in range(NOT_COUNTED):
                step()
            started = time.perf_counter()
            for _ in range(options.batches):
                step()
            seconds = time.perf_counter() - started
            rates[name].append(options.batches * options.batch / seconds)
    return rates


# --- files -------------------------------------------------------------------------------------


def gather(options: argparse.Namespace, root: Path) -> list[str]:
    """Link the images, repeatedly if needed, in two classes below ROOT/train; return the links."""
    sources = images_of(options.data) if options.data else make_images(root / "made")
    files = []
    for i in range(options.images):
        source = sources[i % len(sources)]
        file = root / "train" / "01"[i % 2] / f"{i:07}{source.suffix}"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.symlink_to(source)
        files.append(str(file))
    return files


def images_of(folder: Path) -> list[Path]:
    found = sorted(p.resolve() for p in folder.rglob("*") if p.suffix.lower() in (".jpg", ".jpeg"))
    if not found:
        raise SystemExit(f"error: --data: {folder} has no JPEG files; give another folder")
    return found


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


# --- contestants -------------------------------------------------------------------------------


@contextlib.contextmanager
def ours(options: argparse.Namespace, root: Path) -> Iterator[Step]:
    from tetdist.config.sections.data import DataSection
    from tetdist.data.batches import Share, train_batches
    from tetdist.data.dali import Workers
    from tetdist.datasets.index import build_index

    index, _ = build_index(root, "train", workers=1, decode=False)
    batch, alone = options.batch, {"rank": 0, "world_size": 1}
    share = Share(seed=0, global_batch=batch, micro_batch=batch, **alone, epoch=0, step_in_epoch=0)
    workers = Workers(device="cpu", device_id=None, threads=options.threads, prefetch=2)
    data = DataSection(root=str(root), scale=SCALE, ratio=RATIO, mean=MEAN, std=STD)
    loader = train_batches(data, index, share, options.size, workers)
    with loader:
        yield lambda: next(loader)


def dali_reader(options: argparse.Namespace, files: list[str], only_decode: bool = False) -> Step:
    """Make a pipeline of DALI's own reader, shuffling, crop windows and flips."""
    from nvidia import dali
    from nvidia.dali import fn, types

    pipeline = dali.Pipeline(
        options.batch, options.threads, None, seed=0, prefetch_queue_depth=2, exec_dynamic=True
    )
    with pipeline:
        encoded, label = fn.readers.file(files=files, random_shuffle=True, name="files")
        if only_decode:
            # Decode the windows that a training needs, and nothing else.
            pipeline.set_outputs(random_windows(fn, encoded))
        else:
            images = fn.resize(
                random_windows(fn, encoded),
                size=(options.size, options.size),
                interp_type=types.INTERP_LINEAR,
                antialias=True,
            )
            images = fn.crop_mirror_normalize(
                images,
                mirror=fn.random.coin_flip(),
                mean=[255 * x for x in MEAN],
                std=[255 * x for x in STD],
                output_layout="HWC",
                dtype=types.FLOAT,
            )
            pipeline.set_outputs(images, label)
    pipeline.build()
    return pipeline.run


def random_windows(fn: Any, encoded: Any) -> Any:
    return fn.decoders.image_random_crop(
        encoded, random_area=SCALE, random_aspect_ratio=RATIO, num_attempts=10
    )


def torchvision_loader(options: argparse.Namespace, root: Path) -> Step:
    from torch.utils.data import DataLoader, RandomSampler
    from torchvision import transforms
    from torchvision.datasets import ImageFolder

    steps = [
        transforms.RandomResizedCrop(options.size, SCALE, RATIO),
        transforms.RandomHorizontalFlip(),
        transforms.ToTensor(),
        transforms.Normalize(MEAN, STD),
    ]
    dataset = ImageFolder(str(root / "train"), transforms.Compose(steps))
    # An endless epoch, so that the workers start only once.
    sampler = RandomSampler(dataset, replacement=True, num_samples=10**9)
    loader = DataLoader(dataset, options.batch, sampler=sampler, num_workers=options.threads)
    batches = iter(loader)
    return lambda: next(batches)


# --- in training --------------------------------------------------------------------------------


def training_wait(options: argparse.Namespace, root: Path) -> dict[str, Any]:
    """Measure how long sew_resnet34's training steps on this CPU wait for images."""
    from tetdist.apps.benchmarks import contestants

    small = argparse.Namespace(
        **vars(options) | {"batch": 4, "model": "sew_resnet34", "timesteps": 4, "evaluate": False},
        precision="bf16",
    )
    step = contestants.step_of(small, contestants.ours(small, "none"))
    waited = worked = 0.0
    with ours(small, root) as next_batch:
        for number in range(12):
            started = time.perf_counter()
            next_batch()
            arrived = time.perf_counter()
            step()
            # The first two steps build kernels and fill queues.
            if number >= 2:
                waited += arrived - started
                worked += time.perf_counter() - arrived
    return {
        "model": small.model,
        "batch": small.batch,
        "precision": small.precision,
        "step_s": (waited + worked) / 10,
        "wait_percent": 100 * waited / (waited + worked),
    }


def memory(options: argparse.Namespace, root: Path) -> list[float]:
    """Return the MiB of this process after each epoch of our pipeline."""
    used = []
    with ours(options, root) as next_batch:
        for _ in range(options.epochs):
            for _ in range(options.images // options.batch):
                next_batch()
            used.append(psutil.Process().memory_info().rss / MIB)
    return used


def table(result: dict[str, Any]) -> str:
    rows = [["", "images/s", "fastest", "/ torchvision", "/ DALI's", "/ decoding"]]
    for row in result["rows"]:
        rates = [f"{row[name]:.0f}" for name in ("images_per_s", "fastest")]
        ratios = [f"{row[name]:.2f}" for name in ("of_torchvision", "of_dali", "of_decoding")]
        rows.append([row["name"], *rates, *ratios])
    parts = [
        f"{result['data'] or 'made images'}, {result['size']} pixels, batch {result['batch']}, "
        f"{result['threads']} threads or workers: median of {result['repeats']}",
        aligned(rows, right=range(1, 6)),
    ]
    if wait := result["wait"]:
        parts.append(
            f"{wait['model']}, batch {wait['batch']}, {wait['precision']}: {wait['step_s']:.2f} s "
            f"a step, {wait['wait_percent']:.2f} % of it waiting for images"
        )
    if result["memory_mib"]:
        used = ", ".join(f"{value:.0f}" for value in result["memory_mib"])
        parts.append(f"MiB of the process after each epoch: {used}")
    return "\n\n".join(parts)
