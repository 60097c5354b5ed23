"""Check of rates: training throughput, compared with the ReLU network's and spikingjelly's."""

import argparse
import contextlib
import gc
import importlib.util
from typing import Any

import torch

from tetdist.apps.benchmarks.bench import measure_here
from tetdist.apps.benchmarks.contestants import contestants_of
from tetdist.apps.check_gpu import remedies
from tetdist.apps.check_gpu.check import OWN, Finding, Machine

BATCHES = (32, 64, 128)
MODEL, PRECISION, TIMESTEPS = "sew_resnet34", "bf16", 4
RELU, PEER = "relu", "spikingjelly, eager"


def check_rates(here: Machine) -> Finding:
    """Measure images a second and peak memory of sew_resnet34's training steps, by batch size."""
    with_peer = importlib.util.find_spec("spikingjelly") is not None
    measured = {
        batch: rates_of(_options(here, batch, with_peer))
        for batch in ((2,) if here.small else BATCHES)
    }
    numbers: dict[str, Any] = {"by_batch": {str(batch): rows for batch, rows in measured.items()}}
    text = "; ".join(_summary(batch, rows) for batch, rows in measured.items())
    fitting = [batch for batch, rows in measured.items() if fits(rows[OWN])]
    if not fitting:
        return Finding("bad", text, remedies.BUSY, numbers)
    # Keys that `slurm --benchmark` reads, for the recipes' micro-batch.
    numbers |= {
        "micro_batch": fitting[0],
        "images_per_s": measured[fitting[0]][OWN]["images_per_s"],
        "timesteps": TIMESTEPS,
        "model": MODEL,
        "size": _size(here),
        "precision": PRECISION,
    }
    # The rate at the largest batch depends most on the GPU, and least on the host.
    speed = measured[fitting[-1]][OWN]["images_per_s"]
    return Finding("ok", text, None, numbers, speed=speed)


def images_per_s_of_a_step(here: Machine, batch: int) -> float:
    """Return the images a second of sew_resnet34's training steps, T = 4."""
    (own,) = measure_here([OWN], _options(here, batch, with_peer=False))
    return float(own["images_per_s"])


def _size(here: Machine) -> int:
    return 33 if here.small else 224


def fits(row: dict[str, Any]) -> bool:
    """Return whether a contestant's step fits into the GPU's memory."""
    return not row.get("out_of_memory")


def rates_of(options: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Return each contestant's figures; they take turns if all fit into memory together."""
    names = list(contestants_of(options))
    by_name: dict[str, dict[str, Any]] = {}
    try:
        for row in measure_here(names, options):
            by_name[row["name"]] = _figures(row, row["ratio"])
    except torch.OutOfMemoryError:
        by_name.clear()
    # Not inside `except`, where the error would keep the memory allocated.
    if not by_name:
        alone = {name: _alone(name, options) for name in names}
        relu = alone[RELU]
        for name, own in alone.items():
            if own is None:
                by_name[name] = {"out_of_memory": True}
            else:
                ratio = None if relu is None else relu["images_per_s"] / own["images_per_s"]
                by_name[name] = _figures(own, ratio)
    return by_name


def _figures(row: dict[str, Any], ratio: float | None) -> dict[str, Any]:
    return {"images_per_s": row["images_per_s"], "ratio": ratio, "peak_mib": row["peak_mib"]}


def _alone(name: str, options: argparse.Namespace) -> dict[str, Any] | None:
    """Return the figures of one contestant alone on the GPU; None if it does not fit."""
    if options.device == "cuda":
        gc.collect()
        torch.cuda.empty_cache()
    with contextlib.suppress(torch.OutOfMemoryError):
        (row,) = measure_here([name], options)
        return row
    return None


def _summary(batch: int, rows: dict[str, dict[str, Any]]) -> str:
    own, relu, peer = rows[OWN], rows[RELU], rows.get(PEER)
    if not fits(own):
        return f"b={batch}: out of memory"
    text = f"b={batch}: {own['images_per_s']:.0f} images/s"
    text += f", {1 / own['ratio']:.2f} of ReLU's" if fits(relu) else ", ReLU's out of memory"
    if peer is not None:
        if fits(peer):
            text += f", {own['images_per_s'] / peer['images_per_s']:.2f} x spikingjelly"
        else:
            text += ", spikingjelly out of memory"
    return text + (f", {own['peak_mib'] / 1024:.1f} GiB" if own["peak_mib"] else "")


def _options(here: Machine, batch: int, with_peer: bool) -> argparse.Namespace:
    return argparse.Namespace(
        model=MODEL,
        size=_size(here),
        timesteps=TIMESTEPS,
        batch=batch,
        precision=PRECISION,
        device=here.device.type,
        evaluate=False,
        modes=["none"],
        segment=2,
        spikingjelly="eager" if with_peer else None,
        repeats=2 if here.small else 10,
    )
