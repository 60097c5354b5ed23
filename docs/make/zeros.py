"""Measure what skipping the zeros of spikes saves on this machine's CPU, for docs/performance.md.

    python tools/study.py fewer_spikes_digits --jobs 2 --only weight_0    # and so all of TRAINED
    python docs/make/zeros.py            # writes docs/performance/zeros.json
    python docs/make/performance.py      # then writes the page

Trained networks run on images of their validation split. Networks at ImageNet's shapes have random
weights and images; their norms' biases, all equal, set how many inputs of convolutions are spikes.
All contestants of a row take turns in one process.
"""

import contextlib
import json
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast
from unittest import mock

import other_networks as networks
import pages
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tetdist.apps.benchmarks import bench
from tetdist.apps.weights import integers
from tetdist.apps.weights.trained import Trained, load
from tetdist.data.build import eval_loader
from tetdist.data.splits import open_split
from tetdist.distributed.world import join
from tetdist.errors import UserError
from tetdist.nn.batch_norm import BatchNorm
from tetdist.nn.fast import native_zeros
from tetdist.nn.packed import Conv2d
from tetdist.nn.precision import autocast
from tetdist.storage.files import write_json
from tetdist.tables import markdown

RECORD = Path(__file__).resolve().parents[1] / "performance/zeros.json"
# Study, entry, and images; its first seed is measured.
TRAINED = (
    *(("fewer_spikes_digits", "weight_0", 32), ("fewer_spikes_fashion", "weight_0", 32)),
    ("fewer_spikes_nmnist", "weight_0", 16),
    *(("sparsity_cifar10", f"{family}_resnet18", 8) for family in ("spiking", "ms", "sew")),
)
# Other T and numbers of images, of spiking_resnet18.
GROWTH = ((4, 1), (4, 32), (1, 8), (8, 8))
# Network, size, images, T, norms' bias, neuron.
RANDOM = (
    *(("spiking_resnet34", 224, 1, 4, bias, None) for bias in (-0.8, -0.4, -0.15, 0.1, 0.6, 1.5)),
    *(("ms_resnet18", 224, 1, 4, -0.4, None), ("sew_resnet34", 224, 1, 4, 0.0, None)),
    ("ms_resnet18", 64, 8, 1, 0.0, {"kind": "ilif", "most_spikes": 4}),
)
ROUNDS = 5
# What the page calls a study's data.
DATA = {"digits": "digits", "fashion": "Fashion-MNIST", "nmnist": "N-MNIST", "cifar10": "CIFAR-10"}


def main() -> None:
    pages.no_flags(__doc__)
    rows = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        for study, entry, batch in TRAINED:
            rows += [trained(study, entry, None, batch)]
        for timesteps, batch in GROWTH if threads == 1 else ():
            rows += [trained("sparsity_cifar10", "spiking_resnet18", timesteps, batch)]
        rows += [random(*row) for row in RANDOM]
    write_json(RECORD, {"machine": bench.machine("cpu"), "rows": rows})


# --- networks -------------------------------------------------------------------------------------


def trained(study: str, entry: str, timesteps: int | None, batch: int) -> dict[str, Any]:
    """Return the row of a trained network, on images of its validation split."""
    (run,) = (one for one in pages.runs_of(study) if (one.entry, one.seed) == (entry, 0))
    network = load(run.folder, timesteps=timesteps)
    with join("cpu") as world:
        index = open_split(run.config.data, "val", world)
        with eval_loader(run.config, index, world) as batches:
            images = next(iter(batches)).inputs(torch.device("cpu"), torch.float32)[:batch]
    return measured(run.config.model.name, network, images.contiguous(), data=study)


def random(
    name: str, size: int, batch: int, timesteps: int, bias: float, neuron: dict[str, Any] | None
) -> dict[str, Any]:
    """Return the row of a network with random weights, on random images."""
    torch.manual_seed(0)
    arguments = {"neuron": neuron} if neuron else {}
    model: Any = timm.create_model(name, num_classes=10, timesteps=timesteps, **arguments)
    for norm in (module for module in model.modules() if isinstance(module, BatchNorm)):
        norm.momentum = 1.0
        nn.init.constant_(norm.bias, bias)
    model(torch.randn(4, 3, size, size))
    about = SimpleNamespace(
        model=model,
        config=SimpleNamespace(
            model=SimpleNamespace(name=name),
            data=SimpleNamespace(mean=(0.5,) * 3, std=(0.25,) * 3),
        ),
        description=SimpleNamespace(binning=None),
        input_shape=(3, size, size),
    )
    row = measured(name, cast(Trained, about), torch.randn(batch, 3, size, size))
    return row | {"network": f"{name}, 0 to 4 spikes"} if neuron else row


def beside(name: str, model: Any, channels: int) -> tuple[nn.Module, nn.Module | None]:
    """Make the ReLU network with a network's convolutions, and spikingjelly's network, if any."""
    if name.startswith("spiking_convnet"):
        widths = tuple(block.conv.out_channels for block in (model.stem, *model.blocks))
        sizes = widths, channels, model.input_size
        return networks.convnet(*sizes), networks.spikingjelly_convnet(*sizes)
    relu = networks.relu_network(name)
    assert relu is not None
    return relu, networks.spikingjelly_network(name)


# --- measuring ------------------------------------------------------------------------------------


def measured(name: str, given: Trained, x: Tensor, data: str | None = None) -> dict[str, Any]:
    """Return a row: densities of the inputs of convolutions, and seconds by contestant.

    Args:
        x: Images (B, C, H, W), or event frames (B, T, C, H, W).
    """
    model: Any = given.model
    model.set_execution("fused")
    timesteps, has_time, labels = model.timesteps, x.ndim == 5, torch.arange(len(x)) % 10
    x = x if has_time else x.contiguous(memory_format=torch.channels_last)
    relu: Any
    relu, peer = beside(name, model, x.shape[-3])
    relu.to(memory_format=torch.channels_last)
    frames = x.transpose(0, 1) if has_time else x.expand(timesteps, *x.shape)

    def step(network: nn.Module, images: Tensor) -> None:
        network.train().zero_grad()
        rows = network(images).flatten(0, -2)
        F.cross_entropy(rows, labels.repeat(len(rows) // len(x))).backward()

    def evaluate(network: nn.Module, images: Tensor) -> None:
        with torch.inference_mode():
            network.eval()(images)

    def stream() -> None:
        run = model.eval().stream()
        for t in range(timesteps):
            run.step(frames[t] if has_time or t == 0 else None)

    def dense(run: Callable[[], None]) -> None:
        with mock.patch.object(native_zeros, "_agreed", frozenset()):
            run()

    def in_bfloat16(run: Callable[[], None]) -> None:
        with autocast(torch.device("cpu"), "bf16"):
            run()

    own: dict[str, Callable[[], None]] = {
        "step": partial(step, model, x),
        "eval": partial(evaluate, model, x),
        "stream": stream,
    }
    own["eval bf16"] = partial(in_bfloat16, own["eval"])
    contestants = {f"{kind} dense": partial(dense, run) for kind, run in own.items()} | own
    contestants["step relu"] = partial(step, relu, frames.flatten(0, 1).contiguous())
    contestants["eval relu"] = partial(evaluate, relu, frames[0].contiguous())
    if data and peer:
        contestants["step peer"] = partial(step, peer, frames.contiguous())
    with contextlib.suppress(UserError):  # this network has no integers
        contestants["eval int8"] = partial(evaluate, integers.convert(given, timesteps), x)
    densities = densities_of(model, own["eval"])
    for norm in (module for module in model.modules() if isinstance(module, BatchNorm)):
        norm.momentum = 0.0  # or else steps would change the densities of evaluations
    seconds: dict[str, list[float]] = {key: [] for key in contestants}
    for turn in range(ROUNDS + 1):  # the first is not counted
        for key, run in contestants.items():
            begin = time.perf_counter()
            run()
            seconds[key] += [time.perf_counter() - begin] if turn else []
    row: dict[str, Any] = {"network": name, "data": data, "size": x.shape[-1], "batch": len(x)}
    row |= {"timesteps": timesteps, "threads": torch.get_num_threads(), "densities": densities}
    row["seconds"] = {key: statistics.median(values) for key, values in seconds.items()}
    print(json.dumps(row), flush=True)
    return row


def densities_of(model: nn.Module, run: Callable[[], None]) -> dict[str, float]:
    """Return the share of non-zero inputs of each convolution of spikes, or of their sums."""
    found: dict[str, float] = {}

    def count(name: str, _: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        (x,) = inputs
        if torch.equal(x, x.round()):
            found[name] = x.count_nonzero().item() / x.numel()

    layers = [(name, one) for name, one in model.named_modules() if isinstance(one, Conv2d)]
    handles = [one.register_forward_pre_hook(partial(count, name)) for name, one in layers[1:]]
    run()
    for handle in handles:
        handle.remove()
    return found


# --- the page -------------------------------------------------------------------------------------


def density(row: dict[str, Any]) -> float:
    """Return the mean density of a row's convolutions."""
    return statistics.mean(row["densities"].values())


def spikes(row: dict[str, Any]) -> str:
    """Return the densities of a row's convolutions in percent: mean, and lowest to highest."""
    shares = [100 * share for share in row["densities"].values()]
    return f"{100 * density(row):.0f} ({min(shares):.0f} to {max(shares):.0f})"


def sizes(row: dict[str, Any]) -> list[str]:
    """Return name and sizes of a row's network; trained ones are bold."""
    name = row["network"]
    if row["data"]:
        name = f"**{name}**, {DATA[row['data'].rpartition('_')[2]]}"
    return [name, *(str(row[key]) for key in ("size", "timesteps", "batch"))]


def milliseconds(seconds: float | None) -> str:
    """Return three digits, or all before the point; nothing for None."""
    if seconds is None:
        return ""
    return f"{1000 * seconds:.0f}" if seconds >= 0.1 else f"{1000 * seconds:.3g}"


def tables() -> list[str]:
    """Return the tables of the record: milliseconds on one thread, then ratios of all rows."""
    rows = json.loads(RECORD.read_text())["rows"]
    head = ["", "px", "T", "B", "spikes, %"]
    keys = ["step peer", "step relu", "step dense", "step", "eval relu", "eval dense", "eval"]
    keys += ["eval int8", "stream dense", "stream"]
    names = ["step: spikingjelly, ms", "ReLU", "dense", "skips", "eval: ReLU, ms", "dense", "skips"]
    first = [
        [*sizes(row), spikes(row)] + [milliseconds(row["seconds"].get(key)) for key in keys]
        for row in rows
        if row["threads"] == 1
    ]
    pairs = [("step", "step relu"), ("step", "step dense"), ("eval", "eval dense")]
    pairs += [("eval int8", "eval dense"), ("stream", "stream dense"), ("stream", "eval")]
    pairs += [("eval bf16", "eval bf16 dense")]
    second = [
        [*sizes(row), str(row["threads"]), spikes(row)]
        + [
            f"{row['seconds'][key] / row['seconds'][other]:.2f}" if key in row["seconds"] else ""
            for key, other in pairs
        ]
        for row in rows
    ]
    ratios = ["step / ReLU", "step / dense", "eval / dense", "int8 / dense", "stream / dense"]
    ratios += ["stream / eval", "bf16"]
    return [
        markdown([*head, *names, "int8", "stream: dense, ms", "skips"], first),
        markdown([*head[:4], "threads", head[4], *ratios], second),
    ]


if __name__ == "__main__":
    main()
