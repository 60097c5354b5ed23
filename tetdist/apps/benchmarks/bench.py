"""Benchmark of a training step: its time, relative to the ReLU network's, and its memory.

A step is the forward pass, the TET loss and the backward pass on random images, without the update.
All networks take turns in this process, whose threads wait as in training.
"""

import argparse
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any, NamedTuple

import timm
import torch
from torch import Tensor, nn

import tetdist.models  # noqa: F401  # registers them
from tetdist.errors import UserError
from tetdist.losses import tet_loss
from tetdist.nn.precision import autocast, choose_algorithms
from tetdist.tables import aligned, number
from tetdist.tracking.environment import cpu_model
from tetdist.wording import speed_flag

MIB = 2**20


def machine(device: str) -> dict[str, str]:
    """Return the machine and the versions that the figures depend on."""
    return {
        "device": torch.cuda.get_device_name() if device == "cuda" else cpu_model() or "",
        "threads": str(torch.get_num_threads()),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


# --- what is compared -----------------------------------------------------------------------------


class Contestant(NamedTuple):
    """Network with the images and labels of a step.

    Attributes:
        logits: Function from images to logits (T, B, K).
    """

    model: nn.Module
    images: Tensor
    logits: Callable[[Tensor], Tensor]


def contestants_of(options: argparse.Namespace) -> dict[str, Callable[[], Contestant]]:
    """Return constructors of the ReLU network, if there is one, and of tetdist's in each mode."""
    contestants: dict[str, Callable[[], Contestant]] = {}
    if baseline := relu_baseline(options.model):
        contestants["relu"] = partial(relu, options, baseline)
    for mode in options.modes:
        contestants[f"tetdist, {mode}"] = partial(ours, options, mode)
    return contestants


def relu_baseline(name: str) -> nn.Module | None:
    """Make the ReLU network with a SEW- or Spiking-ResNet's convolutions; None for others."""
    family, _, depth = name.rpartition("_")
    relu_name = depth if family in ("sew", "spiking") else ""
    return timm.create_model(relu_name) if relu_name in timm.list_models("resnet*") else None


def ours(options: argparse.Namespace, mode: str) -> Contestant:
    """Make tetdist's network; timesteps: recompute segments of two timesteps."""
    torch.manual_seed(0)
    model = timm.create_model(options.model, timesteps=options.timesteps)
    model.set_grad_checkpointing(mode != "none")
    model.set_segment(2 if mode == "timesteps" else None)
    return laid_out(options, model, batch_of(options), lambda x: model(x, per_timestep=True))


def relu(options: argparse.Namespace, baseline: nn.Module) -> Contestant:
    """Make the contestant of a ReLU network, which gets T times the batch."""
    images = batch_of(options)
    if images.ndim == 5:
        images = images.flatten(0, 1)
    else:
        images = images.repeat(options.timesteps, 1, 1, 1)
    shape = (options.timesteps, options.batch)
    return laid_out(options, baseline, images, lambda x: baseline(x).unflatten(0, shape))


def batch_of(options: argparse.Namespace) -> Tensor:
    """Make random images (B, 3, H, W) or event frames (B, T, 2, H, W), by the network."""
    channels, size = timm.get_pretrained_cfg(options.model).input_size[-3], pixels(options)
    generator = torch.Generator().manual_seed(0)
    frames = (options.timesteps,) if channels == 2 else ()
    shape = (options.batch, *frames, channels, size, size)
    return torch.rand(shape, generator=generator).to(options.device)


def pixels(options: argparse.Namespace) -> int:
    """Return the side of the images."""
    return int(options.size or timm.get_pretrained_cfg(options.model).input_size[-1])


def laid_out(
    options: argparse.Namespace,
    model: nn.Module,
    images: Tensor,
    logits: Callable[[Tensor], Tensor],
) -> Contestant:
    """Return the contestant on its device, in channels_last memory."""
    model.to(options.device)
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # torch's stub
    if images.ndim == 4:
        images = images.contiguous(memory_format=torch.channels_last)
    return Contestant(model.train(), images, logits)


def step_of(options: argparse.Namespace, contestant: Contestant) -> Callable[[], None]:
    """Return a function that makes a step, and waits until the device has done it."""
    model, images, logits = contestant
    labels = torch.arange(options.batch, device=options.device) % 10

    def step() -> None:
        model.zero_grad(set_to_none=True)
        with autocast(images.device, options.precision):
            output = logits(images)
        tet_loss(output, labels, lambda_=0.001).backward()
        if options.device == "cuda":
            torch.cuda.synchronize()

    return step


# --- time -----------------------------------------------------------------------------------------


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Measure each contestant's seconds a step: medians over rounds in which all take turns."""
    choose_algorithms(options.precision)
    steps = {name: step_of(options, make()) for name, make in contestants_of(options).items()}
    warm_up = {}
    for name, step in steps.items():
        try:
            warm_up[name] = seconds_of(step) + seconds_of(step)
        except ValueError as error:  # of batch norm, about a single value
            raise UserError(f"{name}: {error}; raise --batch, --size or --timesteps") from error
        print(f"{name}: first two steps {warm_up[name]:.1f} s", file=sys.stderr, flush=True)
    timed = {name: partial(seconds_of, step) for name, step in steps.items()}
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


def peak_mib(step: Callable[[], None]) -> float:
    """Return the peak MiB that a step allocates on the GPU, beyond those allocated before it."""
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    return (torch.cuda.max_memory_allocated() - before) / MIB


def seconds_of(step: Callable[[], object]) -> float:
    """Return the seconds that a call takes."""
    started = time.perf_counter()
    step()
    return time.perf_counter() - started


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
