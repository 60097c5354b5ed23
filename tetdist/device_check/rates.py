"""How fast the networks train here, beside the ReLU network and spikingjelly's."""

import argparse
import contextlib
import importlib.util
import io
from typing import Any

import torch

from tetdist.benchmarks.bench import measure_model
from tetdist.device_check.check import Finding, Machine

BATCHES = (32, 64, 128)
MODEL, PRECISION, TIMESTEPS = "sew_resnet34", "bf16", 4


def check_rates(here: Machine) -> Finding:
    """Images a second and peak memory of a sew_resnet34's training steps, by batch size."""
    peer = "eager" if importlib.util.find_spec("spikingjelly") else None
    measured: dict[str, Any] = {}
    for batch in (2,) if here.small else BATCHES:
        try:
            rows = _measured(here, batch, peer)
        except torch.OutOfMemoryError:
            torch.cuda.empty_cache()
            continue
        measured[str(batch)] = {
            row["name"]: {key: row[key] for key in ("images_per_s", "ratio", "peak_mib")}
            for row in rows
        }
    if not measured:
        remedy = "end what else runs there (nvidia-smi lists it), or take a larger GPU"
        return Finding("bad", "no batch fits into the GPU's memory", remedy)
    parts = []
    for size, by_name in measured.items():
        own = by_name["tetdist, none"]
        text = f"b={size}: {own['images_per_s']:.0f} images/s, {1 / own['ratio']:.2f} of ReLU's"
        if other := by_name.get("spikingjelly, eager"):
            text += f", {own['images_per_s'] / other['images_per_s']:.2f} x spikingjelly"
        if own["peak_mib"]:
            text += f", {own['peak_mib'] / 1024:.1f} GiB"
        parts.append(text)
    smallest, by_name = next(iter(measured.items()))
    speed = {"images_per_s": by_name["tetdist, none"]["images_per_s"], "timesteps": TIMESTEPS}
    of_what = {"model": MODEL, "size": _size(here), "precision": PRECISION}
    numbers = {"by_batch": measured, "micro_batch": int(smallest), **of_what, **speed}
    return Finding("ok", "; ".join(parts), None, numbers)


def images_per_s_of_a_step(here: Machine, batch: int) -> float:
    """Images a second of sew_resnet34's training steps, T = 4."""
    (own,) = (row for row in _measured(here, batch, None) if row["name"].startswith("tetdist"))
    return float(own["images_per_s"])


def _size(here: Machine) -> int:
    return 64 if here.small else 224


def _measured(here: Machine, batch: int, peer: str | None) -> list[dict[str, Any]]:
    options = argparse.Namespace(
        model=MODEL,
        size=_size(here),
        timesteps=TIMESTEPS,
        batch=batch,
        precision=PRECISION,
        device=here.device.type,
        evaluate=False,
        modes=["none"],
        segment=2,
        spikingjelly=peer,
        repeats=2 if here.small else 10,
    )
    with contextlib.redirect_stderr(io.StringIO()):  # its progress
        rows: list[dict[str, Any]] = measure_model(options)["rows"]
    return rows
