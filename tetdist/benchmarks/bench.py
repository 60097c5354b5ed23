"""Benchmarks, each of which measures what it compares side by side in one run.

    python tools/bench.py model                         a training step against the ReLU network's
    python tools/bench.py memory                        bytes kept for the backward pass, by T
    python tools/bench.py scaling                       several processes against one
    python tools/bench.py data --data FOLDER            from JPEG files to batches

All but the last run on the CPU or a GPU, on random images; the last makes images if it has none.
"""

import argparse
import contextlib
import functools
import importlib.metadata
import importlib.util
import json
import os
import platform
import statistics
import sys
import time
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
from torch import Tensor

MIB = 2**20


def numbers(text: str) -> list[int]:
    return [positive(part) for part in text.split(",")]


def positive(text: str) -> int:
    try:
        value = int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number") from None
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value}: the least is 1")
    return value


MODES = ("none", "blocks", "timesteps", "reference")


def modes(text: str) -> list[str]:
    given = text.split(",")
    if unknown := [mode for mode in given if mode not in MODES]:
        raise argparse.ArgumentTypeError(f"{unknown[0]!r} is none of {', '.join(MODES)}")
    return given


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="tools/bench.py", description=__doc__.split("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)

    def command(name: str, precision: str, what: str) -> argparse.ArgumentParser:
        one = commands.add_parser(name, help=what, description=what)
        one.add_argument("--model", default="sew_resnet34", help="default: sew_resnet34")
        one.add_argument("--size", type=positive, help="pixels; default: the model's own")
        one.add_argument("--precision", choices=["fp32", "bf16"], default=precision)
        one.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
        one.add_argument("--json", type=Path, metavar="FILE", help="write the result there, too")
        return one

    def contestants(one: argparse.ArgumentParser, default: str) -> None:
        one.add_argument(
            "--modes",
            type=modes,
            default=default,
            metavar=",".join(MODES),
            help="ways to run our model: activation checkpointing, and the plain definitions; "
            f"default: {default}",
        )
        one.add_argument("--segment", type=positive, default=2, metavar="K", help="of timesteps")
        one.add_argument(
            "--spikingjelly",
            choices=["eager", "compiled"],
            help="also its network of the same name, with the same neuron, where it is installed",
        )

    model = command("model", "fp32", "seconds of a training step, against others side by side")
    model.add_argument("--timesteps", type=positive, default=4, metavar="T")
    model.add_argument("--batch", type=positive, default=4, metavar="B")
    model.add_argument("--repeats", type=positive, default=7, help="rounds in which all take turns")
    model.add_argument("--evaluate", action="store_true", help="the forward pass of an evaluation")
    contestants(model, "none")

    memory = command("memory", "fp32", "bytes kept for the backward pass, by T")
    memory.add_argument("--timesteps", type=numbers, default=[1, 2, 4, 8, 16], metavar="1,2,4")
    contestants(memory, "none,blocks,timesteps")

    scaling = command("scaling", "bf16", "several processes against one, and what many would reach")
    scaling.add_argument("--timesteps", type=positive, default=4, metavar="T")
    scaling.add_argument("--batch", type=positive, default=4, metavar="B", help="micro-batch")
    scaling.add_argument("--accumulation", type=positive, default=1, metavar="N", help="a process")
    scaling.add_argument("--engine", choices=["deepspeed", "torch"], default="deepspeed")
    scaling.add_argument("--processes", type=positive, default=2)
    scaling.add_argument("--threads", type=positive, help="a process; default: its cores")
    scaling.add_argument("--repeats", type=positive, default=5, help="rounds of taking turns")
    scaling.add_argument("--steps", type=positive, default=2, help="of each in a round")
    predicted = scaling.add_argument_group("prediction for 8 to 512 GPUs")
    predicted.add_argument(
        "--images-per-s", type=float, metavar="R", help="of one GPU; default: of one process here"
    )
    predicted.add_argument("--gpus-per-node", type=positive, default=8, metavar="G")
    predicted.add_argument("--link-in-node", type=float, default=100.0, metavar="GB/s")
    predicted.add_argument("--link-between-nodes", type=float, default=12.5, metavar="GB/s")

    what = "images a second, against DALI's own reader and torchvision's DataLoader"
    data = commands.add_parser("data", help=what, description=what)
    data.add_argument("--data", type=Path, metavar="FOLDER", help="of JPEGs; default: made ones")
    data.add_argument("--images", type=positive, default=3000, help="of which an epoch is made")
    data.add_argument("--size", type=positive, default=224, help="pixels")
    data.add_argument("--batch", type=positive, default=32, metavar="B")
    data.add_argument("--threads", type=positive, default=2, help="threads, or workers")
    data.add_argument("--repeats", type=positive, default=9, help="rounds in which all take turns")
    data.add_argument("--batches", type=positive, default=15, help="of each in a round")
    data.add_argument("--epochs", type=int, default=0, help="after each of which memory is taken")
    data.add_argument("--wait", action="store_true", help="also how long a training step waits")
    data.add_argument("--json", type=Path, metavar="FILE", help="write the result there, too")
    data.set_defaults(device="cpu")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    options = parse_arguments(arguments)
    problem = problem_of(options)
    if problem is not None:
        print(f"error: {problem}", file=sys.stderr)
        return 2
    if options.command == "data":
        from tetdist.benchmarks import data

        result = data.measure(options)
        print(data.table(result))
    elif options.command == "memory":
        result = measure_memory(options)
        print(memory_table(result))
    elif options.command == "scaling":
        from tetdist.benchmarks import scaling

        result = scaling.measure(options)
        print(scaling.table(result))
    else:
        result = measure_model(options)
        print(model_table(result))
    if options.json:
        result["machine"] = machine(options.device)
        options.json.write_text(json.dumps(result, indent=1) + "\n")
    return 0


def problem_of(options: argparse.Namespace) -> str | None:
    """What is wrong with the options, said before anything is measured."""
    import timm

    import tetdist.models

    if options.json and (options.json.is_dir() or not options.json.parent.is_dir()):
        return f"--json: {options.json} is no file that can be written"
    if options.device == "cuda" and not torch.cuda.is_available():
        return "--device: torch sees no GPU here; give cpu"
    if options.command == "data":
        return None
    known = [m for name in tetdist.models.MODEL_MODULES for m in timm.list_models(module=name)]
    if options.model not in known:
        return f"--model: {options.model!r} is not a spiking model; there are {', '.join(known)}"
    size = timm.get_pretrained_cfg(options.model).input_size[-1]
    if options.model in ("vggsnn", "spiking_convnet", "spiking_convnet_dvs"):
        # Their classifiers see all positions.
        if options.size not in (None, size):
            return f"--size: {options.model} is built for {size} pixels; leave it out"
    elif options.size is not None and options.size < 33 and size == 224:
        return f"--size: {options.size} pixels leave a batch norm a single one; give 33 or more"
    if getattr(options, "spikingjelly", None):
        if importlib.util.find_spec("spikingjelly") is None:
            return "--spikingjelly: it is not installed; pip install spikingjelly"
        if not options.model.startswith(("sew_resnet", "spiking_resnet")) or (
            options.model == "spiking_resnet19"
        ):
            return f"--spikingjelly: it has no {options.model}"
    for name in ("images_per_s", "link_in_node", "link_between_nodes"):
        value = getattr(options, name, None)
        if value is not None and not 0 < value < float("inf"):
            return f"--{name.replace('_', '-')}: {value:g} must be above 0"
    return None


def machine(device: str) -> dict[str, str]:
    """What the figures depend on."""
    name = torch.cuda.get_device_name() if device == "cuda" else platform.processor()
    with Path("/proc/cpuinfo").open() as stream:
        cpu = next((line.split(":")[1].strip() for line in stream if "model name" in line), name)
    found = {
        "device": name if device == "cuda" else cpu,
        "threads": str(torch.get_num_threads()),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        found["spikingjelly"] = importlib.metadata.version("spikingjelly")
    return found


# --- model -------------------------------------------------------------------------------------


def measure_model(options: argparse.Namespace) -> dict[str, Any]:
    """Seconds of a step of each contestant: medians over rounds in which all take turns."""
    steps = {
        name: step_of(options, contestant()) for name, contestant in contestants_of(options).items()
    }
    warm_up = {}
    for name, step in steps.items():
        started = time.perf_counter()
        step()
        step()
        warm_up[name] = time.perf_counter() - started
        print(f"{name}: first two steps {warm_up[name]:.1f} s", file=sys.stderr, flush=True)
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(options.repeats):
        for name, step in steps.items():
            started = time.perf_counter()
            step()
            seconds[name].append(time.perf_counter() - started)
    first = next(iter(seconds.values()))
    rows = [
        {
            "name": name,
            "seconds": statistics.median(values),
            "fastest": min(values),
            # Each round's own ratio: what slows the machine for a while slows both.
            "ratio": statistics.median(a / b for a, b in zip(values, first, strict=True)),
            "images_per_s": options.batch / statistics.median(values),
            "warm_up": warm_up[name],
            "peak_mib": peak_mib(steps[name]) if options.device == "cuda" else None,
        }
        for name, values in seconds.items()
    ]
    keys = ("model", "size", "timesteps", "batch", "precision", "device", "evaluate", "repeats")
    result = {key: getattr(options, key) for key in keys} | {"rows": rows}
    if not options.evaluate:
        # What launch/slurm.py --benchmark reads.
        own = next(row for row in rows if row["name"].startswith("tetdist"))
        result |= {"images_per_s": own["images_per_s"], "processes": 1}
    return result


def model_table(result: dict[str, Any]) -> str:
    what = "evaluation" if result["evaluate"] else "training step"
    lines = [
        f"{result['model']}, T={result['timesteps']}, batch {result['batch']}, "
        f"{result['precision']}, {result['device']}: a {what}, median of {result['repeats']}",
        "",
        "                            s    / first   images/s   first two steps, s",
    ]
    lines += [
        f"{row['name']:22}{row['seconds']:9.3f}{row['ratio']:12.3f}{row['images_per_s']:11.2f}"
        f"{row['warm_up']:14.1f}"
        + (f"   at most {row['peak_mib']:.0f} MiB" if row["peak_mib"] else "")
        for row in result["rows"]
    ]
    return "\n".join(lines)


# --- contestants -------------------------------------------------------------------------------


class Contestant(NamedTuple):
    model: torch.nn.Module
    images: Tensor
    logits: Callable[[Tensor], Tensor]  # (T, B, K)


def contestants_of(options: argparse.Namespace) -> dict[str, Callable[[], Contestant]]:
    """By name; each is made only when it is called for."""
    contestants: dict[str, Callable[[], Contestant]] = {}
    if relu_twin(options.model):
        contestants["relu"] = functools.partial(relu, options)
    for mode in options.modes:
        contestants[f"tetdist, {mode}"] = functools.partial(ours, options, mode)
    if options.spikingjelly:
        name = f"spikingjelly, {options.spikingjelly}"
        contestants[name] = functools.partial(spikingjelly, options)
    return contestants


def ours(options: argparse.Namespace, mode: str) -> Contestant:
    import timm

    torch.manual_seed(0)
    model = timm.create_model(options.model, timesteps=options.timesteps)
    model.set_execution("reference" if mode == "reference" else "fused")
    model.set_grad_checkpointing(mode in ("blocks", "timesteps"))
    model.set_segment(options.segment if mode == "timesteps" else None)
    return laid_out(options, model, batch_of(options, model), lambda x: model(x, per_timestep=True))


def relu(options: argparse.Namespace) -> Contestant:
    """The ReLU network of the same convolutions, on T times the batch."""
    import timm

    spiking = timm.create_model(options.model, timesteps=options.timesteps)
    twin = relu_twin(options.model)
    assert twin is not None
    images = batch_of(options, spiking)
    if images.ndim == 5:
        images = images.flatten(0, 1)
    else:
        images = images.repeat(options.timesteps, 1, 1, 1)
    return laid_out(
        options, twin, images, lambda x: twin(x).unflatten(0, (options.timesteps, options.batch))
    )


def relu_twin(name: str) -> torch.nn.Module | None:
    """A network of ReLU units with the convolutions of a spiking one, if there is one."""
    import timm
    from timm.models.resnet import BasicBlock, ResNet

    family, _, depth = name.rpartition("resnet")
    if family in ("sew_", "spiking_") and depth != "19":
        return timm.create_model(f"resnet{depth}")
    if depth == "19":
        twin = ResNet(BasicBlock, (3, 3, 2), channels=(128, 256, 512), num_classes=10)
        twin.conv1 = torch.nn.Conv2d(3, 64, 3, padding=1, bias=False)
        twin.maxpool = torch.nn.Identity()
        twin.layer4 = torch.nn.Identity()
        return twin
    if name != "vggsnn":
        return None
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


def spikingjelly(options: argparse.Namespace) -> Contestant:
    from spikingjelly.activation_based import functional, neuron, surrogate
    from spikingjelly.activation_based.model import sew_resnet, spiking_resnet

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

    images = batch_of(options, model, channels=3, size=224)
    return laid_out(options, model, images, logits)


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


def laid_out(
    options: argparse.Namespace,
    model: torch.nn.Module,
    images: Tensor,
    logits: Callable[[Tensor], Tensor],
) -> Contestant:
    model.to(options.device).to(memory_format=torch.channels_last)
    model.train(not options.evaluate)
    if images.ndim == 4:
        images = images.contiguous(memory_format=torch.channels_last)
    return Contestant(model, images, logits)


def step_of(options: argparse.Namespace, contestant: Contestant) -> Callable[[], None]:
    """Forward, TET loss, backward; or the forward pass of an evaluation."""
    from tetdist.losses import tet_loss
    from tetdist.nn.precision import autocast

    model, images, logits = contestant
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


def peak_mib(step: Callable[[], None]) -> float:
    """MiB that a step allocates on the GPU at most, beyond what is there before it."""
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    return (torch.cuda.max_memory_allocated() - before) / MIB


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

    @contextlib.contextmanager
    def counting(self) -> Iterator[None]:
        with torch.autograd.graph.saved_tensors_hooks(self._pack, lambda kept: kept.tensor):
            yield


class _Kept:
    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


def measure_memory(options: argparse.Namespace) -> dict[str, Any]:
    """MiB an image that are held after the forward pass, and at most until the backward's end."""
    options = argparse.Namespace(**vars(options), evaluate=False)
    rows: list[dict[str, Any]] = []
    all_timesteps = options.timesteps
    for timesteps in all_timesteps:
        options.timesteps = timesteps
        for name, contestant in contestants_of(options).items():
            held = []
            # The difference of two batch sizes is what an image costs, without what does not
            # depend on it, such as weights in bfloat16.
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
    rows = result["rows"]
    names = list(dict.fromkeys(row["name"] for row in rows))
    lines = [
        f"{result['model']}, {result['precision']}: MiB an image kept for the backward pass, after "
        "the forward pass (and at most)",
        "",
        "   T" + "".join(f"{name:>24}" for name in names),
    ]
    table = {(row["timesteps"], row["name"]): row for row in rows}
    for timesteps in dict.fromkeys(row["timesteps"] for row in rows):
        cells = []
        for name in names:
            row = table[timesteps, name]
            share = row["after_forward_mib"] / table[timesteps, names[0]]["after_forward_mib"]
            cells.append(
                f"{row['after_forward_mib']:8.1f} ({row['at_most_mib']:6.1f}) {100 * share:4.0f} %"
            )
        lines.append(f"{timesteps:4}" + "".join(f"{cell:>24}" for cell in cells))
    return "\n".join(lines)
