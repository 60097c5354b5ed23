"""Check of steps: each way to train averages rightly, without making the host wait."""

import contextlib
import math
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tetdist.apps.benchmarks.scaling import MadeUp, initial, training_step
from tetdist.apps.check_gpu.check import Finding, Machine
from tetdist.nn import batch_norm
from tetdist.nn.precision import autocast, choose_algorithms, place
from tetdist.training.objective import compute_loss
from tetdist.training.teacher import fingerprint

STEPS = 3
REPORT = "train with the other engine, and report this with the JSON file"
# Settings by name; graphs.py compares CUDA graphs with the first. All but DeepSpeed at stages 1 and
# 2, which reads from the device whether the gradient is finite, must be free of synchronisation.
TORCH, DEEPSPEED = {"engine": "torch"}, {"engine": "deepspeed"}
VARIANTS: dict[str, dict[str, Any]] = {
    "torch": TORCH,
    "recompute=blocks": TORCH | {"recompute": "blocks"},
    # In float64, where no spike is flipped by the rounding of statistics over all processes.
    "batch_norm.sync": TORCH | {"batch_norm": {"sync": True}, "precision": "fp64"},
    "deepspeed": DEEPSPEED,
    "deepspeed ZeRO 1": DEEPSPEED | {"zero_stage": 1},
    "deepspeed ZeRO 2": DEEPSPEED | {"zero_stage": 2},
}
# Largest difference of a weight's or a running statistic's change in a step from the change that
# one process computes alone. Both compute the same gradients and add them up in another order.
LIMIT = 1e-2
LEARNING_RATE = 0.1


def check_steps(here: Machine) -> Finding:
    """Take steps in all ways to train: the same weights on all processes as one computes alone, no
    synchronisation on a GPU, and finite losses."""
    numbers: dict[str, dict[str, Any]] = {}
    alone: dict[str, dict[str, Tensor]] = {}
    for name, settings in VARIANTS.items():
        step = training_step(
            here.world,
            "sew_resnet18",
            size=33 if here.small else 64,
            batch=2 if here.small else 4,
            accumulation=2,
            **{"precision": "bf16"} | settings,
        )
        precision = step.step.config.precision
        # Both have to compute the same gradients.
        choose_algorithms(precision, deterministic=True)
        try:
            if precision not in alone:
                alone[precision] = changes_alone(step)
            wrong, largest = compare(step, alone[precision])
            found: dict[str, Any] = {"largest_difference": largest}
            numbers[name] = found
            if wrong is not None:
                return Finding("bad", f"{name}: {wrong}", REPORT, numbers)
            choose_algorithms(precision)
            step()  # chooses the fastest ones, and allocates memory
            with refusing_synchronisation(here.on_gpu and not settings.get("zero_stage")):
                losses = [step() for _ in range(STEPS)]
        except RuntimeError as error:
            if "synchronizing" not in str(error).lower():
                raise
            where = traceback.extract_tb(error.__traceback__)[-2]
            numbers[name] |= {"traceback": traceback.format_exc()}
            text = f"{name}: a step makes the host wait for the device"
            text = f"{text} ({Path(where.filename).name}, line {where.lineno}): {error}"
            return Finding("bad", text, REPORT, numbers)
        finally:
            step.close()
        found["losses"] = values = [float(loss) for loss in losses]
        if not all(map(math.isfinite, values)):
            return Finding("bad", f"{name}: the losses {values} are not finite", REPORT, numbers)
    what = "without a synchronisation" if here.on_gpu else "on the CPU"
    return Finding("ok", f"{STEPS} steps of {', '.join(numbers)}, {what}", None, numbers)


def changes_alone(step: MadeUp) -> dict[str, Tensor]:
    """Return the change of weights and running statistics in the first step, if this process does
    the work of all, by plain autograd and addition."""
    config, world = step.step.config, step.step.world
    model = initial(config)
    place(model, world.device, config.precision)
    before = _state(model)
    given = []
    for number in range(len(step.step.micro_batches)):
        of_ranks = [step.batch_of(rank, number) for rank in range(world.world_size)]
        if config.batch_norm.sync:
            images_of, labels_of = zip(*of_ranks, strict=True)
            of_ranks = [(torch.cat(images_of), torch.cat(labels_of))]
        given += of_ranks
    for images, labels in given:
        with autocast(world.device, config.precision):
            logits = model(images, per_timestep=True)
        (compute_loss(config.loss, logits, labels) / len(given)).backward()
    batch_norm.update_running_statistics(model, lambda x: x)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter -= LEARNING_RATE * parameter.grad
    return {name: after - before[name] for name, after in _state(model).items()}


def compare(step: MadeUp, alone: dict[str, Tensor]) -> tuple[str | None, float]:
    """Take the first step; return what is wrong with it, and its largest difference."""
    before = _state(initial(step.step.config).to(step.step.world.device))
    step(LEARNING_RATE)
    after = _state(step.step.model)
    digests = step.step.world.gather(fingerprint(step.step.model))
    if unlike := [rank for rank, digest in enumerate(digests) if digest != digests[0]]:
        return f"rank {unlike[0]} has other weights than rank 0 after a step", math.nan
    apart = {
        # A change is rounded to the precision of its weight.
        name: _size(after[name] - before[name] - change)
        / (_size(change) + 1e-5 * _size(before[name]) + 1e-30)
        for name, change in alone.items()
    }
    name = max(apart, key=lambda one: math.inf if math.isnan(apart[one]) else apart[one])
    if apart[name] <= LIMIT:
        return None, apart[name]
    text = f"a step changes {name} by another average than one process computes alone: they differ"
    return f"{text} by {apart[name]:.2g} (limit {LIMIT:g})", apart[name]


def _state(model: torch.nn.Module) -> dict[str, Tensor]:
    return {name: x.detach().clone() for name, x in model.state_dict().items()}


def _size(x: Tensor) -> float:
    return float(x.double().square().mean().sqrt())


# Functions that make the host wait without notice of torch's sync_debug_mode.
_WAITS: tuple[tuple[Any, str], ...] = (
    (torch.cuda, "synchronize"),
    (torch.accelerator, "synchronize"),
    (torch.cuda.Event, "synchronize"),
    (torch.cuda.Stream, "synchronize"),
)


@contextlib.contextmanager
def refusing_synchronisation(refused: bool) -> Iterator[None]:
    """Make everything raise, in this context, that makes the host wait for the device."""
    if not refused:
        yield
        return

    def wait(*_: Any, **__: Any) -> None:
        raise RuntimeError("a call of synchronize(), which is a synchronizing CUDA operation")

    before = [getattr(owner, name) for owner, name in _WAITS]
    torch.cuda.set_sync_debug_mode("error")
    try:
        for owner, name in _WAITS:
            setattr(owner, name, wait)
        yield
    finally:
        for (owner, name), function in zip(_WAITS, before, strict=True):
            setattr(owner, name, function)
        torch.cuda.set_sync_debug_mode("default")
