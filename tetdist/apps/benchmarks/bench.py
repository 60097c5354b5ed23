"""Benchmarks of a training step's time, and of the memory kept for its backward pass."""

import argparse
import contextlib
import importlib.metadata
import platform
import statistics
import sys
import time
import weakref
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from tetdist.apps.benchmarks import turns
from tetdist.apps.benchmarks.contestants import Contestant, contestants_of, step_of
from tetdist.nn.precision import choose_algorithms
from tetdist.tables import aligned, number
from tetdist.tracking.environment import cpu_model

MIB = 2**20


def machine(device: str) -> dict[str, str]:
    """Return the machine and the versions that the figures depend on."""
    found = {
        "device": torch.cuda.get_device_name() if device == "cuda" else cpu_model() or "",
        "threads": str(torch.get_num_threads()),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        found["spikingjelly"] = importlib.metadata.version("spikingjelly")
    return found


# --- model -------------------------------------------------------------------------------------


def measure_model(options: argparse.Namespace) -> dict[str, Any]:
    """Measure each contestant's seconds a step: medians over rounds in which all take turns."""
    names = list(contestants_of(options))
    if options.device == "cuda":
        rows = measure_here(names, options, _show)
    else:
        with turns.contestants(names, options) as processes:
            seconds = in_turns({name: one.step for name, one in processes.items()}, options)
            rows = [
                _row(name, seconds, options, one.warm_up, waiting=one.waiting)
                for name, one in processes.items()
            ]
    keys = ("model", "size", "timesteps", "batch", "precision", "device", "evaluate", "repeats")
    result = {key: getattr(options, key) for key in keys} | {"rows": rows}
    if not options.evaluate:
        # Keys that `slurm --benchmark` reads.
        own = next(row for row in rows if row["name"].startswith("tetdist"))
        result |= {"images_per_s": own["images_per_s"], "processes": 1}
    return result


def measure_here(
    names: list[str], options: argparse.Namespace, show: Callable[[str], None] = lambda _: None
) -> list[dict[str, Any]]:
    """Measure all contestants in this process, as on a GPU, whose memory processes would share.

    ``show`` is called with a line when a contestant is ready.

    Raises:
        torch.OutOfMemoryError: The contestants do not fit into the GPU's memory together.
    """
    choose_algorithms(options.precision)
    made, on_gpu = contestants_of(options), options.device == "cuda"
    steps = {name: step_of(options, made[name]()) for name in names}
    warm_up = {}
    for name, step in steps.items():
        warm_up[name] = seconds_of(step) + seconds_of(step)
        show(f"{name}: first two steps {warm_up[name]:.1f} s")
    seconds = in_turns({name: partial(seconds_of, step) for name, step in steps.items()}, options)
    return [
        _row(name, seconds, options, warm_up[name], peak=peak_mib(step) if on_gpu else None)
        for name, step in steps.items()
    ]


def _show(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def seconds_of(step: Callable[[], None]) -> float:
    """Return the seconds that a call takes."""
    started = time.perf_counter()
    step()
    return time.perf_counter() - started


def in_turns(
    steps: dict[str, Callable[[], float]], options: argparse.Namespace
) -> dict[str, list[float]]:
    """Return the seconds of each contestant's steps, by round."""
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(options.repeats):
        for name, step in steps.items():
            seconds[name].append(step())
    return seconds


def _row(
    name: str,
    seconds: dict[str, list[float]],
    options: argparse.Namespace,
    warm_up: float,
    *,
    waiting: str | None = None,
    peak: float | None = None,
) -> dict[str, Any]:
    values, first = seconds[name], next(iter(seconds.values()))
    return {
        "name": name,
        "seconds": statistics.median(values),
        "fastest": min(values),
        "ratio": turns.ratio(values, first),
        "images_per_s": options.batch / statistics.median(values),
        "warm_up": warm_up,
        "waiting": waiting,
        "peak_mib": peak,
    }


def model_table(result: dict[str, Any]) -> str:
    what = "evaluation" if result["evaluate"] else "training step"
    rows = [["", "s", "/ first", "images/s", "first two steps, s", "waiting", "peak, MiB"]]
    rows += [
        [
            row["name"],
            f"{row['seconds']:.3f}",
            f"{row['ratio']:.3f}",
            f"{row['images_per_s']:.2f}",
            f"{row['warm_up']:.1f}",
            row["waiting"] or "",
            number(row["peak_mib"], ".0f"),
        ]
        for row in result["rows"]
    ]
    return (
        f"{result['model']}, T={result['timesteps']}, batch {result['batch']}, "
        f"{result['precision']}, {result['device']}: a {what}, median of {result['repeats']}\n\n"
        f"{aligned(rows, right=range(1, 7))}"
    )


def peak_mib(step: Callable[[], None]) -> float:
    """Return the peak MiB that a step allocates on the GPU, beyond those allocated before it."""
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    return (torch.cuda.max_memory_allocated() - before) / MIB


# --- memory ------------------------------------------------------------------------------------


class SavedBytes:
    """Counter of the bytes that autograd holds for the backward pass: present and peak.

    A storage counts once, however many operations keep it; parameters do not count.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        self.now = self.most = 0
        self._holders: dict[int, int] = {}
        self._ignored = {p.untyped_storage().data_ptr() for p in model.parameters()}

    def _pack(self, tensor: Tensor) -> "_Kept":
        storage = tensor.untyped_storage()
        kept = _Kept(tensor)
        pointer = storage.data_ptr()
        if pointer not in self._ignored:
            if pointer not in self._holders:
                self.now += storage.nbytes()
                self.most = max(self.most, self.now)
            self._holders[pointer] = self._holders.get(pointer, 0) + 1
            weakref.finalize(kept, self._released, pointer, storage.nbytes())
        return kept

    def _released(self, pointer: int, num_bytes: int) -> None:
        self._holders[pointer] -= 1
        if not self._holders[pointer]:
            del self._holders[pointer]
            self.now -= num_bytes

    @contextlib.contextmanager
    def counting(self) -> Iterator[None]:
        with torch.autograd.graph.saved_tensors_hooks(self._pack, lambda kept: kept.tensor):
            yield


class _Kept:
    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


def measure_memory(options: argparse.Namespace) -> dict[str, Any]:
    """Measure the MiB an image held after the forward pass, and the peak until the backward."""
    options = argparse.Namespace(**vars(options), evaluate=False)
    rows: list[dict[str, Any]] = []
    all_timesteps = options.timesteps
    for timesteps in all_timesteps:
        options.timesteps = timesteps
        for name, contestant in contestants_of(options).items():
            held = []
            # The difference of two batch sizes is the cost of an image; costs that do not depend on
            # the batch, such as weights in bfloat16, cancel.
            for batch in (2, 3):
                options.batch = batch
                held.append(_held(options, contestant()))
            two, three = held
            print(f"measured T={timesteps}, {name}", file=sys.stderr, flush=True)
            rows.append(
                {
                    "timesteps": timesteps,
                    "name": name,
                    "after_forward_mib": (three[0] - two[0]) / MIB,
                    "at_most_mib": (three[1] - two[1]) / MIB,
                }
            )
    keys = ("model", "size", "precision", "device", "segment")
    return {key: getattr(options, key) for key in keys} | {"rows": rows}


def _held(options: argparse.Namespace, contestant: Contestant) -> tuple[int, int]:
    from tetdist.nn.precision import autocast

    model, images, logits = contestant
    saved = SavedBytes(model)
    with saved.counting():
        with autocast(images.device, options.precision):
            loss = logits(images).float().square().mean()
        after_forward = saved.now
        loss.backward()
    return after_forward, saved.most


def memory_table(result: dict[str, Any]) -> str:
    table = {(row["timesteps"], row["name"]): row for row in result["rows"]}
    names = list(dict.fromkeys(name for _, name in table))

    def cell(timesteps: int, name: str) -> str:
        row, first = table[timesteps, name], table[timesteps, names[0]]
        part = row["after_forward_mib"] / first["after_forward_mib"]
        return f"{row['after_forward_mib']:.1f} ({row['at_most_mib']:6.1f}) {100 * part:4.0f} %"

    rows = [["T", *names]]
    rows += [
        [str(t), *(cell(t, name) for name in names)] for t in dict.fromkeys(t for t, _ in table)
    ]
    return (
        f"{result['model']}, {result['precision']}: MiB an image kept for the backward pass, after "
        f"the forward pass (peak)\n\n{aligned(rows, right=range(len(rows[0])))}"
    )
