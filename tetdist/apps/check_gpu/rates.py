"""Check of rates: training throughput, compared with the ReLU network's and spikingjelly's."""

import argparse
import contextlib
import gc
import importlib.util
import math
from typing import Any

import timm
import torch

from tetdist.apps.benchmarks.bench import measure_here
from tetdist.apps.benchmarks.contestants import contestants_of
from tetdist.apps.benchmarks.relu_baselines import relu_baseline
from tetdist.apps.check_gpu import remedies
from tetdist.apps.check_gpu.check import (
    BAD,
    EXPECTED,
    IMPOSSIBLE,
    OWN,
    THROTTLED,
    TOO_FAST,
    Finding,
    Machine,
    word,
)
from tetdist.apps.roofline import cards
from tetdist.apps.roofline.count import count
from tetdist.apps.roofline.estimate import estimate

BATCHES = (32, 64, 128)
MODEL, PRECISION, TIMESTEPS = "sew_resnet34", "bf16", 4
RELU, PEER = "relu", "spikingjelly, eager"
# Fractions of the computed rate that are as expected, and slow: it leaves out loss and update.
REACHED, SLOWLY = 0.7, 0.35
KERNELS = (
    "the ReLU network is as fast as this card allows, so tetdist's kernels are slow here; report "
    "this with the JSON file"
)


def check_rates(here: Machine) -> Finding:
    """Measure images a second and peak memory of sew_resnet34's training steps, by batch size."""
    with_peer = importlib.util.find_spec("spikingjelly") is not None
    measured = {
        batch: rates_of(_options(here, batch, with_peer))
        for batch in ((2,) if here.small else BATCHES)
    }
    numbers: dict[str, Any] = {"by_batch": {str(batch): rows for batch, rows in measured.items()}}
    if not here.small:
        judge(here, measured)
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
    words = {rows[OWN].get("word", EXPECTED) for rows in measured.values()}
    relu = {rows[RELU].get("word", EXPECTED) for rows in measured.values()}
    remedy = None if words == {EXPECTED} else KERNELS if relu == {EXPECTED} else THROTTLED
    if TOO_FAST in words:
        remedy = IMPOSSIBLE
    return Finding("bad" if BAD & words else "ok", text, remedy, numbers, speed=speed)


def judge(here: Machine, measured: dict[int, dict[str, dict[str, Any]]]) -> None:
    """Add to each contestant's figures what was computed for this card, and the word for them.

    On an unknown card, or one without bfloat16, tetdist's network is compared with the ReLU network
    alone.
    """
    card = cards.find(torch.cuda.get_device_name(here.device))
    if card is not None and card.arithmetic(PRECISION) is None:
        card = None
    for batch, rows in measured.items():
        computed = computed_images_per_s(batch, card or cards.CARDS["H100"])
        if card is None:
            relu = rows[RELU].get("images_per_s", math.nan)
            computed = {OWN: relu * computed[OWN] / computed[RELU]}
        for name, expected in computed.items():
            if fits(rows[name]) and not math.isnan(expected):
                reached = word(rows[name]["images_per_s"] / expected, REACHED, SLOWLY)
                rows[name] |= {"computed_images_per_s": expected, "word": reached}


def computed_images_per_s(batch: int, card: cards.Card) -> dict[str, float]:
    """Return the images a second that tetdist's and the ReLU network can reach on a card."""
    own = timm.create_model(MODEL, timesteps=TIMESTEPS)
    relu = relu_baseline(MODEL)
    assert relu is not None
    work = {OWN: count(own, (batch, 3, 224, 224), PRECISION)}
    work[RELU] = count(relu, (TIMESTEPS * batch, 3, 224, 224), PRECISION)
    return {name: batch / estimate(one, card).seconds for name, one in work.items()}


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
    with contextlib.suppress(torch.OutOfMemoryError):
        return {row["name"]: row for row in measure_here(names, options)}
    # Not while the error is handled, which would keep the memory allocated.
    alone = {name: _alone(name, options) for name in names}
    for row in filter(fits, alone.values()):
        relu = alone[RELU]
        row["ratio"] = relu["images_per_s"] / row["images_per_s"] if fits(relu) else None
    return alone


def _alone(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """Return the figures of one contestant alone on the GPU."""
    if options.device == "cuda":
        gc.collect()
        torch.cuda.empty_cache()
    with contextlib.suppress(torch.OutOfMemoryError):
        return measure_here([name], options)[0]
    return {"out_of_memory": True}


def _summary(batch: int, rows: dict[str, dict[str, Any]]) -> str:
    own, relu, peer = rows[OWN], rows[RELU], rows.get(PEER)
    if not fits(own):
        return f"b={batch}: out of memory"
    text = f"b={batch}: {own['images_per_s']:.0f} images/s"
    if "word" in own:
        text += f" {own['word']} (computed {own['computed_images_per_s']:.0f})"
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
