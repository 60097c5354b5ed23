"""Compute what the GPU's passes cost, and write it down: docs/performance/gpu_code.json, and the
section "The GPU path, computed" of docs/performance.md.

    python docs/make/gpu.py

No GPU is needed: Triton compiles the kernels for two kinds of them, as
tetdist/benchmarks/gpu_code.py says, tests/gpu_without_a_gpu/count.py counts launches, and the rest
is arithmetic. Nothing here is measured. The tests compare the code with the record, so this is the
command after a change of a kernel. A minute.
"""

import json
import os
import re
import shlex
import subprocess
import sys
import textwrap
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton

from tetdist.benchmarks import gpu_code
from tetdist.reports.tables import markdown

PROJECT = Path(__file__).resolve().parents[2]
RECORD = PROJECT / "docs" / "performance" / "gpu_code.json"
PAGE = PROJECT / "docs" / "performance.md"
TITLE = "## The GPU path, computed"

# An H100 (SXM): bytes a second from its memory, instructions of a thread a second, and operations a
# second of its matrix units in bfloat16; each times the share that well-made code is seen to reach.
BANDWIDTH = 3.35e12 * 0.8
INSTRUCTIONS = 132 * 128 * 1.75e9 * 0.65
MATRIX = 989e12 * 0.4


@dataclass(frozen=True)
class Cost:
    """Bytes of memory and instructions of a thread, for a number and timestep."""

    bytes: float
    instructions: float

    def seconds(self) -> float:
        return max(self.bytes / BANDWIDTH, self.instructions / INSTRUCTIONS)

    def bound(self) -> str:
        by_memory = self.bytes / BANDWIDTH >= self.instructions / INSTRUCTIONS
        return "memory" if by_memory else "instructions"


# Seconds that the host takes to start a kernel: little more than the launch itself, and with more
# of what Python and torch do around it. Seconds that the GPU takes from one kernel to the next.
# Assumed, as is usual: no GPU has been seen.
STARTS = (5e-6, 10e-6)
BETWEEN_KERNELS = 1e-6
COUNT = "python tests/gpu_without_a_gpu/count.py sew_resnet34 engine=torch"

# What torch.compile made of the same passes before they were written by hand: the kernels of torch
# 2.13's Inductor for sizes that it does not know, read in the same way. `backward_sums` were three,
# which wrote five float32 tensors of the size of a timestep.
COMPILED = {
    "statistics": Cost(4, 180),
    "fire": Cost(7, 60),
    "fire with identity": Cost(9, 60),
    "backward_sums": Cost(20, 217),
    "backward": Cost(6, 95),
}
# Numbers and timesteps in a thread's part of a tile, of bfloat16 at T = 4: four times 16 bytes.
NUMBERS_OF_THREAD = 32


def record() -> dict[str, Any]:
    code = {}
    for name, launch in gpu_code.recorded_launches().items():
        for capability in gpu_code.CAPABILITIES:
            found = gpu_code.compiled(launch, capability)
            kept = ("instructions", "registers", "memory")
            code[f"{name} sm_{capability}"] = {key: getattr(found, key) for key in kept}
    return {"triton": triton.__version__, "code": code}


def hand_written() -> dict[str, Cost]:
    """Costs of the passes; what comes once a program is shared out among its tiles."""
    launches = gpu_code.recorded_launches()
    costs = {}
    for name in COMPILED:
        timesteps = 1 if name == "statistics" else 4
        code, steps = gpu_code.compiled(launches[name], 90), launches[name].argument("steps")
        assert isinstance(steps, int)
        assert code.of_tile
        instructions = code.of_tile + (code.instructions - code.of_tile) / steps
        costs[name] = Cost(code.bytes_of_number(timesteps), instructions / NUMBERS_OF_THREAD)
    return costs


# ------------------------------------------------------------------------------- a whole network


def sew_resnet34(timesteps: int) -> list[dict[str, float]]:
    """Its convolutions, for a 224-pixel image and one timestep: numbers in and out, operations."""
    layers = []

    def add(inputs: int, outputs: int, kernel: int, size: int, stride: int, **more: float) -> None:
        operations = 2 * inputs * outputs * kernel**2 * size**2
        numbers_in = inputs * (size * stride) ** 2
        layer = {"out": outputs * size**2, "in": numbers_in, "operations": 3 * operations}
        layers.append(layer | {"identity": 0, "shared": 0} | more)

    # The stem's convolution is made once for all timesteps; the image needs no gradient.
    add(3, 64, 7, 112, 2, shared=1, operations=2 * 2 * 3 * 64 * 49 * 112**2 / timesteps)
    channels = 64
    for blocks, width, size in ((3, 64, 56), (4, 128, 28), (6, 256, 14), (3, 512, 7)):
        for _ in range(blocks):
            stride = 2 if width != channels else 1
            add(channels, width, 3, size, stride)
            if stride == 2:
                add(channels, width, 1, size, stride)
            add(width, width, 3, size, 1, identity=1)
            channels = width
    return layers


def microseconds(costs: dict[str, Cost], timesteps: int = 4) -> dict[str, float]:
    """A training step's time on an H100 for an image and timestep of sew_resnet34, in parts."""
    layers = sew_resnet34(timesteps)
    spiking = 0.0
    for layer in layers:
        fire = costs["fire with identity" if layer["identity"] else "fire"]
        # Of what all timesteps share, x and its gradient are there once.
        share = timesteps if layer["shared"] else 1
        per_number = costs["statistics"].seconds() / share
        for one in (fire, costs["backward_sums"], costs["backward"]):
            saved = 2 * (1 - 1 / share) * (2 if one is costs["backward"] else 1)
            per_number += Cost(one.bytes - saved, one.instructions).seconds()
        spiking += layer["out"] * per_number
    stem = layers[0]["out"]
    parts = {
        "norm and neuron": spiking,
        "convolutions": sum(layer["operations"] for layer in layers) / MATRIX,
        # Bytes made numbers for the gradient of the weights; sums of gradients of two branches.
        "unpacking": sum(layer["in"] for layer in layers[1:]) * 3 / BANDWIDTH,
        "pooling and sums": (
            sum(layer["out"] * layer["identity"] for layer in layers) * 6 + stem * (3.5 + 3.5)
        )
        / BANDWIDTH,
    }
    return {name: 1e6 * seconds for name, seconds in parts.items()}


def launches(command: str) -> dict[str, int]:
    """Kernels of a step of one micro-batch, by phase."""
    paths = os.pathsep.join([str(PROJECT), str(PROJECT / "tests")])
    done = subprocess.run(
        [sys.executable, *shlex.split(command)[1:]],
        cwd=PROJECT,
        env=os.environ | {"PYTHONPATH": paths},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return {
        phase: int(number) for phase, number in re.findall(r"^(\w+) +(\d+)$", done.stdout, re.M)
    }


def small_batches(seconds_of_image: float) -> str:
    """What launches cost where the micro-batch is small, without graphs and with them."""
    counts = [launches(command) for command in (COUNT, f"{COUNT} cuda_graphs=true")]
    alone, graphed = (
        sum(one.get(phase, 0) for phase in ("forward", "loss", "backward")) for one in counts
    )
    rest = sum(counts[1][phase] for phase in ("input", "update", "statistics"))
    rows = []
    for batch in (1, 4, 8, 16, 32):
        work = batch * seconds_of_image + alone * BETWEEN_KERNELS
        times = [*(max(work, start * alone) for start in STARTS), work + STARTS[1] * graphed]
        rows.append([str(batch), *(f"{1e3 * one:.1f}" for one in times)])
    starts = [f"{1e6 * start:g} us" for start in STARTS]
    table = markdown(["batch", *(f"{start} a launch" for start in starts), "a graph"], rows)
    enough = [
        f"{(start - BETWEEN_KERNELS) * alone / seconds_of_image:.0f} at {text}"
        for start, text in zip(STARTS, starts, strict=True)
    ]
    text = f"""Forward, loss and backward pass of a micro-batch are {alone} launches, and {graphed}
    with `cuda_graphs=true`: the graph, two copies of its input, and its sums. (`{COUNT}`, and the
    same with `cuda_graphs=true`. Input, update and running statistics are {rest} more in both.)
    The host takes some microseconds for each, and a GPU that is faster waits for it: with
    micro-batches
    below {", below ".join(enough)}. A graph is for these. In milliseconds of a micro-batch,
    assumed that a launch takes so long and that the GPU takes {1e6 * BETWEEN_KERNELS:g} us from
    one kernel to the next:"""
    return f"{textwrap.fill(' '.join(text.split()), 100)}\n\n{table}"


def section(found: dict[str, Any]) -> str:
    by_hand = hand_written()
    rows = [
        [
            name,
            f"{before.bytes:g}",
            f"{before.instructions:.0f}",
            f"{by_hand[name].bytes:g}",
            f"{by_hand[name].instructions:.0f}",
            f"{found['code'][f'{name} sm_90']['registers']}",
            f"{1e12 * before.seconds():.1f}",
            f"{1e12 * by_hand[name].seconds():.1f}",
            by_hand[name].bound(),
        ]
        for name, before in COMPILED.items()
    ]
    passes = markdown(
        ["pass", "bytes before", "instructions", "bytes now", "instructions", "registers",
         "ps before", "ps now", "bound by"], rows
    )  # fmt: skip
    networks = []
    for name, costs in (("torch.compile's", COMPILED), ("hand-written", by_hand)):
        parts = microseconds(costs)
        total = sum(parts.values())
        rates = [f"{total:.0f}", f"{1e6 / total / 4:.0f}", f"{total * 4 * 32 / 1e3:.1f}"]
        networks.append([name, *(f"{one:.0f}" for one in parts.values()), *rates])
    whole = markdown(
        ["passes", *microseconds(by_hand), "all", "images/s", "ms, batch 32"], networks
    )
    return f"""{TITLE}

*Computed, not measured*: no GPU has run these passes. Made by `python docs/make/gpu.py`, from the
code that Triton {found["triton"]} makes for an H100 (sm_90), and arithmetic.

Of a number and timestep, in bfloat16 at T = 4, with 64 channels: bytes that a pass loads and
stores, instructions of a thread in machine code, registers of a thread, and the picoseconds that
the larger of the two takes at 80 % of 3.35 TB/s, or at 65 % of all instructions that 132 processors
can issue. What comes once a program is shared out as for a layer of 56x56 pixels at batch 32.
"Before" is what torch.compile made of the passes, without knowing their sizes; its backward sums
were three kernels.

{passes}

All that a training step of sew_resnet34 (T=4, 224 pixels, bfloat16) takes of the GPU, in
microseconds an image and timestep, with convolutions at 40 % of 989 TFLOP/s:

{whole}

Left out are launches, the head, and the update.

{small_batches(4e-6 * sum(microseconds(by_hand).values()))}
"""


def main() -> None:
    found = record()
    RECORD.write_text(json.dumps(found, indent=1) + "\n")
    text = PAGE.read_text()
    new = section(found)
    if TITLE in text:
        start = text.index(TITLE)
        end = re.compile(r"^## ", re.M).search(text, start + len(TITLE))
        text = text[:start] + new + "\n" + (text[end.start() :] if end else "")
    else:
        commands = text.index("## The commands")
        text = text[:commands] + new + "\n" + text[commands:]
    PAGE.write_text(text)


if __name__ == "__main__":
    main()
