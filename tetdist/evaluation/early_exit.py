"""Early exit: a threshold chosen on some samples, what these say of others, and what it saves."""

import math
import time
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import torch
from scipy.special import betaincinv
from torch import Tensor

from tetdist.data.build import eval_loader
from tetdist.evaluation.decisions import Decisions, decided, first_sure
from tetdist.evaluation.evaluate import Evaluator
from tetdist.losses import running_means
from tetdist.models import SpikingNetwork
from tetdist.nn.precision import autocast, parameter_type

# Candidates for a threshold: from 0.3 on, each a tenth nearer to 1 than the last; and none.
FINE_THRESHOLDS = (*(round(1 - 0.7 * 0.9**k, 6) for k in range(90)), math.inf)
# Rounding may move a confidence this close to the threshold to its other side.
NEAR = 1e-5
DOUBT = 0.1  # probability that what early exit promises, by its samples, is wrong


class ExitChoice(NamedTuple):
    """A threshold of early exit, and the criteria of its choice."""

    within: float  # points of top-1 that it may cost
    threshold: float  # of confidence; infinite: every other one costs more
    samples: int  # on which it was chosen
    top1: float | None  # of these samples at T, in percent; None: they have no labels
    lost: int  # of these samples: right at T, but wrong with early exit
    warning: str | None = None  # why these samples say little of others

    @property
    def most_lost(self) -> int:
        """Number of lost samples that `loss_bound` assumes.

        These samples also chose the threshold, so the number that they lose is optimistic, and the
        limit that chose it counts instead. The lowest candidate was not chosen by a limit.
        """
        if self.threshold == FINE_THRESHOLDS[0]:
            return self.lost
        return max(self.lost, int(self.within * self.samples // 100))

    @property
    def loss_bound(self) -> float:
        """Upper bound on the percentage of other samples that early exit loses.

        It is wrong with probability `DOUBT` (Clopper and Pearson's one-sided bound).
        """
        kept = self.samples - self.most_lost
        return float(100 * betaincinv(self.most_lost + 1, kept, 1 - DOUBT)) if kept > 0 else 100.0

    @property
    def samples_needed(self) -> int:
        """Number of samples that bound the loss by ``within`` if none is lost; 0: no bound."""
        if not 0 < self.within < 100:
            return 0
        return math.ceil(math.log(DOUBT, 1 - self.within / 100))


@dataclass(frozen=True)
class ChosenExit:
    """A chosen threshold and its effect on the evaluated samples."""

    choice: ExitChoice
    top1: float
    mean_timesteps: float

    def as_json(self) -> dict[str, Any]:
        """Return the choice and its effect; threshold None: no early exit."""
        choice = self.choice
        on = {"samples": choice.samples, "top1": choice.top1, "lost": choice.lost}
        warning = {"warning": choice.warning} if choice.warning else {}
        return {
            "within": choice.within,
            "chosen_on": on | warning,
            "threshold": None if math.isinf(choice.threshold) else choice.threshold,
            "top1": self.top1,
            "mean_timesteps": self.mean_timesteps,
        }


@dataclass(frozen=True)
class MeasuredExit:
    """Early exit by stream beside whole passes.

    Attributes:
        ratio: Speed of the stream over that of whole passes.
        top1, mean_timesteps: Accuracy in percent and average T of the stream.
        differing, near: Decisions unlike the whole pass's; those of them with a confidence within
            `NEAR` of the threshold.
    """

    images_per_s: float
    whole_pass_images_per_s: float
    ratio: float
    top1: float
    mean_timesteps: float
    differing: int
    near: int
    batch: int
    threads: int

    def as_json(self) -> dict[str, Any]:
        values = asdict(self)
        return values | {"differing_within_1e-5": values.pop("near")}


def choose_exit(evaluator: Evaluator, timesteps: int, within: float) -> ExitChoice:
    """Choose the lowest threshold from which on early exit costs at most ``within``.

    The result is the same on every process.

    Args:
        evaluator: The network, and samples used neither for training nor for the final result. If
            their index names no classes, they have no labels. Then the decision at T counts as the
            right one, and ``within`` limits the percentage of decisions that early exit changes.
        timesteps: T, also of the model afterwards.
        within: Maximum decrease of top-1, in points.
    """
    model, world, classes = evaluator.model, evaluator.world, evaluator.index.classes
    model.set_timesteps(timesteps)
    decisions = Decisions(classes, model.num_classes, timesteps, world.device, FINE_THRESHOLDS)

    def count(logits: Tensor, labels: Tensor) -> None:
        decisions.add(logits, labels if classes else decided(logits))

    result = evaluator.run("choose a threshold", also=count)
    decisions.gather(world)
    lost = decisions.confusion.trace() - decisions.exit_correct
    cheap = 100 * lost.double() <= within * result.samples
    # Exits lose few samples at all thresholds from this one on; the highest loses none.
    place = len(cheap) - int(cheap.flip(0).long().cumprod(0).sum())
    top1, spoilt = result.top1 if classes else None, int(decisions.exit_lost[place])
    return ExitChoice(within, FINE_THRESHOLDS[place], result.samples, top1, spoilt)


def decide(model: SpikingNetwork, images: Tensor, threshold: float) -> tuple[Tensor, Tensor]:
    """Stream a batch, (B, C, H, W) or (B, T, C, H, W) of events, in evaluation mode.

    A sample leaves the batch when its confidence reaches the threshold, or at the model's T.

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
    return classes.cpu(), exits.cpu()


@torch.no_grad()
def measure_exit(evaluator: Evaluator, threshold: float) -> MeasuredExit:
    """Decide a split by stream and by whole passes, in turns, and time both.

    Loading is not timed. The first batch runs once more before it is timed.

    Args:
        evaluator: A causal network at its T, the split and the processes.
    """
    model, world = evaluator.model.eval(), evaluator.world
    precision, sums = evaluator.config.precision, torch.zeros(7, dtype=torch.float64)
    with eval_loader(evaluator.config, evaluator.index, world) as batches:
        for batch in batches:
            if not len(batch.labels):
                continue
            images = batch.inputs(world.device, parameter_type(precision))
            with autocast(world.device, precision):
                for _ in range(1 if sums.any() else 2):
                    world.wait_for_device()  # The images' copy is not timed.
                    times = [time.perf_counter()]
                    classes, exits = decide(model, images, threshold)
                    times.append(time.perf_counter())
                    means = running_means(model(images, per_timestep=True)).cpu()  # (T, B, K)
                    times.append(time.perf_counter())
            confidence = means.softmax(-1).amax(-1)  # (T, B)
            first = first_sure(confidence, threshold)
            whole_classes = means.argmax(-1).gather(0, first[None])[0]
            differs = (exits != first + 1) | (classes != whole_classes)
            near = ((confidence - threshold).abs() <= NEAR).any(0)
            right = classes == torch.as_tensor(batch.labels)
            counts = [int(kind.sum()) for kind in (right, exits, differs, differs & near)]
            sums += torch.tensor(
                [len(right), times[1] - times[0], times[2] - times[1], *counts],
                dtype=torch.float64,
            )
            evaluator.alive()
    samples, streaming, passing, hits, spent, different, close = world.sum(sums.tolist())
    return MeasuredExit(
        images_per_s=samples / streaming * world.world_size,
        whole_pass_images_per_s=samples / passing * world.world_size,
        ratio=passing / streaming,
        top1=100 * hits / samples,
        mean_timesteps=spent / samples,
        differing=int(different),
        near=int(close),
        batch=evaluator.config.batch.eval,
        threads=torch.get_num_threads(),
    )
