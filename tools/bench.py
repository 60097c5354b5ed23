"""Benchmarks, each of which measures what it compares side by side in one run.

    python tools/bench.py memory                        bytes kept for the backward pass, by T

Runs on the CPU or a GPU, on random images; needs no data.
"""

import argparse
import json
import os
import platform
import sys
import weakref
from collections.abc import Iterator
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
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    options = parse_arguments(arguments)
    import timm

    import tetdist.models  # noqa: F401  # registers them

    if options.model not in timm.list_models(module="*") and not timm.is_model(options.model):
        print(f"error: --model: there is no model {options.model!r}", file=sys.stderr)
        return 2
    result = measure_memory(options)
    print(memory_table(result))
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
