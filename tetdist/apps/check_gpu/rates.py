"""Check of rates: images a second of a training step, beside the ReLU network on the same card."""

import argparse
import contextlib
import io
import statistics
from typing import Any

import torch

from tetdist.apps.benchmarks.bench import measure
from tetdist.apps.check_gpu import remedies
from tetdist.apps.check_gpu.check import Finding, Machine

BATCHES = (32, 64, 128)
MEASURED = {"model": "sew_resnet34", "timesteps": 4, "precision": "bf16"}
# Least ratios to the ReLU network's rate that are as expected, and slow. If convolutions reach 30 %
# of an H100's peak, a step (b=32) is computed to take 0.88 to 0.90 of the ReLU network's time: its
# rate is 1 / 0.90 = 1.11 of ReLU's. Expected is a step that takes at most 1.5 times as long as
# computed, 1.11 / 1.5 = 0.74; one that takes more than 3 times as long is bad, 1.11 / 3 = 0.37.
# Nothing that does all of its work is twice as fast.
REACHED, SLOWLY, AT_MOST = 0.74, 0.37, 2.0
# GPUs of one kind differ by some percent; a slower one slows the whole run down.
SLOWER = 0.1
KERNELS = "tetdist's kernels are slower than they should be: report this with the JSON file"
IMPOSSIBLE = "report this with the JSON file, since a step that does all of its work takes longer"


def check_rates(here: Machine) -> Finding:
    """Measure images a second and peak memory of sew_resnet34's training steps, by batch size."""
    own: dict[int, dict[str, Any]] = {}
    texts = []
    size, batches, repeats = (224, BATCHES, 10) if here.on_gpu else (33, (2,), 2)
    device = here.world.device.type
    for batch in batches:
        here.progress(f"batch {batch}")
        options = argparse.Namespace(
            **MEASURED, modes=["none"], size=size, device=device, batch=batch, repeats=repeats
        )
        try:
            with contextlib.redirect_stderr(io.StringIO()):
                _relu, own[batch] = measure(options)["rows"]
        except torch.OutOfMemoryError:
            texts.append(f"b={batch}: out of memory")
            continue
        rate, ratio, peak = (own[batch][key] for key in ("images_per_s", "ratio", "peak_mib"))
        texts.append(f"b={batch}: {rate:.0f} images/s, {1 / ratio:.2f} of ReLU's")
        texts[-1] += f", {peak / 1024:.1f} GiB" if peak else ""
    text = "; ".join(texts)
    rate_of = {batch: row["images_per_s"] for batch, row in own.items()}
    all_rates = [one for one in here.world.gather(rate_of) if one]
    if not own:
        return Finding("bad", text, remedies.BUSY)
    # All processes are as fast as the slowest, here at the recipes' micro-batch.
    together = here.world.world_size * min(one[min(one)] for one in all_rates)
    speed = MEASURED | {"size": size, "images_per_s": together, "by_batch": rate_of}
    numbers = {"measured": own, "speed": speed}
    ratios = [1 / row["ratio"] for row in own.values()]
    if not here.on_gpu:
        return Finding("ok", text, None, numbers)
    # The rate at the largest batch depends most on the GPU, and least on the host.
    rate, rates = rate_of[max(rate_of)], [one[max(one)] for one in all_rates]
    slower = 1 - rate / statistics.median_high(rates)
    if not all(SLOWLY <= ratio <= AT_MOST for ratio in ratios):
        return Finding("bad", text, IMPOSSIBLE if max(ratios) > AT_MOST else KERNELS, numbers)
    if slower > SLOWER:
        return Finding("bad", f"{slower:.0%} slower than most: {text}", remedies.THROTTLED, numbers)
    return Finding("ok", text, None if min(ratios) >= REACHED else KERNELS, numbers)
