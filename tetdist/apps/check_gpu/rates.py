"""Check of rates: images a second of a training step, beside the ReLU network on the same card."""

import gc
import statistics
import time
from collections.abc import Callable
from typing import Any

import timm
import torch

from tetdist.apps.benchmarks.scaling import training_step
from tetdist.apps.check_gpu import remedies
from tetdist.apps.check_gpu.check import Finding, Machine, Status
from tetdist.losses import tet_loss
from tetdist.nn.precision import autocast

BATCHES = (32, 64, 128)
MODEL, PRECISION, TIMESTEPS = "sew_resnet34", "bf16", 4
OWN, GRAPHS, RELU = "tetdist", "tetdist, CUDA graphs", "relu"
# Number of steps timed together, and of such rounds.
TIMED, ROUNDS = 10, 5
# Least ratios to the ReLU network's rate that are as expected, and slow; kernels that read and
# write each number once reach 1.06 on an H100. Nothing that does all of its work is twice as fast.
REACHED, SLOWLY, AT_MOST = 0.7, 0.35, 2.0
KERNELS = (
    "tetdist's kernels are slow here, beside the ReLU network on the same card: report this with "
    "the JSON file"
)
IMPOSSIBLE = "report this with the JSON file, since a step that does all of its work takes longer"


def check_rates(here: Machine) -> Finding:
    """Measure images a second and peak memory of sew_resnet34's training steps, by batch size."""
    names = [RELU, OWN, GRAPHS] if here.on_gpu else [RELU, OWN]
    rows_of = {
        batch: compared_with_relu({name: measured(here, name, batch) for name in names})
        for batch in ((2,) if here.small else BATCHES)
    }
    numbers: dict[str, Any] = {"by_batch": {str(batch): rows for batch, rows in rows_of.items()}}
    text = "; ".join(_summary(batch, rows) for batch, rows in rows_of.items())
    fitting = [rows[OWN] for rows in rows_of.values() if "images_per_s" in rows[OWN]]
    if not fitting:
        return Finding("bad", text, remedies.BUSY, numbers)
    # Keys that `slurm --benchmark` reads, for the recipes' micro-batch.
    numbers |= {"images_per_s": fitting[0]["images_per_s"], "timesteps": TIMESTEPS}
    numbers |= {"model": MODEL, "size": _size(here), "precision": PRECISION}
    status, remedy = judged([1 / row["ratio"] for row in fitting if row["ratio"]])
    # The rate at the largest batch depends most on the GPU, and least on the host.
    speed = fitting[-1]["images_per_s"]
    if here.small:
        status, remedy = "ok", None
    return Finding(status, text, remedy, numbers, speed=speed)


def judged(ratios: list[float]) -> tuple[Status, str | None]:
    """Judge the ratios to the ReLU network's rate at all batch sizes."""
    if not all(SLOWLY <= ratio <= AT_MOST for ratio in ratios):
        return "bad", IMPOSSIBLE if max(ratios) > AT_MOST else KERNELS
    return "ok", None if min(ratios, default=REACHED) >= REACHED else KERNELS


def compared_with_relu(rows: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Add to each row the time of its step relative to the ReLU network's; None: unknown."""
    relu = rows[RELU].get("images_per_s")
    for row in rows.values():
        own = row.get("images_per_s")
        row["ratio"] = relu / own if relu and own else None
    return rows


def measured(here: Machine, name: str, batch: int) -> dict[str, Any]:
    """Return rate and peak memory of a network's steps, which have the GPU's memory alone."""
    gc.collect()
    if here.on_gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(here.device)
    try:
        seconds = seconds_of(here, step_of(here, name, batch))
    except torch.OutOfMemoryError:
        return {"out_of_memory": True}
    peak = torch.cuda.max_memory_allocated(here.device) / 2**20 if here.on_gpu else None
    return {"images_per_s": batch / seconds, "peak_mib": peak}


def step_of(here: Machine, name: str, batch: int) -> Callable[[], object]:
    """Make a training step: the trainer's, or one of the ReLU network on T times the batch."""
    size = _size(here)
    if name != RELU:
        settings: dict[str, Any] = {"engine": "torch", "precision": PRECISION}
        settings["cuda_graphs"] = name == GRAPHS
        return training_step(here.alone, MODEL, size=size, batch=batch, **settings)
    model = timm.create_model("resnet34").to(here.device, memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    images = torch.rand(TIMESTEPS * batch, 3, size, size, device=here.device)
    images = images.contiguous(memory_format=torch.channels_last)
    labels = torch.arange(batch, device=here.device) % 10

    def step() -> None:
        optimizer.zero_grad()
        with autocast(here.device, PRECISION):
            logits = model(images).unflatten(0, (TIMESTEPS, batch))
        tet_loss(logits, labels, lambda_=0.001).backward()
        optimizer.step()

    return step


def seconds_of(here: Machine, step: Callable[[], object]) -> float:
    """Return the median time of a step."""
    seconds = []
    steps, rounds = (1, 2) if here.small else (TIMED, ROUNDS)
    for _ in range(1 + rounds):
        here.world.wait_for_device()
        started = time.perf_counter()
        for _ in range(steps):
            step()
        here.world.wait_for_device()
        seconds.append((time.perf_counter() - started) / steps)
    return statistics.median(seconds[1:])  # the first round compiles and chooses algorithms


def _size(here: Machine) -> int:
    return 33 if here.small else 224


def _summary(batch: int, rows: dict[str, dict[str, Any]]) -> str:
    own, graphs = rows[OWN], rows.get(GRAPHS, {})
    if "images_per_s" not in own:
        return f"b={batch}: out of memory"
    text = f"b={batch}: {own['images_per_s']:.0f} images/s, "
    text += f"{1 / own['ratio']:.2f} of ReLU's" if own["ratio"] else "ReLU's out of memory"
    if "images_per_s" in graphs:
        text += f", with CUDA graphs {graphs['images_per_s']:.0f}"
    return text + (f", {own['peak_mib'] / 1024:.1f} GiB" if own["peak_mib"] else "")
