"""Compute the cost of the GPU's kernels, and write docs/performance/gpu_code.json and the section
"The GPU path, computed" of docs/performance.md.

    python docs/make/gpu.py

No GPU is needed: Triton compiles the kernels for two kinds of GPU (see tests/gpu_code.py),
tetdist/apps/roofline counts a step's work, and tests/gpu_without_a_gpu its launches; the rest is
arithmetic. Nothing here is measured. Tests compare the code with this record, so run the command
after each change of a kernel. It takes two minutes.
"""

import json
import re
import sys
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import timm
import triton

import tetdist.models  # noqa: F401  # registers them with timm
from tetdist.apps.benchmarks.relu_baselines import relu_baseline
from tetdist.apps.roofline.cards import CARDS, Card
from tetdist.apps.roofline.count import Kernel, Work, count
from tetdist.apps.roofline.estimate import (
    ARITHMETIC_SHARES,
    BANDWIDTH_SHARE,
    LAUNCH_SECONDS,
    Estimate,
    estimate,
)
from tetdist.apps.slurm.cluster import ClusterSection
from tetdist.apps.slurm.plan import communication_seconds
from tetdist.tables import markdown

PROJECT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(PROJECT), str(PROJECT / "tests"), str(PROJECT / "tests/gpu_without_a_gpu")]

import gpu_code  # noqa: E402  # of the tests
import worker  # noqa: E402  # also of the tests

RECORD = PROJECT / "docs" / "performance" / "gpu_code.json"
PAGE = PROJECT / "docs" / "performance.md"
TITLE = "## The GPU path, computed"

H100 = CARDS["H100"]
# Thread instructions per second of an H100: 132 processors x 128 lanes x their clock x the fraction
# that is issued in practice.
INSTRUCTIONS = 132 * 128 * 1.75e9 * 0.65
MODEL, TIMESTEPS, BATCH, PRECISION = "sew_resnet34", 4, 32, "bf16"
RECOMPUTE = ("none", "blocks", "{timesteps: 2}")
NETWORKS = (
    *("sew_resnet34", "spiking_resnet34", "preact_resnet34", "ms_resnet34", "psn_sew_resnet34"),
    *("qkformer_10_384", "sdt_8_384", "maxformer_10_384"),
)


@dataclass(frozen=True)
class Cost:
    """Bytes of memory and instructions of a thread, for a number and timestep."""

    bytes: float
    instructions: float

    def _by_memory(self) -> float:
        return self.bytes / (1e9 * H100.bandwidth * BANDWIDTH_SHARE)

    def seconds(self) -> float:
        return max(self._by_memory(), self.instructions / INSTRUCTIONS)

    def bound(self) -> str:
        is_memory = self._by_memory() >= self.instructions / INSTRUCTIONS
        return "memory" if is_memory else "instructions"


# The kernels that torch.compile (torch 2.13) made for sizes that it does not know, before they were
# written by hand; its `backward_sums` were three kernels. Commit 76a8d6b removed the code that
# counted them, and the step: milliseconds at batch 32, and launches.
COMPILED = {
    "statistics": Cost(4, 180),
    "fire": Cost(7, 60),
    "fire with identity": Cost(9, 60),
    "backward_sums": Cost(20, 217),
    "backward": Cost(6, 95),
}
COMPILED_STEP, COMPILED_LAUNCHES = 22.7, 1650
KERNELS = (*COMPILED, "fire psn", "backward_sums psn", "backward psn")
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
    """Compute the costs of the kernels, with a program's fixed cost divided among its tiles."""
    launches = gpu_code.recorded_launches()
    costs = {}
    for name in KERNELS:
        timesteps = 1 if name == "statistics" else TIMESTEPS
        code, steps = gpu_code.compiled(launches[name], 90), launches[name].argument("steps")
        assert isinstance(steps, int)
        assert code.of_tile
        instructions = code.of_tile + (code.instructions - code.of_tile) / steps
        costs[name] = Cost(code.bytes_of_number(timesteps), instructions / NUMBERS_OF_THREAD)
    return costs


# ------------------------------------------------------------------------------- a whole network


def work_of(recompute: str) -> Work:
    """Count the GPU work of a micro-batch of sew34_t4.yaml."""
    model = timm.create_model(MODEL, timesteps=TIMESTEPS)
    model.set_grad_checkpointing(recompute != "none")
    model.set_segment(2 if recompute == "{timesteps: 2}" else None)
    return count(model, (BATCH, 3, 224, 224), PRECISION)


PHASES = (("forward", "loss", "backward"), ("update", "statistics"), ("input",))


def launches() -> tuple[dict[str, list[int]], dict[str, int]]:
    """Count the kernels of a step with tests/gpu_without_a_gpu: of MODEL, by settings and PHASES;
    of NETWORKS in the forward and backward pass."""

    def counted(running: worker.Worker, model: str, settings: str) -> list[int]:
        # The second step, since the first would capture a graph.
        answer = running.run(model, *settings.split(), steps=2)
        assert answer["error"] is None, answer["error"]
        return [worker.launches(answer, *names) for names in PHASES]

    with tempfile.TemporaryDirectory() as folder, worker.started(Path(folder)) as running:
        ways = ("engine=torch", "engine=deepspeed", "engine=torch cuda_graphs=true")
        found = {settings: counted(running, MODEL, settings) for settings in ways}
        return found, {name: counted(running, name, ways[0])[0] for name in NETWORKS}


def network_rows(counts: dict[str, int]) -> list[list[str]]:
    """Estimate the micro-batch of each of NETWORKS, and of its ReLU network on T times the batch.

    Args:
        counts: Their launches.
    """
    rows = []
    for name, number in counts.items():
        work = count(timm.create_model(name, timesteps=TIMESTEPS), (BATCH, 3, 224, 224), PRECISION)
        times = [sum(estimate(work, H100).by_kind.values())]
        if (relu := relu_baseline(name)) is not None:
            work_of_relu = count(relu, (BATCH * TIMESTEPS, 3, 224, 224), PRECISION)
            times.append(sum(estimate(work_of_relu, H100).by_kind.values()))
        moved = sum(kernel.bytes for kernel in work.kernels) / 1e9
        ms = [f"{1e3 * one:.1f}" for one in times]
        rows.append([name, str(number), f"{moved:.1f}", *ms, *[""] * (2 - len(ms))])
    return rows


def narrow_convolutions() -> list[list[str]]:
    """Estimate the forward convolutions of spikes in bytes or bits, at best, in milliseconds.

    With bytes, matrix units are twice as fast and inputs have half the bytes of bfloat16; with bits
    there are no units for real weights, and the others add up weights, without products.
    """
    rows = []
    for name in (MODEL, "qkformer_10_384"):
        work = count(timm.create_model(name, timesteps=TIMESTEPS), (BATCH, 3, 224, 224), PRECISION)
        convolutions = [one for one in work.kernels if one.name == "convolution"]

        def milliseconds(
            faster: Card, kernels: list[Kernel] = convolutions, precision: str = PRECISION
        ) -> str:
            found = estimate(Work(BATCH, precision, tuple(kernels), 0), faster)
            return f"{1e3 * (found.memory + found.arithmetic):.1f}"

        in_bytes = [replace(one, bytes=one.bytes * 3 // 4) for one in convolutions]
        added = [replace(one, operations=one.operations // 2) for one in convolutions]
        rows.append(
            [
                name,
                milliseconds(H100),
                milliseconds(replace(H100, bf16=2 * H100.bf16), in_bytes),
                milliseconds(replace(H100, reached=1.0), added, "fp32"),
                milliseconds(H100, list(work.kernels)),
            ]
        )
    return rows


def small_batches(seconds_of_image: float, alone: int, graphed: int) -> list[list[str]]:
    """Estimate the milliseconds of a micro-batch, launched kernel by kernel and as a graph."""
    rows = []
    for batch in (1, 4, 8, 16, 32):
        work = batch * seconds_of_image
        times = (max(work, LAUNCH_SECONDS * alone), work + LAUNCH_SECONDS * graphed)
        rows.append([str(batch), *(f"{1e3 * one:.1f}" for one in times)])
    return rows


def many_gpus(found: Estimate) -> list[list[str]]:
    parameters = sum(p.numel() for p in timm.create_model(MODEL).parameters())
    cluster = ClusterSection()
    rows = []
    for gpus in (8, 16, 64, 512):
        averaging = communication_seconds(4 * parameters, gpus // 8, 8, cluster)
        efficiency = found.seconds / (found.seconds + averaging)
        rate = gpus * efficiency * found.images_per_s
        rows.append([str(gpus), f"{1e3 * averaging:.1f}", f"{efficiency:.2f}", f"{rate:.0f}"])
    return rows


def section(code: dict[str, Any]) -> str:
    by_hand = hand_written()
    rows = [
        [
            name,
            f"{by_hand[name].bytes:g}",
            f"{by_hand[name].instructions:.0f}",
            f"{code['code'][f'{name} sm_90']['registers']}",
            f"{1e12 * by_hand[name].seconds():.1f}",
            by_hand[name].bound(),
        ]
        for name in KERNELS
    ]
    kernels = markdown(
        [
            "kernel",
            "bytes",
            "instructions",
            "registers",
            "ps",
            "bound by",
        ],
        rows,
    )
    works = {recompute: work_of(recompute) for recompute in RECOMPUTE}
    now = estimate(works["none"], H100)
    kinds = sorted(now.by_kind, key=lambda kind: -now.by_kind[kind])
    networks = []
    for recompute, work in works.items():
        parts = estimate(work, H100).by_kind
        total = sum(parts.values())
        each = [f"{1e6 * parts[kind] / BATCH / TIMESTEPS:.0f}" for kind in kinds]
        mib = work.peak_bytes / BATCH / 2**20
        networks.append(
            [
                recompute,
                *each,
                f"{1e6 * total / BATCH / TIMESTEPS:.0f}",
                f"{BATCH / total:.0f}",
                f"{1e3 * total:.1f}",
                f"{mib:.0f}",
            ]
        )
    whole = markdown(
        ["recompute", *kinds, "all", "images/s", f"ms, batch {BATCH}", "MiB an image"],
        networks,
    )
    cards = []
    for card in CARDS.values():
        precision = PRECISION if card.arithmetic(PRECISION) else "fp16"
        found = estimate(Work(BATCH, precision, works["none"].kernels, 0), card)
        memory = found.memory / (found.memory + found.arithmetic)
        cards.append(
            [
                card.name,
                precision,
                f"{card.bandwidth / 1e3:.2f}",
                f"{card.arithmetic(precision):.0f}",
                f"{1e3 * found.seconds:.1f}",
                f"{found.images_per_s:.0f}",
                f"{100 * memory:.0f} %",
            ]
        )
    of_cards = markdown(
        ["GPU", "precision", "TB/s", "TFLOP/s", f"ms, batch {BATCH}", "images/s", "memory-bound"],
        cards,
    )
    counts, of_networks = launches()
    many = markdown(
        ["network", "launches", "GB moved", "ms", "ReLU network, ms"], network_rows(of_networks)
    )
    narrow = markdown(
        ["network", "bf16", "fp8, int8", "bits", "whole step, bf16"], narrow_convolutions()
    )
    of_engines = markdown(
        ["settings", "forward and backward", "update and statistics", "input"],
        [[settings, *map(str, numbers)] for settings, numbers in counts.items()],
    )
    alone, graphed = counts["engine=torch"][0], counts["engine=torch cuda_graphs=true"][0]
    compiled = markdown(
        ["", "torch.compile", "by hand"],
        [
            *(
                [f"{name}: {what}", f"{before:{form}}", f"{after:{form}}"]
                for name, one in COMPILED.items()
                for what, form, before, after in (
                    ("bytes", "g", one.bytes, by_hand[name].bytes),
                    ("ps", ".1f", 1e12 * one.seconds(), 1e12 * by_hand[name].seconds()),
                )
            ),
            [f"step: ms, batch {BATCH}", f"{COMPILED_STEP}", f"{1e3 * now.seconds:.1f}"],
            ["step: launches, about", f"{COMPILED_LAUNCHES}", f"{alone}"],
        ],
    )
    small = markdown(
        ["batch", "ms, kernel by kernel", "ms, as a graph"],
        small_batches(now.seconds / BATCH, alone, graphed),
    )
    gpus = markdown(["GPUs", "averaging, ms", "efficiency", "images/s"], many_gpus(now))
    host = 1e3 * LAUNCH_SECONDS * alone
    bandwidth = f"{100 * BANDWIDTH_SHARE:.0f} % of {H100.bandwidth / 1e3:g} TB/s"
    arithmetic = (
        f"{100 * ARITHMETIC_SHARES[PRECISION] * H100.reached:.0f} % of {H100.bf16:g} TFLOP/s"
    )
    return f"""{TITLE}

*Computed, not measured*: no GPU has run these kernels. `python docs/make/gpu.py` made this section
from arithmetic and from the code that Triton {code["triton"]} generates for an H100 (sm_90). Run it
again after a change of a kernel; it prints the changed lines.

### Kernels

Cost of one element and timestep, in bfloat16 at T = {TIMESTEPS}, with 64 channels:

* bytes: what the kernel loads and stores;
* instructions, registers: those of a thread in machine code;
* ps: the longer of two times, that of the bytes at {bandwidth}, and that of the
  instructions at 65 % of all that 132 processors can issue.

Instructions that occur once per program are divided among its elements as for a layer of 56x56
pixels at batch 32. (`tests/gpu_code.py` counts them; `pytest tests/nn/test_triton_code.py` compares
with docs/performance/gpu_code.json.)

{kernels}

### Steps

Time of a micro-batch of {MODEL} (T={TIMESTEPS}, 224 pixels, bfloat16) on an H100, in
microseconds per image and timestep. A kernel takes the longer of two times: that of its bytes at
{bandwidth}, and that of its operations at {arithmetic}.
Memory is the maximum of activations and gradients. (`tetdist/apps/roofline`; `pytest
tests/roofline` compares it with the kernels' own code, with the memory measured above, and with
measurements of a ReLU ResNet-50 by NVIDIA and MLPerf.)

{whole}

The same for other GPUs. The last column is the fraction of the time that is bound by memory. The
figures of A40, B200 and RTX have not been compared with a measurement:

{of_cards}

The loss, the update and loading are not included.

Other networks on an H100: kernels launched in the forward and backward pass of one micro-batch of
{BATCH} (T={TIMESTEPS}, {PRECISION}) with each network's recipe, bytes moved, and time. The ReLU
network has the same convolutions, and torch's layers, on {TIMESTEPS} times the batch;
transformers have none:

{many}

Only bytes and matrix products count here, not that `backward_sums psn` is bound by instructions.
Kernels that also add up the gradients of a tensor's branches, as at a shortcut, were written and
taken out: they save 1 to 3 % of the time (qkformer_10_384 0.7 ms), spill registers at T=8, and
a program that reads a gradient at a block's output, as Grad-CAM does, would get a part of it.

### Convolutions of bytes and bits

Spikes fit into 8 bits or one. Milliseconds of the forward convolutions of a micro-batch, at best:

{narrow}

fp8 and int8 would round the weights in the forward pass, which trains another network; the backward
pass, twice as much work, multiplies real gradients and stays in bfloat16. That saves a tenth of a
step at best, so it does not pay, and convolutions of packed bits are slower. Convolutions that
read spikes in bytes, compute in bfloat16 and sum up the statistics of the next norm are not
written: only a GPU can show whether they match cuDNN's.

### Launches

Number of kernels in a step of one micro-batch, counted by tests/gpu_without_a_gpu. A graph is one
launch, besides the copies of its input. At an estimated {1e6 * LAUNCH_SECONDS:.0f} us per launch,
the host takes {host:.1f} ms for the forward and backward pass. If the batch is so small that the
GPU itself needs less time, the GPU waits for the host: there `cuda_graphs=true` helps.

{of_engines}

{small}

### Compared with torch.compile's kernels

torch.compile made the same kernels before we wrote them by hand. The units are those above:

{compiled}

### Many GPUs

Computed by the communication model of `launch/slurm.py --dry-run --gpu H100` (which keeps a
recipe's batch, and gives hours). Each GPU has a micro-batch of {BATCH} per step, so the global
batch grows with the number of GPUs. The {H100.name} are in nodes of 8. Gradients are averaged at
100 GB/s within a node and 12.5 GB/s between nodes, without overlap with computation.

{gpus}
"""


def main() -> None:
    found = record()
    before = json.loads(RECORD.read_text()) if RECORD.is_file() else {}
    RECORD.write_text(json.dumps(found, indent=1) + "\n")
    text = PAGE.read_text()
    new = section(found)
    start = text.index(TITLE) if TITLE in text else text.index("## Limits")
    end = start
    if TITLE in text:
        following = re.compile(r"^## ", re.M).search(text, start + len(TITLE))
        end = following.start() if following else len(text)
    old = text[start:end]
    PAGE.write_text(text[:start] + new + "\n" + text[end:])
    for file, is_same in ((RECORD, found == before), (PAGE, old.strip() == new.strip())):
        print(f"{file.relative_to(PROJECT)}: {'unchanged' if is_same else 'changed'}")
    for line in new.splitlines():
        if line not in old.splitlines():
            print(f"  {line}")


if __name__ == "__main__":
    main()
