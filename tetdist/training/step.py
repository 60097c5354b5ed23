"""One optimiser step: micro-batches forward and backward, then one update.

Trainer, check_gpu, `bench step` and the tests without a GPU all take this step. It receives batches
on the device, opens no file and logs nothing.
"""

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from torch import Tensor

from tetdist import order
from tetdist.config.schema import RunConfig
from tetdist.data.transfer import on_device
from tetdist.distributed.world import World
from tetdist.models import SpikingNetwork
from tetdist.models.base import check_logits
from tetdist.nn import batch_norm, dropout
from tetdist.nn.precision import autocast, parameter_type
from tetdist.training import graphs, health
from tetdist.training.ema import WeightAverage
from tetdist.training.engines.base import Engine, Update
from tetdist.training.objective import compute_loss
from tetdist.training.operations import SynapticOperations
from tetdist.training.teacher import Teacher

# Positions in a step's sums.
LOSS, CORRECT, SAMPLES = range(3)

# Images and targets on the device. Targets are labels (B,) or fractions of the classes (B, K).
MicroBatch = tuple[Tensor, Tensor]


class Step:
    """This process's part of every optimiser step of a phase.

    Args:
        config: The run's; seed, micro-batch, precision, losses and cuda_graphs are read.
        model: The model, in training mode and with deferred running statistics.
        engine: The phase's engine, made for ``model``.
        micro_batches: Numbers of this process's micro-batches, counted over all processes.
        teacher: A network whose logits are an additional target.
        average: The moving average of the weights.
        phase: Number of the phase.
    """

    def __init__(
        self,
        config: RunConfig,
        model: SpikingNetwork,
        engine: Engine,
        world: World,
        micro_batches: Sequence[int],
        teacher: Teacher | None = None,
        average: WeightAverage | None = None,
        phase: int = 0,
    ) -> None:
        self.config, self.model, self.engine, self.world = config, model, engine, world
        self.micro_batches, self.average = micro_batches, average
        self.section = config.phases[phase]
        self.loss = config.loss_of(self.section)
        model.set_timesteps(self.section.most_timesteps)
        self.teacher = teacher if self.loss.distillation.weight else None
        self._operations = SynapticOperations(model) if self.loss.operations else None
        self._dropping = dropout.dropping(model)
        self._num_factors = dropout.num_factors(self._dropping)
        self._run: Callable[..., Tensor] = self._add_micro_batch
        if config.cuda_graphs:
            self._run = graphs.Graphed(self._add_micro_batch, model, world.together)

    def take(self, step: int, batches: Iterable[MicroBatch], lr: float) -> tuple[Update, Tensor]:
        """Take one step.

        Args:
            step: Number of optimiser steps before this one.
            batches: One for each of `micro_batches`.
            lr: Learning rate of the update.

        Returns:
            The outcome, on the device, and this process's sums of LOSS, CORRECT and SAMPLES, (3,),
            float64.
        """
        scale = self.engine.loss_scale
        if scale is None:
            return self._attempt(step, batches, lr)
        # A float16 gradient may overflow because of its scale: then the step is repeated with half
        # the scale. Each attempt synchronises once with the device.
        batches = list(batches)
        update, sums = self._attempt(step, batches, lr)
        while not (applied := bool(update.applied)) and scale.overflowed():
            update, sums = self._attempt(step, batches, lr)
        if applied:
            scale.succeeded()
        return update, sums

    def _attempt(
        self, step: int, batches: Iterable[MicroBatch], lr: float
    ) -> tuple[Update, Tensor]:
        sums = torch.zeros(3, dtype=torch.float64, device=self.world.device)
        with self._timesteps_of(step):
            for number, (images, targets) in zip(self.micro_batches, batches, strict=True):
                sums += self._run(images, targets, *self._draw(step, number))
        update = self.engine.update(lr)
        batch_norm.update_running_statistics(self.model, self.world.mean_, update.applied)
        if self.average is not None:
            self.average.update(step + 1, update.applied)
        return update, sums

    def timesteps(self, step: int) -> int:
        """Return the T of the step after ``step`` others, the same on all processes."""
        return order.drawn_timesteps(self.section.choices, self.config.seed, step)

    @contextlib.contextmanager
    def _timesteps_of(self, step: int) -> Iterator[None]:
        """Give the model the T that a step draws; otherwise it has the phase's largest."""
        timesteps, is_drawn = self.timesteps(step), len(self.section.choices) > 1
        if is_drawn:
            self.model.set_timesteps(timesteps)
        yield
        if is_drawn:
            self.model.set_timesteps(self.section.most_timesteps)

    def _add_micro_batch(self, images: Tensor, targets: Tensor, *dropped: Tensor) -> Tensor:
        """Add a micro-batch's gradient to the step's; return its sums.

        A CUDA graph captures this call: only work on the device is repeated.
        """
        self._drop(dropped)
        with self._counted():
            logits = self.engine.forward(images)  # (T, B, K)
            loss = self._loss(images, logits, targets)
            self.engine.backward(loss)
        return sums_of(logits.detach(), targets, loss.detach())

    def _loss(self, images: Tensor, logits: Tensor, targets: Tensor) -> Tensor:
        check_logits(logits, self.model.timesteps, len(images), self.model.num_classes)
        loss = compute_loss(self.loss, logits, targets, self._teacher_logits(images))
        if self._operations is None:
            return loss
        return loss + self.loss.operations * self._operations.share().to(loss.dtype)

    def _counted(self) -> contextlib.AbstractContextManager[None]:
        """Count synaptic operations in this context, if they have a weight."""
        return contextlib.nullcontext() if self._operations is None else self._operations.counted()

    def _teacher_logits(self, images: Tensor) -> Tensor | None:
        return None if self.teacher is None else self.teacher(images)

    def _draw(self, step: int, micro_batch: int) -> tuple[Tensor, ...]:
        """Return the dropout masks of a micro-batch, which are inputs of a CUDA graph.

        They depend on the samples' positions in the global batch; () without layers that drop. For
        networks of imported files, which may draw otherwise, seed torch's generators.
        """
        config, device = self.config, self.world.device
        if config.imports:
            seed = order.forward_seed(config.seed, step, micro_batch)
            # torch.manual_seed takes 80 times as long: it looks for devices of every kind.
            torch.default_generator.manual_seed(seed)
            if device.type == "cuda":
                torch.cuda.manual_seed(seed)
        if not self._dropping:
            return ()
        count = self._num_factors
        uniforms = order.drop_uniforms(config.seed, step, micro_batch, config.batch.micro, count)
        factors = dropout.factors(self._dropping, torch.from_numpy(uniforms))
        return (on_device(factors, device, parameter_type(config.precision)),)

    def _drop(self, dropped: tuple[Tensor, ...]) -> None:
        for factors in dropped:
            dropout.set_factors(self._dropping, factors)

    def examine(self, step: int, batches: Iterable[MicroBatch]) -> health.Examination:
        """Repeat the forward and backward passes of a step and check every layer.

        Nothing changes; arguments as in `take`.
        """
        numbers = iter(self.micro_batches)

        def loss(images: Tensor, targets: Tensor) -> Tensor:
            dropped = self._draw(step, next(numbers))
            self._drop(dropped)
            with autocast(self.world.device, self.config.precision):
                logits = self.model(images, per_timestep=True)
            return self._loss(images, logits, targets)

        with self._timesteps_of(step), self._counted():
            return health.examine(self.model, batches, loss)


def sums_of(logits: Tensor, targets: Tensor, loss: Tensor) -> Tensor:
    """Return LOSS, CORRECT and SAMPLES, (3,), float64, of a micro-batch with logits (T, B, K).

    A mixed sample counts with its fraction of the predicted class.
    """
    predicted = logits.mean(0).argmax(-1)
    if targets.ndim == 2:
        correct = targets.gather(1, predicted[:, None]).sum().double()
    else:
        correct = (predicted == targets).sum().double()
    num_samples = torch.full_like(correct, len(targets))
    return torch.stack([loss.double() * num_samples, correct, num_samples])
