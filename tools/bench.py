"""Benchmarks, each of which measures what it compares side by side in one run.

    python tools/bench.py model                         a training step against the ReLU network's
    python tools/bench.py memory                        bytes kept for the backward pass, by T

Runs on the CPU or a GPU, on random images; needs no data.
"""

import argparse
import json
import os
import platform
import statistics
import sys
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
from torch import Tensor

MIB = 2**20


def numbers(text: str) -> list[int]:
    try:
        values = [int(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list such as 1,2,4") from None
    if min(values) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: the least is 1")
    return values


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="tools/bench.py", description=__doc__.split("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    memory = commands.add_parser("memory", help="bytes kept for the backward pass, by T and mode")
    memory.add_argument("--model", default="sew_resnet34", help="default: sew_resnet34")
    memory.add_argument("--size", type=int, default=None, help="pixels; default: the model's own")
    memory.add_argument("--timesteps", type=numbers, default=[1, 2, 4, 8, 16], metavar="1,2,4")
    memory.add_argument("--precision", choices=["fp32", "bf16"], default="fp32")
    memory.add_argument("--segment", type=int, default=2, metavar="K", help="of {timesteps: K}")
    memory.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    memory.add_argument("--json", type=Path, metavar="FILE", help="write the result there, too")

    model = commands.add_parser(
        "model", help="time of a training step, against others side by side"
    )
    model.add_argument("--model", default="sew_resnet34", help="default: sew_resnet34")
    model.add_argument("--size", type=int, default=None, help="pixels; default: the model's own")
    model.add_argument("--timesteps", type=int, default=4, metavar="T")
    model.add_argument("--batch", type=int, default=4, metavar="B")
    model.add_argument("--precision", choices=["fp32", "bf16"], default="fp32")
    model.add_argument("--repeats", type=int, default=7, help="rounds, each of one step of all")
    model.add_argument("--evaluate", action="store_true", help="the forward pass of an evaluation")
    model.add_argument("--segment", type=int, default=2, metavar="K", help="of {timesteps: K}")
    model.add_argument(
        "--modes",
        default="none",
        metavar="none,blocks,timesteps,reference",
        help="ways to run our model: activation checkpointing, and the plain definitions",
    )
    model.add_argument(
        "--spikingjelly",
        choices=["eager", "compiled"],
        help="also its network of the same name, with the same neuron, where it is installed",
    )
    model.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    model.add_argument("--json", type=Path, metavar="FILE", help="write the result there, too")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    options = parse_arguments(arguments)
    import timm

    import tetdist.models  # noqa: F401  # registers them

    if options.model not in timm.list_models(module="*") and not timm.is_model(options.model):
        print(f"error: --model: there is no model {options.model!r}", file=sys.stderr)
        return 2
    if options.command == "memory":
        result = measure_memory(options)
        print(memory_table(result))
    else:
        result = measure_model(options)
        print(model_table(result))
    if options.json:
        result["machine"] = machine(options.device)
        options.json.write_text(json.dumps(result, indent=1) + "\n")
    return 0


def machine(device: str) -> dict[str, str]:
    """What the figures depend on."""
    name = torch.cuda.get_device_name() if device == "cuda" else platform.processor()
    with Path("/proc/cpuinfo").open() as stream:
        cpu = next((line.split(":")[1].strip() for line in stream if "model name" in line), name)
    return {
        "device": name if device == "cuda" else cpu,
        "threads": str(torch.get_num_threads()),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


# --- model -------------------------------------------------------------------------------------


def measure_model(options: argparse.Namespace) -> dict[str, Any]:
    """Seconds of a step of each contestant: medians over rounds in which all take turns."""
    contestants: dict[str, Callable[[], None]] = {"relu": relu_step(options)}
    for mode in options.modes.split(","):
        contestants[f"tetdist, {mode}"] = our_step(options, mode)
    if options.spikingjelly:
        contestants[f"spikingjelly, {options.spikingjelly}"] = spikingjelly_step(options)
    warm_up = {}
    for name, step in contestants.items():
        started = time.perf_counter()
        step()
        step()
        warm_up[name] = time.perf_counter() - started
        print(f"{name}: first two steps {warm_up[name]:.1f} s", file=sys.stderr, flush=True)
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for _ in range(options.repeats):
        for name, step in contestants.items():
            started = time.perf_counter()
            step()
            seconds[name].append(time.perf_counter() - started)
    rows = [
        {
            "name": name,
            "seconds": statistics.median(values),
            "fastest": min(values),
            # Each round's own ratio: what slows the machine for a while slows both.
            "ratio": statistics.median(a / b for a, b in zip(values, seconds["relu"], strict=True)),
            "images_per_s": options.batch / statistics.median(values),
            "warm_up": warm_up[name],
        }
        for name, values in seconds.items()
    ]
    keys = ("model", "size", "timesteps", "batch", "precision", "device", "evaluate", "repeats")
    result = {key: getattr(options, key) for key in keys} | {"rows": rows}
    if not options.evaluate:
        # What launch/slurm.py --benchmark reads.
        result |= {"images_per_s": rows[1]["images_per_s"], "processes": 1}
    return result


def model_table(result: dict[str, Any]) -> str:
    what = "evaluation" if result["evaluate"] else "training step"
    lines = [
        f"{result['model']}, T={result['timesteps']}, batch {result['batch']}, "
        f"{result['precision']}, {result['device']}: a {what}, median of {result['repeats']}",
        "",
        "                            s   / ReLU net   images/s   first two steps, s",
    ]
    lines += [
        f"{row['name']:22}{row['seconds']:9.3f}{row['ratio']:12.3f}{row['images_per_s']:11.2f}"
        f"{row['warm_up']:14.1f}"
        for row in result["rows"]
    ]
    return "\n".join(lines)


def our_step(options: argparse.Namespace, mode: str) -> Callable[[], None]:
    import timm

    torch.manual_seed(0)
    model = timm.create_model(options.model, timesteps=options.timesteps)
    model.set_execution("reference" if mode == "reference" else "fused")
    model.set_grad_checkpointing(mode in ("blocks", "timesteps"))
    model.set_segment(options.segment if mode == "timesteps" else None)
    return step_of(options, model, batch_of(options, model), lambda x: model(x, per_timestep=True))


def relu_step(options: argparse.Namespace) -> Callable[[], None]:
    """The ReLU network of the same convolutions, on T times the batch."""
    import timm

    spiking = timm.create_model(options.model, timesteps=options.timesteps)
    twin = relu_twin(options.model)
    images = batch_of(options, spiking)
    if images.ndim == 5:
        images = images.flatten(0, 1)
    else:
        images = images.repeat(options.timesteps, 1, 1, 1)
    return step_of(
        options, twin, images, lambda x: twin(x).unflatten(0, (options.timesteps, options.batch))
    )


def relu_twin(name: str) -> torch.nn.Module:
    """A network of ReLU units with the convolutions of a spiking one."""
    import timm
    from timm.models.resnet import BasicBlock, ResNet

    family, _, depth = name.rpartition("resnet")
    if family in ("sew_", "spiking_") and depth != "19":
        return timm.create_model(f"resnet{depth}")
    if depth == "19":
        twin = ResNet(BasicBlock, (3, 3, 2), channels=(128, 256, 512), num_classes=10)
        twin.conv1 = torch.nn.Conv2d(3, 64, 3, padding=1, bias=False)
        twin.maxpool = torch.nn.Identity()
        return twin
    if name != "vggsnn":
        raise SystemExit(f"error: --model: there is no ReLU network for {name!r} here")
    layers: list[torch.nn.Module] = []
    channels = 2
    for width in (64, 128, "pool", 256, 256, "pool", 512, 512, "pool", 512, 512, "pool"):
        if width == "pool":
            layers.append(torch.nn.AvgPool2d(2))
            continue
        layers += [
            torch.nn.Conv2d(channels, int(width), 3, padding=1),
            torch.nn.BatchNorm2d(int(width)),
            torch.nn.ReLU(inplace=True),
        ]
        channels = int(width)
    return torch.nn.Sequential(*layers, torch.nn.Flatten(), torch.nn.Linear(512 * 9, 10))


def spikingjelly_step(options: argparse.Namespace) -> Callable[[], None]:
    try:
        from spikingjelly.activation_based import functional, neuron, surrogate
        from spikingjelly.activation_based.model import sew_resnet, spiking_resnet
    except ImportError:
        raise SystemExit("error: --spikingjelly: it is not installed") from None
    zoo = sew_resnet if options.model.startswith("sew_") else spiking_resnet
    keywords: dict[str, Any] = {"cnf": "ADD"} if zoo is sew_resnet else {}
    model = getattr(zoo, options.model)(
        spiking_neuron=neuron.LIFNode,
        tau=2.0,
        decay_input=False,
        surrogate_function=surrogate.PiecewiseQuadratic(alpha=1.0),
        detach_reset=False,
        **keywords,
    )
    functional.set_step_mode(model, "m")
    run: Callable[[Tensor], Tensor] = model
    if options.spikingjelly == "compiled":
        torch._dynamo.config.recompile_limit = 128
        run = torch.compile(model)

    def logits(images: Tensor) -> Tensor:
        functional.reset_net(model)
        return run(images.expand(options.timesteps, *images.shape))

    return step_of(options, model, batch_of(options, model, channels=3, size=224), logits)


def batch_of(
    options: argparse.Namespace,
    model: Any,
    *,
    channels: int | None = None,
    size: int | None = None,
) -> Tensor:
    """Random images (B, 3, H, W), or event frames (B, T, 2, H, W)."""
    if channels is None:
        channels, size, _ = model.default_cfg["input_size"]
    size = options.size or size
    generator = torch.Generator().manual_seed(0)
    frames = (options.timesteps,) if channels == 2 else ()
    shape = (options.batch, *frames, channels, size, size)
    return torch.rand(shape, generator=generator).to(options.device)


def step_of(
    options: argparse.Namespace,
    model: torch.nn.Module,
    images: Tensor,
    logits: Callable[[Tensor], Tensor],
) -> Callable[[], None]:
    """Forward, TET loss, backward; or the forward pass of an evaluation."""
    from tetdist.losses import tet_loss
    from tetdist.precision import autocast

    model.to(options.device).to(memory_format=torch.channels_last)
    model.train(not options.evaluate)
    if images.ndim == 4:
        images = images.contiguous(memory_format=torch.channels_last)
    labels = torch.arange(options.batch, device=options.device) % 10

    def train() -> None:
        model.zero_grad(set_to_none=True)
        with autocast(images.device, options.precision):
            output = logits(images)
        tet_loss(output, labels, regularization=0.001).backward()
        wait(options.device)

    @torch.no_grad()
    def evaluate() -> None:
        with autocast(images.device, options.precision):
            logits(images)
        wait(options.device)

    return evaluate if options.evaluate else train


def wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


# --- memory ------------------------------------------------------------------------------------


class SavedBytes:
    """Counts what autograd holds for the backward pass, now and at its most.

    A storage is counted once however many operations keep it; parameters are not counted.
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

    @contextmanager
    def counting(self) -> Iterator[None]:
        with torch.autograd.graph.saved_tensors_hooks(self._pack, lambda kept: kept.tensor):
            yield


class _Kept:
    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


def measure_memory(options: argparse.Namespace) -> dict[str, Any]:
    """MiB an image that are held after the forward pass, and at most until the backward's end."""
    modes: dict[str, tuple[bool, int | None]] = {
        "none": (False, None),
        "blocks": (True, None),
        f"timesteps: {options.segment}": (True, options.segment),
    }
    rows: list[dict[str, Any]] = []
    for timesteps in options.timesteps:
        for mode, (recompute, segment) in modes.items():
            # The difference of two batch sizes is what an image costs, without what does not
            # depend on it, such as weights in bfloat16.
            one, two = (
                _held(options, timesteps, recompute, segment, batch=batch) for batch in (1, 2)
            )
            print(f"measured T={timesteps}, {mode}", file=sys.stderr, flush=True)
            rows.append(
                {
                    "timesteps": timesteps,
                    "mode": mode,
                    "after_forward_mib": (two[0] - one[0]) / MIB,
                    "at_most_mib": (two[1] - one[1]) / MIB,
                }
            )
    keys = ("model", "size", "precision", "device")
    return {key: getattr(options, key) for key in keys} | {"rows": rows}


def _held(
    options: argparse.Namespace,
    timesteps: int,
    recompute: bool,
    segment: int | None,
    batch: int,
) -> tuple[int, int]:
    import timm

    from tetdist.precision import autocast

    torch.manual_seed(0)
    model = timm.create_model(options.model, timesteps=timesteps).to(options.device)
    model.to(memory_format=torch.channels_last).train()
    model.set_grad_checkpointing(recompute)
    model.set_segment(segment)
    channels, size, _ = model.default_cfg["input_size"]
    size = options.size or size
    shape = (batch, timesteps, channels, size, size) if channels == 2 else (batch, 3, size, size)
    images = torch.rand(shape, device=options.device)
    saved = SavedBytes(model)
    with saved.counting():
        with autocast(images.device, options.precision):
            loss = model(images, per_timestep=True).float().square().mean()
        after_forward = saved.now
        loss.backward()
    return after_forward, saved.most


def memory_table(result: dict[str, Any]) -> str:
    rows = result["rows"]
    modes = list(dict.fromkeys(row["mode"] for row in rows))
    lines = [
        f"{result['model']}, {result['precision']}: MiB an image kept for the backward pass, after "
        "the forward pass (and at most)",
        "",
        "   T" + "".join(f"{mode:>24}" for mode in modes),
    ]
    table = {(row["timesteps"], row["mode"]): row for row in rows}
    for timesteps in dict.fromkeys(row["timesteps"] for row in rows):
        cells = []
        for mode in modes:
            row = table[timesteps, mode]
            share = row["after_forward_mib"] / table[timesteps, "none"]["after_forward_mib"]
            cells.append(
                f"{row['after_forward_mib']:8.1f} ({row['at_most_mib']:6.1f}) {100 * share:4.0f} %"
            )
        lines.append(f"{timesteps:4}" + "".join(f"{cell:>24}" for cell in cells))
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
