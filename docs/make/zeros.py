"""Measure what skipping the zeros of spikes saves on this machine's CPU, for docs/performance.md.

    python docs/make/zeros.py            # writes docs/performance/zeros.json
    python docs/make/performance.py      # then writes the page

Networks have random weights and images. Their norms' biases, all equal, set how many inputs of
convolutions are spikes. All contestants of a row take turns in one process, on one thread.
"""

import json
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast
from unittest import mock

import timm
import torch
import torch.nn.functional as F
from other_networks import relu_network
from torch import Tensor, nn

from tetdist.apps.benchmarks import bench
from tetdist.apps.weights import integers
from tetdist.apps.weights.trained import Trained
from tetdist.errors import UserError
from tetdist.nn.batch_norm import BatchNorm
from tetdist.nn.fast import native_zeros
from tetdist.nn.packed import Conv2d
from tetdist.storage.files import write_json
from tetdist.tables import markdown

RECORD = Path(__file__).resolve().parents[1] / "performance/zeros.json"
# Network, size, images, T, and biases of norms.
ROWS = (
    *(("spiking_resnet34", 224, 1, 4, bias) for bias in (-0.4, -0.15, 0.1, 0.6, 1.5)),
    *(("sew_resnet34", 224, 1, 4, 0.0), ("spiking_resnet18", 112, 4, 4, -0.15)),
    *(("sew_resnet18", 112, 4, 4, 0.0), ("sew_resnet18", 112, 4, 4, -0.4)),
)
ROUNDS = 5


def main() -> None:
    torch.set_num_threads(1)
    rows = []
    for row in ROWS:
        rows.append(measured(*row))
        print(json.dumps(rows[-1]), flush=True)
    write_json(RECORD, {"machine": bench.machine("cpu"), "rows": rows})


def measured(name: str, size: int, batch: int, timesteps: int, bias: float) -> dict[str, Any]:
    """Return a row: density and seconds by contestant."""
    torch.manual_seed(0)
    model: Any = timm.create_model(name, num_classes=100, timesteps=timesteps)
    relu: Any = relu_network(name)
    relu.to(memory_format=torch.channels_last)
    for norm in (module for module in model.modules() if isinstance(module, BatchNorm)):
        norm.momentum = 1.0
        nn.init.constant_(norm.bias, bias)
    x, labels = torch.randn(batch, 3, size, size), torch.randint(0, 100, (batch,))
    model(torch.randn(4, 3, size, size))
    densities: list[float] = []

    def count(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        densities.append(inputs[0].count_nonzero().item() / inputs[0].numel())

    convolutions = [module for module in model.modules() if isinstance(module, Conv2d)]
    handles = [conv.register_forward_pre_hook(count) for conv in convolutions[1:]]
    model.eval()(x)
    for handle in handles:
        handle.remove()

    def step(network: nn.Module, images: Tensor) -> None:
        network.train().zero_grad()
        logits = network(images).flatten(0, -2)
        F.cross_entropy(logits, labels.repeat(len(logits) // batch)).backward()

    def evaluate(network: nn.Module) -> None:
        with torch.inference_mode():
            network.eval()(x)

    def stream() -> None:
        run = model.eval().stream()
        for t in range(timesteps):
            run.step(x if t == 0 else None)

    def dense(function: Callable[[], None]) -> None:
        with mock.patch.object(native_zeros, "_agreed", frozenset()):
            function()

    own: dict[str, Callable[[], None]] = {
        "step": partial(step, model, x),
        "eval": partial(evaluate, model),
        "stream": stream,
    }
    contestants: dict[str, Callable[[], None]] = {
        f"{kind} dense": partial(dense, run) for kind, run in own.items()
    } | own
    contestants |= {
        "step relu": partial(step, relu, x.repeat(timesteps, 1, 1, 1)),
        "eval relu": partial(evaluate, relu),
    }
    data = SimpleNamespace(mean=(0.5,) * 3, std=(0.25,) * 3)
    trained = SimpleNamespace(
        model=model, description=SimpleNamespace(binning=None), input_shape=(3, size, size)
    )
    trained.config = SimpleNamespace(data=data)
    try:
        network = integers.convert(cast(Trained, trained), timesteps)
        contestants["eval int8"] = partial(evaluate, network)
    except UserError as error:
        print(error)
    seconds: dict[str, list[float]] = {key: [] for key in contestants}
    for turn in range(ROUNDS + 1):  # the first is not counted
        for key, run in contestants.items():
            begin = time.perf_counter()
            run()
            seconds[key] += [time.perf_counter() - begin] if turn else []
    about = {"network": name, "size": size, "batch": batch, "timesteps": timesteps}
    return about | {
        "density": sum(densities) / len(densities),
        **{key: statistics.median(values) for key, values in seconds.items()},
    }


def table() -> str:
    """Return the table of the record: milliseconds, and ratios."""
    rows = []
    for row in json.loads(RECORD.read_text())["rows"]:
        ms = {key: f"{1000 * value:.0f}" for key, value in row.items() if isinstance(value, float)}
        steps = [ms[key] for key in ("step relu", "step dense", "step")]
        keys = ("eval relu", "eval dense", "eval", "eval int8", "stream dense", "stream")
        rows.append(
            [row["network"], str(row["size"]), str(row["batch"]), f"{100 * row['density']:.0f} %"]
            + [*steps, f"{row['step'] / row['step relu']:.2f}"]
            + [ms.get(key, "") for key in keys]
        )
    head = ["", "px", "B", "spikes", "step: ReLU, ms", "dense", "skips", "/ ReLU"]
    head += ["eval: ReLU, ms", "dense", "skips", "int8", "stream: dense, ms", "skips"]
    return markdown(head, rows)


if __name__ == "__main__":
    main()
