"""Check of CUDA graphs: the same results as without them, and the speed-up."""

import statistics
import time
from typing import Any

import torch

from tetdist.apps.benchmarks.scaling import training_step
from tetdist.apps.check_gpu.check import Finding, Machine
from tetdist.apps.check_gpu.steps import refusing_synchronisation
from tetdist.nn.precision import choose_algorithms
from tetdist.training.teacher import fingerprint

STEPS = 6
BATCHES = (4, 32)
# Number of steps timed together, and of such rounds.
TIMED, ROUNDS = 10, 5
PRECISIONS = ("bf16", "fp16")
REMEDY = "train with cuda_graphs=false, and report this with the JSON file"


def check_graphs(here: Machine) -> Finding:
    """Compare training steps with and without graphs: bitwise results, and rates."""
    if not here.on_gpu:
        return Finding("left out", "CUDA graphs need a GPU")
    numbers: dict[str, Any] = {}
    for precision in PRECISIONS:
        plain, graphed = (results(here, precision, cuda_graphs=on) for on in (False, True))
        numbers[precision] = {"without_graphs": plain, "with_graphs": graphed}
        for name, result in plain.items():
            if result != graphed[name]:
                text = f"{precision}: {name} is {result!r}, with graphs {graphed[name]!r}"
                return Finding("bad", text, REMEDY, numbers)
    parts = [f"{STEPS} steps in {', '.join(PRECISIONS)} have the same results with graphs"]
    by_batch: dict[str, dict[str, Any]] = {}
    numbers["by_batch"] = by_batch
    for batch in BATCHES:
        try:
            without, with_graphs = _images_per_s(here, batch)
        except torch.OutOfMemoryError:
            parts.append(f"b={batch}: out of memory")
            by_batch[str(batch)] = {"out_of_memory": True}
            continue
        by_batch[str(batch)] = {"images_per_s": without, "images_per_s_with_graphs": with_graphs}
        rates = f"{without:.0f} images/s, with graphs {with_graphs:.0f}"
        parts.append(f"b={batch}: {rates} ({with_graphs / without:.2f} x)")
    return Finding("ok", "; ".join(parts), None, numbers)


def results(here: Machine, precision: str, *, cuda_graphs: bool) -> dict[str, Any]:
    """Return losses and, at the end, a hash of the weights and running statistics of a small
    network in a few steps of two micro-batches each.

    Raises:
        RuntimeError: A step makes the host wait for the device.
    """
    step = training_step(
        here.world,
        "sew_resnet18",
        size=64,
        batch=4,
        accumulation=2,
        precision=precision,
        engine="torch",
        cuda_graphs=cuda_graphs,
    )
    # Results must not depend on the order of sums, nor on which algorithm was fastest.
    choose_algorithms(precision, deterministic=True)
    try:
        losses = [step()]  # captures the graphs
        # In float16 each step synchronises to check the gradient for overflow.
        with refusing_synchronisation(here.on_gpu and precision != "fp16"):
            losses += [step() for _ in range(STEPS - 1)]
        found = {f"the loss of step {i}": float(loss) for i, loss in enumerate(losses, start=1)}
        return found | {"the hash of weights and running statistics": fingerprint(step.step.model)}
    finally:
        step.close()
        choose_algorithms(precision)


def _images_per_s(here: Machine, batch: int) -> tuple[float, float]:
    """Return the images a second without and with graphs, measured alternately."""
    network: dict[str, Any] = {"name": "sew_resnet34", "size": None, "batch": batch}
    settings: dict[str, Any] = {"engine": "torch", "precision": "bf16"}
    two = [training_step(here.world, **network, **settings, cuda_graphs=on) for on in (False, True)]
    seconds: tuple[list[float], list[float]] = ([], [])
    try:
        for number in range(1 + ROUNDS):
            for step, kept in zip(two, seconds, strict=True):
                torch.cuda.synchronize(here.device)
                started = time.perf_counter()
                for _ in range(TIMED):
                    step()
                torch.cuda.synchronize(here.device)
                # The first round compiles kernels and chooses algorithms.
                if number:
                    kept.append(time.perf_counter() - started)
    finally:
        for step in two:
            step.close()
    without, with_graphs = (batch * TIMED / statistics.median(kept) for kept in seconds)
    return without, with_graphs
