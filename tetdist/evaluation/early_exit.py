"""Early exit, measured: decided samples leave the batch, so that the others take less time."""

import math
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tetdist.data.build import eval_loader
from tetdist.data.transfer import on_device
from tetdist.evaluation.decisions import first_sure
from tetdist.evaluation.evaluate import running_means
from tetdist.evaluation.suite import Evaluator, ExitChoice
from tetdist.models import SpikingNetwork
from tetdist.nn.precision import autocast, parameter_type

# Rounding may move a confidence this close to the threshold to its other side.
NEAR = 1e-5


def decide(model: SpikingNetwork, images: Tensor, threshold: float) -> tuple[Tensor, Tensor]:
    """Stream a batch and drop each sample when its confidence reaches the threshold.

    Args:
        model: The network, in evaluation mode; all samples are decided at its T.
        images: (B, C, H, W), or (B, T, C, H, W) of events.
        threshold: Softmax probability of the time-mean at which a sample is decided.

    Returns:
        Classes, (B,), and timesteps from 1, (B,), of the decisions.
    """
    stream = model.stream()
    left = torch.arange(len(images), device=images.device)
    classes, exits = torch.zeros_like(left), torch.zeros_like(left)
    for t in range(model.timesteps):
        if model.input_kind == "events":
            mean = stream.step(images[left, t])
        else:
            mean = stream.step(images if t == 0 else None)
        sure = mean.softmax(-1).amax(-1) >= threshold
        done = sure | (t + 1 == model.timesteps)
        classes[left[done]], exits[left[done]] = mean.argmax(-1)[done], t + 1
        if bool(done.all()):
            break
        if bool(done.any()):
            stream.keep(~done)
            left = left[~done]
    return classes, exits


@torch.no_grad()
def measure_exit(evaluator: Evaluator, choice: ExitChoice) -> dict[str, Any]:
    """Decide a split by stream and by whole passes, in turns, and time both.

    Loading is not timed. The first batch runs once more before it is timed.

    Args:
        evaluator: A causal network at its T, all outputs of which are compared, the split and the
            processes.
        choice: The threshold; where it is None, all samples are decided at T.
    """
    model, world = evaluator.model.eval(), evaluator.world
    threshold = math.inf if choice.threshold is None else choice.threshold
    precision, device = evaluator.config.precision, world.device
    sums = torch.zeros(7, dtype=torch.float64)
    with eval_loader(evaluator.config, evaluator.index, world) as batches:
        for batch in batches:
            if not len(batch.labels):
                continue
            images = on_device(batch.images, device, parameter_type(precision))
            with autocast(device, precision):
                if not sums.any():
                    decide(model, images, threshold)
                    _means(model, images)
                world.wait_for_device()  # The images' copy is not timed.
                streaming, (classes, exits) = _timed(decide, model, images, threshold)
                passing, means = _timed(_means, model, images)
            confidence = means.softmax(-1).amax(-1)  # (T, B)
            near = ((confidence - threshold).abs() <= NEAR).any(0)
            first = first_sure(confidence, threshold)
            whole_classes = means.argmax(-1).gather(0, first[None])[0]
            differs = (exits.cpu() != first + 1) | (classes.cpu() != whole_classes)
            right = classes.cpu() == torch.as_tensor(batch.labels)
            counts = (right, exits, differs, differs & near)
            sums += torch.tensor(
                [len(right), streaming, passing, *(float(n.sum()) for n in counts)]
            )
            evaluator.alive()
    samples, streaming, passing, hits, spent, different, close = world.sum(sums.tolist())
    return {
        "images_per_s": samples / streaming * world.world_size,
        "whole_pass_images_per_s": samples / passing * world.world_size,
        "ratio": passing / streaming,
        "top1": 100 * hits / samples,
        "mean_timesteps": spent / samples,
        "differing": int(different),
        "differing_within_1e-5": int(close),
        "batch": evaluator.config.batch.eval,
        "threads": torch.get_num_threads(),
    }


def _means(model: SpikingNetwork, images: Tensor) -> Tensor:
    """Return the outputs at every t of a whole pass, (T, B, K), on the host."""
    return running_means(model(images, per_timestep=True)).cpu()


def _timed(function: Callable[..., Any], *arguments: Any) -> tuple[float, Any]:
    """Return the seconds of a call until the device is done, and its result."""
    started = time.perf_counter()
    found = function(*arguments)
    return time.perf_counter() - started, found
