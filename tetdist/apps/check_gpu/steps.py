"""Check of steps: each way to train averages rightly, without making the host wait; in float64
whole networks compute what their plain definitions do; and CUDA graphs repeat steps bitwise."""

import contextlib
import math
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from tetdist.apps.benchmarks.made_up import MadeUp, initial, training_step
from tetdist.apps.check_gpu.check import Finding, Machine
from tetdist.data.transforms import Mix
from tetdist.nn import batch_norm, dropout
from tetdist.nn.precision import autocast, choose_algorithms, place
from tetdist.optimizers import TIMM, kind_of
from tetdist.training.objective import compute_loss
from tetdist.training.teacher import fingerprint

STEPS = 3
REPORT = "avoid the setting that the line begins with, and report this with the JSON file"
WITHOUT_GRAPHS = "train with cuda_graphs=false, and report this with the JSON file"
# Cases: arguments of `training_step` by name. Tests run them, too, on a CPU and a pretended GPU.
# Those that read from the device if the gradient is finite may synchronise: DeepSpeed at stages 1
# and 2, float16, and optimisers of timm.
TORCH, DEEPSPEED = {"engine": "torch"}, {"engine": "deepspeed"}
GRAPHS, FP64 = {"cuda_graphs": True}, TORCH | {"precision": "fp64"}
FP16 = TORCH | {"precision": "fp16"}
# T is drawn, both in the first two steps; segments, of which one is shorter.
EVERYTHING = TORCH | {
    "timesteps": [3, 4],
    "seed": 1,
    "recompute": {"timesteps": 2},
    "ema": {"decay": 0.9},
    "data": {"mixup": 0.2, "cutmix": 1.0},
    "arguments": {"drop_rate": 0.2, "drop_path_rate": 0.2},
}
CASES: dict[str, dict[str, Any]] = {
    "torch": TORCH,
    "recompute=blocks": TORCH | {"recompute": "blocks"},
    "deepspeed": DEEPSPEED,
    "deepspeed ZeRO 1": DEEPSPEED | {"zero_stage": 1},
    "deepspeed ZeRO 2": DEEPSPEED | {"zero_stage": 2},
    "everything": EVERYTHING,
    # In float64 no membrane is so close to the threshold that rounding decides: of statistics over
    # all processes, and of whole networks, here with parallel neurons and a transformer.
    "everything, fp64": EVERYTHING | FP64,
    "batch_norm.sync": FP64 | {"batch_norm": {"sync": True}},
    "timm:lamb": FP64 | {"optimizer": {"kind": "timm:lamb", "lr": 0.01}},
    "psn": FP64 | {"model": "psn_sew_resnet18"},
    "sdt": FP64 | {"model": "sdt_2_256_cifar"},
    "spiking_resnet": FP64 | {"model": "spiking_resnet18"},
    "qkformer": FP64 | {"model": "qkformer_4_384_cifar"},
    "fp32": TORCH | {"precision": "fp32"},
    "tf32": TORCH | {"precision": "tf32"},
    "fp16": FP16,
    "cuda_graphs": TORCH | GRAPHS,
    "everything, cuda_graphs": EVERYTHING | GRAPHS,
    "fp16, cuda_graphs": FP16 | GRAPHS,
}
# The last cases, which show nothing on a CPU, or take long there.
ON_GPU = [*CASES][[*CASES].index("spiking_resnet") :]
# What steps with CUDA graphs must equal bitwise.
EQUAL = {name: name.removesuffix(", cuda_graphs") for name in CASES} | {"cuda_graphs": "torch"}
# Largest difference of a weight's or a running statistic's change in a step from the change that
# one process computes alone. In float32, bfloat16 and float16 both compute the same gradients and
# add them up in another order, in float16 with another scale of the loss; in float64 the other
# gradients are the definition's.
LIMITS = {"bf16": 1e-2, "fp64": 1e-9, "fp32": 1e-2, "tf32": 1e-2, "fp16": 2e-2}
LEARNING_RATE = 0.1


def check_steps(here: Machine) -> Finding:
    """Take steps in all ways to train: the same weights on all processes as one computes alone, no
    synchronisation on a GPU, finite losses, and with CUDA graphs the same results."""
    numbers: dict[str, dict[str, Any]] = {}
    for name, settings in CASES.items():
        if name in ON_GPU and not here.on_gpu:
            continue
        here.progress(name)
        numbers[name] = result = take(here, {"precision": "bf16"} | settings)
        wrong, remedy, plain = result.pop("wrong"), REPORT, numbers[EQUAL[name]]
        if wrong is None and plain["results"] != result["results"]:
            wrong, remedy = f"results differ from those of {EQUAL[name]}", WITHOUT_GRAPHS
        # All processes end here, since those that went on would wait for the others.
        if anywhere := [one for one in here.world.gather(wrong) if one is not None]:
            return Finding("bad", f"{name}: {anywhere[0]}", remedy, numbers)
    what = "without a synchronisation" if here.on_gpu else "on the CPU"
    return Finding("ok", f"{STEPS} steps in {len(numbers)} ways, {what}", None, numbers)


def take(here: Machine, settings: dict[str, Any]) -> dict[str, Any]:
    """Take steps of two micro-batches; return the results, and what is wrong."""
    model, precision = settings.pop("model", "sew_resnet18"), settings["precision"]
    size, batch = (64, 4) if here.on_gpu else (33, 2)
    size = 32 if model.endswith("cifar") else size
    step = training_step(here.world, model, size=size, batch=batch, accumulation=2, **settings)
    # Sums in another order, or by another algorithm, differ, in float64 by less than the limit.
    choose_algorithms(precision, deterministic=precision != "fp64")
    try:
        wrong, difference = compare(step)
        wrong = wrong or compare_average(step)  # allocates memory
        reads = "zero_stage" in settings or "optimizer" in settings or precision == "fp16"
        with refusing_synchronisation() if here.on_gpu and not reads else contextlib.nullcontext():
            taken = [step() for _ in range(STEPS)]
        losses = [float(loss) for loss in taken]
        digest = fingerprint(step.step.model)
    finally:
        step.close()
        choose_algorithms(precision)
    if not all(map(math.isfinite, losses)):
        wrong = wrong or f"the losses {losses} are not finite"
    return {"wrong": wrong, "largest_difference": difference, "results": [*losses, digest]}


def compare(step: MadeUp) -> tuple[str | None, float]:
    """Take the first step; return what is wrong with it, and its largest difference."""
    limit = LIMITS[step.step.config.precision]
    before, right = alone(step)
    step(LEARNING_RATE)
    after = step.step.model.state_dict()
    digests = step.step.world.gather(fingerprint(step.step.model))
    if unlike := [rank for rank, digest in enumerate(digests) if digest != digests[0]]:
        return f"rank {unlike[0]} has other weights than rank 0 after a step", math.nan
    apart = {}
    for name, x in right.items():
        # A change is rounded to the precision of its weight, and that of a bias before a batch norm
        # is rounding alone.
        size = _size(x - before[name]) + 1e-5 * _size(before[name]) + 1e-6
        apart[name] = _size(after[name] - x) / size
    name = max(apart, key=lambda one: math.inf if math.isnan(apart[one]) else apart[one])
    if apart[name] <= limit:
        return None, apart[name]
    text = f"a step changes {name} by another average than one process computes alone: they differ"
    return f"{text} by {apart[name]:.2g} (limit {limit:g})", apart[name]


def compare_average(step: MadeUp) -> str | None:
    """Take the second step; return what is wrong with the moving average of the weights, if any."""
    averages = {} if step.step.average is None else step.step.average.state_dict()
    before = {name: x.clone() for name, x in averages.items()}
    step()
    now, share = step.step.model.state_dict(), 1 - (step.step.config.ema.decay or 0.0)
    for name, x in averages.items():
        if not torch.allclose(x, torch.lerp(before[name], now[name], share), atol=1e-6):
            return f"the moving average of {name} is not that of the weights"
    return None


def alone(step: MadeUp) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return weights and running statistics before and after the first step, if this process does
    the work of all, by plain autograd and addition, and in float64 by the definitions."""
    config, world = step.step.config, step.step.world
    # Times a large number, small gradients do not vanish in float16.
    model, scale = initial(config), 2.0**12 if config.precision == "fp16" else 1.0
    model.set_timesteps(step.step.timesteps(0))
    drops = dropout.dropping(model)
    if config.precision == "fp64":
        model.set_execution("reference")
    place(model, world.device, config.precision)
    before = {name: x.clone() for name, x in model.state_dict().items()}
    gathered, together = list[Any](), config.batch_norm.sync
    for number in range(len(step.step.micro_batches)):
        of_ranks = [step.batch_of(rank, number, mixed) for rank in range(world.world_size)]
        gathered += [map(torch.cat, zip(*of_ranks, strict=True))] if together else of_ranks
    for number, (images, labels) in enumerate(gathered):
        for factors in step.step._draw(0, number):
            dropout.set_factors(drops, factors)
        with autocast(world.device, config.precision):
            logits = model(images, per_timestep=True)
        (compute_loss(config.loss, logits, labels) * scale / len(gathered)).backward()
    batch_norm.update_running_statistics(model, lambda x: x)
    for parameter in model.parameters():
        parameter.grad /= scale
    section = config.optimizer_of(0).model_copy(update={"lr": LEARNING_RATE})
    if section.kind.startswith(TIMM):
        kind_of(section.kind).build([{"params": [*model.parameters()]}], section).step()
        return before, model.state_dict()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter -= LEARNING_RATE * parameter.grad
    return before, model.state_dict()


def mixed(images: Tensor, labels: Tensor, mix: Mix, num_classes: int) -> tuple[Tensor, Tensor]:
    """Mix each sample with the one before it, by the definitions of mixup and CutMix."""
    out, targets = images.clone(), images.new_zeros(len(images), num_classes)
    for i, (top, left, bottom, right) in enumerate(mix.boxes.tolist()):
        kept, share = images.new_tensor([mix.pixels[i], mix.share[i]])
        out[i] = kept * images[i] + (1 - kept) * images[i - 1]
        out[i, :, top:bottom, left:right] = images[i - 1, :, top:bottom, left:right]
        targets[i, labels[i]] += share
        targets[i, labels[i - 1]] += 1 - share
    return out, targets


def _size(x: Tensor) -> float:
    return float(x.double().square().mean().sqrt())


@contextlib.contextmanager
def refusing_synchronisation() -> Iterator[None]:
    """Make everything raise, in this context, that makes the host wait for the device."""
    error = RuntimeError("a call of synchronize(), which is a synchronizing CUDA operation")
    with contextlib.ExitStack() as stack:
        # torch does not notice these itself.
        for owner in (torch.cuda, torch.accelerator, torch.cuda.Event, torch.cuda.Stream):
            stack.enter_context(mock.patch.object(owner, "synchronize", side_effect=error))
        torch.cuda.set_sync_debug_mode("error")
        stack.callback(torch.cuda.set_sync_debug_mode, "default")
        yield
