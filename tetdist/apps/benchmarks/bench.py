"""Benchmark of a training step: its time, relative to the ReLU network's, and its memory.

A step is training's own, with the TET loss and SGD, on random images; other networks take the same.
All networks take turns in this process, whose threads wait as in training.
"""

import argparse
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

import timm
import torch
from torch import nn

from tetdist.apps.benchmarks.made_up import MadeUp, Repeated, training_step
from tetdist.distributed.world import World
from tetdist.errors import UserError
from tetdist.tables import aligned, number
from tetdist.tracking.environment import cpu_model
from tetdist.wording import speed_flag

MIB = 2**20
# Steps on a GPU after which the host waits once: as in training, it queues kernels ahead.
TOGETHER = 10


def machine(device: str) -> dict[str, str]:
    """Return the machine and the versions that the figures depend on."""
    return {
        "device": torch.cuda.get_device_name() if device == "cuda" else cpu_model() or "",
        "threads": str(torch.get_num_threads()),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


# --- what is compared -----------------------------------------------------------------------------

# What each mode recomputes; timesteps: segments of two.
RECOMPUTED: dict[str, Any] = {"none": "none", "blocks": "blocks", "timesteps": {"timesteps": 2}}


def contestants_of(options: argparse.Namespace) -> dict[str, Callable[[], MadeUp]]:
    """Return constructors of the ReLU network's step, if there is one, and of each mode's."""
    contestants: dict[str, Callable[[], MadeUp]] = {}
    if baseline := relu_baseline(options.model):
        contestants["relu"] = partial(step_of, options, instead=Repeated(baseline))
    for mode in options.modes:
        contestants[f"tetdist, {mode}"] = partial(step_of, options, recompute=RECOMPUTED[mode])
    return contestants


def relu_baseline(name: str) -> nn.Module | None:
    """Make the ReLU network with a SEW- or Spiking-ResNet's convolutions; None for others."""
    family, _, depth = name.rpartition("_")
    relu_name = depth if family in ("sew", "spiking") else ""
    return timm.create_model(relu_name) if relu_name in timm.list_models("resnet*") else None


def step_of(options: argparse.Namespace, **settings: Any) -> MadeUp:
    """Make the training step of a single process; ``settings`` as in `training_step`."""
    return training_step(
        World(0, 1, torch.device(options.device), None),
        options.model,
        size=pixels(options),
        batch=options.batch,
        accumulation=1,
        timesteps=options.timesteps,
        precision=options.precision,
        engine="torch",
        **settings,
    )


def pixels(options: argparse.Namespace) -> int:
    """Return the side of the images."""
    return int(options.size or timm.get_pretrained_cfg(options.model).input_size[-1])


# --- time -----------------------------------------------------------------------------------------


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Measure each contestant's seconds a step: medians over rounds in which all take turns."""
    steps = {name: make().take for name, make in contestants_of(options).items()}
    warm_up, together = {}, TOGETHER if options.device == "cuda" else 1
    for name, step in steps.items():
        try:
            warm_up[name] = seconds_of(step) + seconds_of(step)
        except ValueError as error:  # of batch norm, about a single value
            raise UserError(f"{name}: {error}; raise --batch, --size or --timesteps") from error
        print(f"{name}: first two steps {warm_up[name]:.1f} s", file=sys.stderr, flush=True)
    timed = {name: partial(seconds_of, step, together) for name, step in steps.items()}
    seconds = in_turns(timed, options.repeats)
    rows = [
        row_of(name, seconds, options.batch)
        | {
            "warm_up": warm_up[name],
            "peak_mib": peak_mib(step) if options.device == "cuda" else None,
        }
        for name, step in steps.items()
    ]
    keys = ("model", "size", "timesteps", "batch", "precision", "device", "repeats")
    # The speed of the network in its first mode.
    own = next(row for row in rows if row["name"].startswith("tetdist"))
    read = {"images_per_s": own["images_per_s"], "processes": 1, "peak_mib": own["peak_mib"]}
    read |= {"recompute": options.modes[0], "size": pixels(options)}
    return {key: getattr(options, key) for key in keys} | read | {"rows": rows}


def peak_mib(step: Callable[[], object]) -> float:
    """Return the peak MiB that a step allocates on the GPU, beyond those allocated before it."""
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    return (torch.cuda.max_memory_allocated() - before) / MIB


def seconds_of(step: Callable[[], object], number: int = 1) -> float:
    """Return the seconds of each of so many calls, after which the host waits for a GPU."""
    started = time.perf_counter()
    for _ in range(number):
        step()
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return (time.perf_counter() - started) / number


def in_turns(steps: Mapping[str, Callable[[], float]], repeats: int) -> dict[str, list[float]]:
    """Return what each contestant's function returns, by round."""
    results: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(repeats):
        for name, step in steps.items():
            results[name].append(step())
    return results


def ratio(values: Iterable[float], others: Iterable[float]) -> float:
    """Return the median ratio by round, since any slowdown of the machine affects both."""
    return statistics.median(one / other for one, other in zip(values, others, strict=True))


def row_of(name: str, seconds: Mapping[str, list[float]], batch: int) -> dict[str, Any]:
    """Return a contestant's figures; the ratio is to the first one's."""
    values, first = seconds[name], next(iter(seconds.values()))
    median = statistics.median(values)
    row = {"name": name, "seconds": median, "fastest": min(values)}
    return row | {"ratio": ratio(values, first), "images_per_s": batch / median}


def table(result: dict[str, Any]) -> str:
    """Return the result as text."""
    head = ["", "s", "/ first", "images/s", "first two steps, s", "peak, MiB"]
    rows = [
        [
            row["name"],
            f"{row['seconds']:.3f}",
            f"{row['ratio']:.3f}",
            f"{row['images_per_s']:.2f}",
            f"{row['warm_up']:.1f}",
            number(row["peak_mib"], ".0f"),
        ]
        for row in result["rows"]
    ]
    flag = speed_flag(
        result["images_per_s"],
        model=result["model"],
        pixels=result["size"],
        precision=result["precision"],
        processes=result["processes"],
        timesteps=result["timesteps"],
    )
    mode = "" if result["recompute"] == "none" else f", recomputing {result['recompute']}"
    return (
        f"{result['model']}, T={result['timesteps']}, batch {result['batch']}, "
        f"{result['precision']}, {result['device']}: a training step, median of "
        f"{result['repeats']}\n\n"
        f"{aligned([head, *rows], right=range(1, len(head)))}\n\n"
        f"for slurm{mode}: {flag}"
    )
