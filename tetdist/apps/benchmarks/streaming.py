"""Latency of a step of a stream, beside the whole pass and other ways to run one timestep."""

import argparse
import importlib.util
import statistics
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import timm
import torch

from tetdist.apps.benchmarks import turns
from tetdist.apps.benchmarks.bench import in_turns, seconds_of
from tetdist.apps.benchmarks.contestants import (
    batch_of,
    has_spikingjelly_network,
    spikingjelly_network,
    wait,
)
from tetdist.errors import UserError
from tetdist.models import SpikingNetwork
from tetdist.nn.precision import autocast, choose_algorithms
from tetdist.tables import aligned
from tetdist.wording import counted

if TYPE_CHECKING:
    from tetdist.apps.weights.export import OnnxStep


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Return the milliseconds of each way to run a timestep; all take turns in this process.

    With ``exits``, also those of a batch that samples leave when they are decided.
    """
    choose_algorithms(options.precision)
    if options.threads:
        torch.set_num_threads(options.threads)
    with torch.no_grad(), _steps(options) as steps:
        for step in steps.values():
            step()
        seconds = in_turns({name: partial(seconds_of, one) for name, one in steps.items()}, options)
    first = seconds["T=1 pass"]
    rows = [
        {"name": name, "ms": 1e3 * statistics.median(values), "ratio": turns.ratio(values, first)}
        for name, values in seconds.items()
    ]
    keys = ("model", "size", "timesteps", "batch", "exits", "precision", "device", "repeats")
    found = {key: getattr(options, key) for key in keys}
    return found | {"threads": torch.get_num_threads(), "rows": rows}


@contextmanager
def _steps(options: argparse.Namespace) -> Iterator[dict[str, Callable[[], None]]]:
    """Yield the ways to run one timestep; the whole pass runs all T."""
    images = batch_of(options)
    events = images.ndim == 5
    frame = images[:, 0] if events else images

    def network(timesteps: int) -> SpikingNetwork:
        torch.manual_seed(0)
        model: SpikingNetwork = timm.create_model(options.model, timesteps=timesteps)
        return model.to(options.device, memory_format=torch.channels_last).eval()  # type: ignore[call-overload]  # torch's stub

    def computed(function: Callable[[], object]) -> Callable[[], None]:
        def run() -> None:
            with autocast(frame.device, options.precision):
                function()
            wait(options.device)

        return run

    one, whole = network(1), network(options.timesteps)
    single = images[:, :1] if events else images
    stream = whole.stream()
    stream.step(frame)
    steps = {
        "T=1 pass": computed(lambda: one(single)),
        "stream, a step": computed(lambda: stream.step(frame if events else None)),
        f"whole pass, T={options.timesteps}": computed(lambda: whole(images)),
    }
    leaving = survivors(options.batch, options.timesteps, options.exits)
    if leaving:
        steps["stream with exits"] = computed(lambda: _exits(whole, images, leaving))
    if importlib.util.find_spec("spikingjelly") and has_spikingjelly_network(options.model):
        from spikingjelly.activation_based import functional

        peer = spikingjelly_network(options.model)
        functional.set_step_mode(peer, "s")
        peer = peer.to(options.device).to(memory_format=torch.channels_last).eval()  # type: ignore[call-overload]  # as above
        steps["spikingjelly, single step"] = computed(lambda: peer(frame))
    on_host = options.device == "cpu" and options.precision == "fp32"
    if not (on_host and importlib.util.find_spec("onnxruntime")):
        yield steps
        return
    from tetdist.apps.weights.export import OnnxStep, save_step
    from tetdist.apps.weights.integer_onnx import save_step as save_integer_step
    from tetdist.apps.weights.integers import untrained

    defined = network(1)
    defined.set_execution("reference")
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "step.onnx")
        save_step(defined, torch.cat([frame, frame]), file)
        graph = OnnxStep(file, options.threads)
        states = graph.at_rest(len(frame))
        steps["onnxruntime, a step"] = computed(lambda: graph.run(frame, states))
        with suppress(UserError):  # A network without whole numbers has no such row.
            whole_numbers = untrained(defined, tuple(frame.shape[1:]), options.timesteps)
            save_integer_step(whole_numbers, file, {})
            integer_graph = OnnxStep(file, options.threads)
            bytes_of = whole_numbers.frames(images)[0].contiguous()
            at_rest = integer_graph.at_rest(len(frame))
            steps["onnxruntime, a step in int8"] = computed(
                lambda: integer_graph.run(bytes_of, at_rest)
            )
        if leaving:
            steps["onnxruntime with exits"] = computed(lambda: _onnx_exits(graph, images, leaving))
        yield steps


def survivors(batch: int, timesteps: int, mean: float | None) -> list[int]:
    """Return how many samples take each timestep, where they take ``mean`` timesteps on average.

    Each timestep decides the same fraction of the samples that are left. Without a mean: [].
    """
    if mean is None:
        return []
    low, high = 0.0, 1.0  # The fraction that a timestep leaves undecided.
    for _ in range(50):
        middle = (low + high) / 2
        more = sum(middle**t for t in range(timesteps)) < mean
        low, high = (middle, high) if more else (low, middle)
    return [count for t in range(timesteps) if (count := round(batch * high**t))]


def _exits(model: SpikingNetwork, images: torch.Tensor, left: list[int]) -> None:
    """Stream a batch whose last samples leave it, as `evaluation.early_exit.decide`."""
    stream = model.stream()
    events = images.ndim == 5
    for t, count in enumerate(left):
        if t and count < left[t - 1]:
            stream.keep(torch.arange(left[t - 1]) < count)
        stream.step(images[:count, t] if events else images if t == 0 else None)


def _onnx_exits(graph: "OnnxStep", images: torch.Tensor, left: list[int]) -> None:
    """Do the same by onnxruntime."""
    states = graph.at_rest(len(images))
    for t, count in enumerate(left):
        _, states = graph.run(
            images[:count, t] if images.ndim == 5 else images[:count], graph.kept(states, count)
        )


def table(result: dict[str, Any]) -> str:
    rows = [["", "ms", "/ T=1 pass"]]
    rows += [[row["name"], f"{row['ms']:.2f}", f"{row['ratio']:.3f}"] for row in result["rows"]]
    return (
        f"{result['model']}, batch {result['batch']}, {result['precision']}, {result['device']}, "
        f"{counted(result['threads'], 'thread')}: median of {result['repeats']}\n\n"
        f"{aligned(rows, right=(1, 2))}"
    )
