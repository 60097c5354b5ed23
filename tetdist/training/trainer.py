"""The training loop, to be read from top to bottom.

All that decides the result is a function of the configuration and the step: phase, epoch,
learning rate, samples, augmentation. So the state of a run is its step, the model, the optimiser
and some running sums, and to resume is to put those back.
"""

import itertools
import logging
import math
import time
from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from dataclasses import asdict
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from tetdist.config.schema import RunConfig
from tetdist.data import mixing, order
from tetdist.data.batches import Share
from tetdist.data.build import eval_loader, train_loader
from tetdist.data.delivery import Batches
from tetdist.data.dropping import drop_factors
from tetdist.data.loader import Batch
from tetdist.data.transfer import on_device
from tetdist.distributed.signals import StopRequest
from tetdist.distributed.watchdog import Watch
from tetdist.distributed.world import World
from tetdist.errors import Stopped, UserError, typed
from tetdist.evaluation.evaluate import Interrupted, evaluate
from tetdist.losses import compute_loss
from tetdist.nn import batch_norm, dropout
from tetdist.nn.norm_neuron import changing_neurons, enter_epoch
from tetdist.nn.precision import autocast, choose_algorithms, parameter_type
from tetdist.optimizers import make_optimizer
from tetdist.reports.reference import Reference, find_reference, is_imagenet
from tetdist.storage import checkpoint
from tetdist.tracking.progress import RunProgress
from tetdist.tracking.tracker import Tracker
from tetdist.training import graphs, health
from tetdist.training.busy_cores import BusyCores
from tetdist.training.ema import WeightAverage
from tetdist.training.engines.base import Engine, Update
from tetdist.training.engines.create import make_engine
from tetdist.training.gpu_usage import GPUUsage
from tetdist.training.run_folder import RunFolder
from tetdist.training.run_plots import RunPlots
from tetdist.training.run_summary import Launcher, RunSummary, show_checkpoints
from tetdist.training.sample_record import SampleRecord, sample_record
from tetdist.training.schedule import Phase, phase_at, schedule_phases
from tetdist.training.setup import choose_passes, make_model, open_data
from tetdist.training.state import RunState, describe, load_initial_weights
from tetdist.training.step_profile import StepProfile
from tetdist.training.teacher import Teacher
from tetdist.wording import counted

logger = logging.getLogger(__name__)

GRAPHS_ARE_NEW = (
    "cuda_graphs=true: no GPU has shown yet that graphs compute what is computed without them; "
    f"`{typed('check_gpu', '--only', 'graphs')}` is the proof, or the contrary, on this machine"
)

# Positions in the running sums since the last line of metrics.
LOSS, CORRECT, SAMPLES = range(3)


class Score(NamedTuple):
    """An evaluation as the checkpoint of its weights tells of it.

    Attributes:
        validation: Accuracies in percent, by name; None: these weights were not evaluated.
        is_best: Whether there was no better one before.
    """

    validation: dict[str, float] | None = None
    is_best: bool = False


NOT_EVALUATED = Score()


class Trainer:
    """One run on this process, from its newest checkpoint or from the beginning.

    Raises:
        UserError: Data, checkpoint or run folder do not suit the configuration.
    """

    def __init__(
        self, config: RunConfig, world: World, stop: StopRequest, watch: Watch, launcher: Launcher
    ) -> None:
        self.config, self.world, self.stop, self.watch = config, world, stop, watch
        self.launcher = launcher
        world.run_on_all(self._open_data)
        world.run_on_all(self._build_model)
        if config.execution == "fused":
            world.run_on_all(lambda: choose_passes(world))

        # Optimiser steps done.
        self.step = self.evaluated_step = self.phases[config.start_phase].first_step
        self.result: dict[str, float] = {}  # of the last evaluation, and the best one so far
        # float64, so that it does not matter where a stop cuts the sums in two.
        self.window = torch.zeros(3, dtype=torch.float64, device=world.device)
        self.non_finite = health.NonFiniteSteps(world.device, config.non_finite_limit)
        self.optimizer_state: dict[str, Any] | None = None
        self.loss_scale_state: dict[str, float] | None = None
        self.teacher: Teacher | None = None
        self.saved_step: int | None = None
        world.run_on_all(self._begin)
        self.ema = WeightAverage.of(self.model, config.ema)
        self.folder = world.run_on_all(lambda: RunFolder(config, world))
        found = self.folder.newest_checkpoint()
        if found is not None:
            world.run_on_all(lambda: self._restore(found))

        self.phase: Phase | None = None
        self.graph: graphs.Graphed | None = None  # of `_add_micro_batch`
        self.engine: Engine
        self.loader: Batches
        self.image_size = 0  # of the loader's images

    def _open_data(self) -> None:
        config, world, batch = self.config, self.world, self.config.batch
        _check_device(config, world)
        # This process's part of each step: numbers of micro-batches, counted over all processes.
        self.micro_batches = order.rank_micro_batches(
            world.rank, world.world_size, batch.global_, batch.micro
        )
        self.train_index, self.val_index = open_data(config, world)
        self.reference = (
            None if config.reference is None else find_reference(config.reference, "reference")
        )
        if self.reference is not None:
            classes, has_average = len(self.train_index.classes), config.ema.decay is not None
            if (why_not := self.reference.obstacle(classes, has_average)) is not None:
                if world.rank == 0:
                    logger.info("reference: %s; the run is not compared with it", why_not)
                self.reference = None
        self.steps_per_epoch = order.steps_per_epoch(len(self.train_index), batch.global_)
        self.phases = schedule_phases(config.phases, self.steps_per_epoch, config.batch.global_)
        end = self.phases[-1].end_step
        self.last_step = min(end, config.max_steps or end)
        first = self.phases[config.start_phase].first_step
        if self.last_step <= first:
            raise UserError(
                f"max_steps: {config.max_steps} ends before phase {config.start_phase} begins, "
                f"after step {first}; steps are counted from the first phase on"
            )
        if config.profile is not None and config.profile.steps[0] > self.last_step:
            raise UserError(
                f"profile.steps: step {config.profile.steps[0]:,} is after the run's last, "
                f"{self.last_step:,}; take earlier ones"
            )

    def _build_model(self) -> None:
        config, world = self.config, self.world
        torch.manual_seed(config.seed)
        choose_algorithms(config.precision, deterministic=config.deterministic)
        self.model = make_model(config, self.train_index)
        self.model.to(world.device, parameter_type(config.precision))
        self.dropping = dropout.dropping(self.model)
        self.changing = changing_neurons(self.model)
        batch_norm.defer_running_statistics(self.model)
        if config.batch_norm.sync and world.world_size > 1:
            batch_norm.synchronize(self.model, world.mean_, world.world_size)

    # --- the run ------------------------------------------------------------------------------

    def run(self) -> None:
        """Train and evaluate to the end.

        Raises:
            Stopped: A signal asked for it; all is saved.
            UserError: The loss is not finite, a file cannot be read, the disk is full, ...
        """
        config, world = self.config, self.world
        summary = RunSummary(
            config,
            self.train_index,
            self.val_index,
            world.world_size,
            self.launcher,
            self.folder.data_split,
        )
        with (
            nullcontext() if world.rank else summary.tracked(self.step, self.stop) as self.tracker,
            sample_record(config, world, self.step) as self.record,
            StepProfile(config, world.device, is_here=world.rank == 0) as self.profile,
            RunProgress(
                self.step,
                self.last_step,
                self.steps_per_epoch,
                config.batch.global_,
                phases=len(config.phases),
                settle=world.wait_for_device,
                silent=world.rank != 0,
            ) as self.progress,
        ):
            self.plots = None
            self.cores = BusyCores(world.device, config.precision)
            self.gpus = GPUUsage(world)
            if (tracker := self.tracker) is not None:
                self.watch.before_end.append(lambda _: tracker.close("FAILED", timeout=5))
                self.plots = RunPlots(config, self.train_index.classes, tracker)
            try:
                if world.rank == 0 and not self.finished:
                    summary.log_start(
                        self.model, world.device, self.steps_per_epoch, self.last_step
                    )
                    if config.cuda_graphs:
                        logger.warning(GRAPHS_ARE_NEW)
                while not self.finished:
                    if self._evaluation_due():
                        self._enter(phase_at(self.phases, self.step - 1))
                        self._evaluate()
                    else:
                        self._enter(phase_at(self.phases, self.step))
                        self._train_epoch()
                if self.result:
                    self._log("final", self.result)
            finally:
                self._leave()
        if world.rank == 0:
            summary.log(self.result, in_mlflow=tracker is not None and tracker.is_complete)

    @property
    def finished(self) -> bool:
        return self.step >= self.last_step and not self._evaluation_due()

    def _evaluation_due(self) -> bool:
        if self.step == self.evaluated_step:
            return False
        epoch, step_in_epoch = divmod(self.step, self.steps_per_epoch)
        at_end = self.step == self.last_step
        return at_end or (step_in_epoch == 0 and epoch % self.config.evaluate_every == 0)

    def _enter(self, phase: Phase) -> None:
        """Set up T, optimiser, engine and data of a phase, unless it is the present one."""
        if self.phase is phase:
            return
        self._leave()
        if self.tracker:
            self.tracker.enter_phase(phase.number)
        self.model.set_timesteps(phase.section.timesteps)
        optimizer = make_optimizer(self.model, phase.section.optimizer)
        self.engine = make_engine(
            self.config, self.model, optimizer, len(self.micro_batches), self.world
        )
        # At the very start of a phase a checkpoint holds the optimiser of the one before.
        if self.optimizer_state is not None and self.step > phase.first_step:
            self.engine.load_optimizer_state(self.optimizer_state)
        if self.loss_scale_state is not None and self.engine.loss_scale:
            self.engine.loss_scale.load_state_dict(self.loss_scale_state)
        self.optimizer_state = None
        if self.ema is not None:
            self.ema.follow()
        if self.config.cuda_graphs:
            self.graph = graphs.Graphed(self._add_micro_batch, self.model, self.world.run_on_all)
        self.image_size = self._image_size(self.step)
        self.loader = self._open_loader(self.step)
        self.phase = phase

    def _image_size(self, step: int) -> int:
        return phase_at(self.phases, step).image_size(step, self.config.data.image_size)

    def _open_loader(self, step: int) -> Batches:
        """Open this process's micro-batches from a step on, all of that step's image size."""
        epoch, step_in_epoch = divmod(step, self.steps_per_epoch)
        share = Share(
            seed=self.config.seed,
            global_batch=self.config.batch.global_,
            micro_batch=self.config.batch.micro,
            rank=self.world.rank,
            world_size=self.world.world_size,
            epoch=epoch,
            step_in_epoch=step_in_epoch,
            repeats=self.config.data.repeats,
        )
        size = self._image_size(step)
        return train_loader(self.config, self.train_index, share, self.world, size)

    def _leave(self) -> None:
        if self.phase is not None:
            if self.engine.loss_scale:
                self.loss_scale_state = self.engine.loss_scale.state_dict()
            self.loader.close()
            self.engine.close()
            self.graph = self.phase = None

    # --- training -----------------------------------------------------------------------------

    def _train_epoch(self) -> None:
        """Train to the end of the epoch."""
        if self._image_size(self.step) != self.image_size:
            self.image_size = self._image_size(self.step)
            self.loader.close()
            self.loader = self._open_loader(self.step)
        self.model.train()
        enter_epoch(self.changing, self.step // self.steps_per_epoch)
        clock = _Clock()
        self.gpus.restart()
        end = min((self.step // self.steps_per_epoch + 1) * self.steps_per_epoch, self.last_step)
        while self.step < end:
            with self.profile.step(self.step + 1):
                lr, update = self._train_step(clock)
            table = self.profile.finish(at_epochs_end=self.step == end)
            if table is not None and self.tracker:
                self.tracker.artifact(table)
            self.progress.advance()
            if self.step % self.config.log_every == 0 or self.step == end:
                self._log_window(lr, float(update.grad_norm), clock)
            if self.stop.agreed():
                self._save()
                raise Stopped
            every = self.config.save.every_steps
            if self.step < end and every and self.step % every == 0:
                self._save()
        if not self._evaluation_due():
            self._save()

    def _train_step(self, clock: "_Clock") -> tuple[float, Update]:
        """Take one optimiser step; return its learning rate and what the update did."""
        assert self.phase is not None
        lr = self.phase.learning_rate(self.step)
        batches: Iterable[tuple[Tensor, Tensor]] = self._micro_batches(clock)
        scale = self.engine.loss_scale
        if scale is not None:
            batches = list(batches)
        update, sums = self._forward_backward_update(batches, lr)
        if scale is not None:
            # In float16 the gradient may overflow for its scale: the same step again, with half of
            # it. The device is asked once each time, which is to wait for it.
            while not (applied := bool(update.applied)) and scale.overflowed():
                update, sums = self._forward_backward_update(batches, lr)
            if applied:
                scale.succeeded()
        self.step += 1
        clock.samples += self.config.batch.global_
        # A step whose gradient is not finite has changed nothing, and its sums are left out. On a
        # GPU the device is not asked at every step whether that was so.
        self.window += torch.where(update.applied, sums, 0.0)
        self.non_finite.record(self.step, update.applied)
        if self.world.device.type == "cpu" and self.non_finite.too_many:
            self._end_non_finite()
        return lr, update

    def _micro_batches(self, clock: "_Clock") -> Iterator[tuple[Tensor, Tensor]]:
        """This process's images and targets of one step, on the device."""
        for _ in self.micro_batches:
            with clock.waiting():
                batch = next(self.loader)
            self.record(self.step + 1, batch)
            if self.plots:
                self.plots.inputs(batch)
            self.watch.progress(f"step {self.step + 1}")
            yield self._prepared(batch)

    def _prepared(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Images and targets on the device, mixed where that is asked for.

        Targets are labels (B,), or shares of the classes (B, K).
        """
        images = self._images_on_device(batch)
        targets = on_device(batch.labels, self.world.device)
        if batch.mix is not None:
            mix = mixing.on_device(batch.mix, self.world.device)
            targets = mixing.mixed_targets(targets, mix, self.model.num_classes, images.dtype)
            images = mixing.mixed_images(images, mix)
        return images, targets

    def _forward_backward_update(
        self, batches: Iterable[tuple[Tensor, Tensor]], lr: float
    ) -> tuple[Update, Tensor]:
        """One update from the step's micro-batches; also their sums for the metrics."""
        sums = torch.zeros_like(self.window)
        add_micro_batch = self.graph or self._add_micro_batch
        for number, (images, targets) in zip(self.micro_batches, batches, strict=True):
            self._seed(self.step, number)
            sums += add_micro_batch(images, targets, *self._dropped(self.step, number))
            self.watch.progress(f"step {self.step + 1}")
        update = self.engine.update(lr)
        batch_norm.update_running_statistics(self.model, self.world.mean_, update.applied)
        if self.ema is not None:
            self.ema.update(self.step + 1, update.applied)
        return update, sums

    def _add_micro_batch(self, images: Tensor, targets: Tensor, *dropped: Tensor) -> Tensor:
        """Add a micro-batch's gradient to those of the step; its sums for the metrics.

        With CUDA graphs this is called to be captured: what is not on the device is not repeated.

        Args:
            images, targets: See `_prepared`.
            dropped: See `_dropped`.
        """
        for factors in dropped:
            dropout.give(self.dropping, factors)
        logits = self.engine.forward(images)  # (T, B, K)
        loss = compute_loss(self.config.loss, logits, targets, self._teacher_logits(images))
        self.engine.backward(loss)
        return _sums(logits.detach(), targets, loss.detach())

    def _seed(self, step: int, micro_batch: int) -> None:
        """Have what a network draws, one from outside say, be a function of step and samples."""
        torch.manual_seed(order.forward_seed(self.config.seed, step, micro_batch))

    def _dropped(self, step: int, micro_batch: int) -> tuple[Tensor, ...]:
        """What our own layers drop of a micro-batch, as `dropout.give` takes it; (): nothing.

        It is computed here and not by the layers, so that a CUDA graph has it as an input.
        """
        return drop_factors(self.config, self.dropping, step, micro_batch, self.world.device)

    def _teacher_logits(self, images: Tensor) -> Tensor | None:
        """The teacher's logits (B, K) for the images; None where there is no teacher."""
        return None if self.teacher is None else self.teacher(images)

    def _images_on_device(self, batch: Batch) -> Tensor:
        return on_device(batch.images, self.world.device, parameter_type(self.config.precision))

    def _window_sums(self) -> list[float]:
        """The sums over all processes, checked."""
        if self.non_finite.too_many:
            self._end_non_finite()
        return self.world.sum(self.window.tolist())

    def _end_non_finite(self) -> None:
        """End the run, on all processes, with what can be found out about its last step."""
        assert self.phase is not None
        step, limit = self.non_finite.limit_reached_at, self.config.non_finite_limit
        lr = self.phase.learning_rate(step - 1)
        reports = [text for text in self.world.gather(self._examine(step)) if text]
        found = "; ".join(reports) or "Repeated, it is finite on all processes: suspect a device"
        saved = "no checkpoint has been saved yet"
        if self.saved_step is not None:
            saved = f"the last checkpoint is of step {self.saved_step}, in "
            saved += str(self.folder.checkpoints)

        def fail() -> None:
            raise UserError(
                f"{health.NOT_FINITE} {counted(limit, 'step')} in a row, at "
                f"last at step {step} (learning rate {lr:.4g}). They changed nothing, and {saved}. "
                f"{found}. A smaller phases.*.optimizer.lr, a warm-up (phases.*.warmup_epochs) or "
                "gradient_clipping are the usual remedies"
            )

        self.world.run_on_all(fail)

    def _examine(self, step: int) -> str | None:
        """Say what this process's share of a step shows, layer by layer; None: nothing bad."""

        numbers = iter(self.micro_batches)

        def loss(images: Tensor, targets: Tensor) -> Tensor:
            number = next(numbers)
            self._seed(step - 1, number)
            for factors in self._dropped(step - 1, number):
                dropout.give(self.dropping, factors)
            with autocast(self.world.device, self.config.precision):
                logits = self.model(images, per_timestep=True)
            return compute_loss(self.config.loss, logits, targets, self._teacher_logits(images))

        loader = self._open_loader(step - 1)
        try:
            batches = (next(loader) for _ in self.micro_batches)
            found = health.examine(self.model, (self._prepared(batch) for batch in batches), loss)
        finally:
            loader.close()
        return None if found.is_finite else f"Rank {self.world.rank}: {found}"

    def _log_window(self, lr: float, grad_norm: float, clock: "_Clock") -> None:
        sums = self._window_sums()
        self.window.zero_()
        values: dict[str, Any] = {
            **self._where(),
            "loss": sums[LOSS] / sums[SAMPLES] if sums[SAMPLES] else math.nan,
            "top1": 100 * sums[CORRECT] / sums[SAMPLES] if sums[SAMPLES] else math.nan,
            "lr": lr,
            "grad_norm": grad_norm,
            "non_finite_steps": self.non_finite.new(),
            "samples_per_s": clock.samples / clock.seconds(),
            "data_wait": 100 * clock.waited / clock.seconds(),
            "eta_s": self.progress.seconds_left(),
            **self.gpus.values(),
        }
        if self.engine.loss_scale:
            values["loss_scale"] = self.engine.loss_scale.value
            values["overflows"] = self.engine.loss_scale.overflows
        if values["non_finite_steps"] and self.world.rank == 0:
            logger.warning(
                "step %d: %s since the last line had no finite gradient and changed nothing",
                self.step,
                counted(values["non_finite_steps"], "step"),
            )
        if (warning := self.cores.warning()) is not None:
            logger.warning(warning)
        self._log("train", values)
        self.progress.report_training(self.step, values)
        clock.restart()

    def _where(self) -> dict[str, float]:
        assert self.phase is not None
        epoch = round(self.step / self.steps_per_epoch, 6)
        return {"epoch": epoch, "phase": self.phase.number}

    # --- evaluation ---------------------------------------------------------------------------

    def _evaluate(self) -> None:
        """Evaluate and save; a stop in between leaves the evaluation to the continued run."""
        averages = None
        enter_epoch(self.changing, self._trained_epoch())
        try:
            first, values = self._evaluate_weights()
            if self.ema is not None:
                with self.ema.in_model():
                    _, averages = self._evaluate_weights()
        except Interrupted:
            self._save()
            raise Stopped from None
        self.evaluated_step = self.step
        score = self._log_evaluation(values, "weights")
        self._save(score, self._log_evaluation(averages, "ema") if averages else NOT_EVALUATED)
        if self.plots:
            self.plots.after_evaluation(
                self.model, self._images_on_device(first), values, last=self.step == self.last_step
            )

    def _evaluate_weights(self) -> tuple[Batch, dict[str, Any]]:
        """Evaluate what is in the model; the first batch, and the line of metrics."""
        started = time.monotonic()
        with eval_loader(self.config, self.val_index, self.world) as batches:
            first = next(batches)
            result = evaluate(
                self.model,
                itertools.chain([first], batches),
                len(self.val_index),
                self.world,
                precision=self.config.precision,
                stop=self.stop.agreed,
                progress=self._evaluated,
            )
        return first, {
            **self._where(),
            "timesteps": result.timesteps,
            "samples": result.samples,
            "loss": result.loss,
            "top1": result.top1,
            "top5": result.top5,
            "per_timestep_top1": result.per_timestep_top1,
            "firing_rate": result.firing_rate,
            "seconds": time.monotonic() - started,
        }

    def _log_evaluation(self, values: dict[str, Any], of: Literal["weights", "ema"]) -> Score:
        """Log an evaluation, and keep its result beside the best one of the same weights."""
        kind, prefix = {"weights": ("val", ""), "ema": ("val_ema", "ema_")}[of]
        is_best = values["top1"] > self.result.get(f"{prefix}best_top1", -math.inf)
        if is_best:
            self.result |= {f"{prefix}best_top1": values["top1"], f"{prefix}best_step": self.step}
        self.result[f"{prefix}top1"] = values["top1"]
        values["best_top1"] = self.result[f"{prefix}best_top1"]
        if self.reference is not None and self.reference.of_average == (of == "ema"):
            values |= self._beside(self.reference, values["top1"])
        if self.folder.data_split:
            values["data_split"] = self.folder.data_split
        self._log(kind, values)
        self.progress.report_evaluation(self.step, values, of_average=of == "ema")
        return Score({key: values[key] for key in ("top1", "top5")}, is_best)

    def _beside(self, reference: Reference, top1: float) -> dict[str, float]:
        """What a published training had after as many images; a run far behind it warns."""
        images = self.step * self.config.batch.global_
        is_warm = self.step > self.config.phases[0].warmup_epochs * self.steps_per_epoch
        warning = reference.warning(top1, images)
        if warning is not None and is_warm and is_imagenet(len(self.train_index)):
            logger.warning(warning)
        return reference.beside(images)

    def _trained_epoch(self) -> int:
        """The epoch that the last step was one of."""
        return max(self.step - 1, 0) // self.steps_per_epoch

    def _evaluated(self, samples: int) -> None:
        """Tell those who watch that so many samples more are evaluated on this process."""
        self.watch.progress(f"evaluation after step {self.step}")
        # Each process has its share of the samples, which the average is evaluated on once more.
        total = len(self.val_index) * (1 if self.ema is None else 2)
        self.progress.advance_evaluation(samples, total // self.world.world_size or 1)

    def _log(self, kind: str, values: dict[str, Any]) -> None:
        if self.tracker:
            self.tracker.log(kind, self.step, values)

    # --- state --------------------------------------------------------------------------------

    def _save(self, score: Score = NOT_EVALUATED, of_average: Score = NOT_EVALUATED) -> None:
        """Write a checkpoint, from rank 0, with what its weights and their average are worth."""
        scale = self.engine.loss_scale
        state = RunState(
            step=self.step,
            evaluated_step=self.evaluated_step,
            result=self.result,
            window=self._window_sums(),
            non_finite=self.non_finite.state_dict(),
            loss_scale=None if scale is None else scale.state_dict(),
            world_size=self.world.world_size,
            data=self.train_index.fingerprint,
            teacher=None if self.teacher is None else self.teacher.fingerprint,
        )
        description = describe(
            self.config,
            self.train_index,
            step=self.step,
            timesteps=self.model.timesteps,
            epoch=self._trained_epoch(),
            validation=score.validation,
        )
        average = None
        if self.ema is not None:
            changes = {"validation": of_average.validation, "averaged": self.ema.as_text()}
            average = checkpoint.Average(
                self.ema.state_dict(),
                description.model_copy(update=changes),
                of_average.is_best,
            )
        optimizer = self.engine.optimizer_state()

        def write() -> None:
            if self.tracker:
                self.tracker.sync()
                checkpoint.save(
                    self.folder.checkpoints,
                    model=self.model,
                    optimizer=optimizer,
                    description=description,
                    state=asdict(state),
                    keep_last=self.config.save.keep_last,
                    best=score.is_best,
                    average=average,
                )
                show_checkpoints(self.tracker, self.folder.checkpoints)

        self.world.run_on_all(write)
        self.saved_step = self.step

    def _begin(self) -> None:
        """Have what a run begins with, before its folder is made: a mistake leaves nothing behind.

        One that goes on from a checkpoint of its own needs none of it.
        """
        if not any((self.config.run_dir / "checkpoints").glob("step-*")):
            say = self.world.rank == 0
            load_initial_weights(self.model, self.config, self.train_index, say=say)
            self._open_teacher()

    def _restore(self, found: checkpoint.Checkpoint) -> None:
        """Put back what a checkpoint holds, and open the teacher if it is still needed."""
        state = RunState.read(found.state)
        checkpoint.load_weights(self.model, found.model, found.path)
        if self.ema is not None:
            if found.average is None:
                raise UserError(
                    f"ema.decay: {found.path} has no moving average to go on from; give the run "
                    "another name, or set ema.decay=null"
                )
            self.ema.load_state_dict(found.average)
        state.check(found.path, self.config, self.train_index, self.world.world_size)
        self.step = self.saved_step = state.step
        self.evaluated_step, self.result = state.evaluated_step, state.result
        self.non_finite.load_state_dict(state.non_finite)
        self.loss_scale_state, self.optimizer_state = state.loss_scale, found.optimizer
        if self.world.rank == 0:
            self.window += torch.tensor(state.window, dtype=torch.float64).to(self.window.device)
            if self.finished:
                logger.info("%s was trained before: nothing to do", self.folder.path)
            else:
                logger.info("continuing %s from step %d", self.folder.path, self.step)
        if not self.finished:
            self._open_teacher()
        if self.teacher is not None:
            state.check_teacher(found.path, self.config, self.teacher.fingerprint)

    def _open_teacher(self) -> None:
        """Have the teacher that is asked for, if any."""
        distillation = self.config.loss.distillation
        if distillation.teacher is not None and distillation.weight > 0:
            self.teacher = Teacher(self.config, self.train_index, self.world.device)

    tracker: Tracker | None
    plots: RunPlots | None
    cores: BusyCores
    gpus: GPUUsage
    profile: StepProfile
    record: SampleRecord
    progress: RunProgress


def _check_device(config: RunConfig, world: World) -> None:
    if config.precision in ("fp16", "tf32") and world.device.type == "cpu":
        raise UserError(
            f"precision: {config.precision} needs a GPU; on a CPU train with bf16 or fp32"
        )
    if config.cuda_graphs and world.device.type == "cpu":
        raise UserError("cuda_graphs: they are a GPU's; on a CPU train with cuda_graphs=false")


def _sums(logits: Tensor, targets: Tensor, loss: Tensor) -> Tensor:
    """LOSS, CORRECT and SAMPLES of a micro-batch with logits (T, B, K).

    A mixed sample is as correct as the share that the predicted class has in it.
    """
    predicted = logits.mean(0).argmax(-1)
    if targets.ndim == 2:
        correct = targets.gather(1, predicted[:, None]).sum().double()
    else:
        correct = (predicted == targets).sum().double()
    num_samples = torch.full_like(correct, len(targets))
    return torch.stack([loss.double() * num_samples, correct, num_samples])


class _Clock:
    """Time since the last line of metrics, and how much of it was spent waiting for data."""

    def __init__(self) -> None:
        self.restart()

    def restart(self) -> None:
        self.started, self.waited, self.samples = time.monotonic(), 0.0, 0
        self._wait_started = 0.0

    def seconds(self) -> float:
        return max(time.monotonic() - self.started, 1e-9)

    def waiting(self) -> "_Clock":
        return self

    def __enter__(self) -> None:
        self._wait_started = time.monotonic()

    def __exit__(self, *_: object) -> None:
        self.waited += time.monotonic() - self._wait_started
