"""Check of CUDA graphs: the same results as without them."""

from typing import Any

from tetdist.apps.benchmarks.scaling import training_step
from tetdist.apps.check_gpu.check import Finding, Machine
from tetdist.apps.check_gpu.steps import refusing_synchronisation
from tetdist.nn.precision import choose_algorithms
from tetdist.training.teacher import fingerprint

STEPS = 6
PRECISIONS = ("bf16", "fp16")
REMEDY = "train with cuda_graphs=false, and report this with the JSON file"


def check_graphs(here: Machine) -> Finding:
    """Compare training steps with and without graphs: bitwise identical results."""
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
    text = f"{STEPS} steps in {', '.join(PRECISIONS)} have the same results with graphs"
    return Finding("ok", text, None, numbers)


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
