"""The training loop, to be read from top to bottom.

Phase, epoch, learning rate, samples and augmentation are functions of the configuration and the
step. So the state of a run is its step, the model, the optimiser and some running sums, and
resuming restores those.
"""

import logging
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

from torch import Tensor

from tetdist.config.schema import RunConfig
from tetdist.data.loader import Batch
from tetdist.distributed.signals import StopRequest
from tetdist.distributed.watchdog import CONTINUES, Watch
from tetdist.distributed.world import World
from tetdist.errors import Stopped, UserError
from tetdist.evaluation.evaluate import Interrupted
from tetdist.optimizers import make_optimizer
from tetdist.storage.checkpoint import Checkpoint
from tetdist.tracking.progress import RunProgress
from tetdist.tracking.tracker import Tracker
from tetdist.training import memory, state
from tetdist.training.ema import WeightAverage
from tetdist.training.engines import make_engine
from tetdist.training.engines.base import Engine, EngineParts
from tetdist.training.evaluating import AVERAGE, Evaluated, Evaluations
from tetdist.training.feed import Feed
from tetdist.training.observers import MakeObservers, Observers, Watched
from tetdist.training.prepared import prepare
from tetdist.training.run_folder import RunFolder
from tetdist.training.run_record import Launcher, recorded
from tetdist.training.saving import Saving
from tetdist.training.schedule import Phase
from tetdist.training.step import Step
from tetdist.training.teacher import Teacher
from tetdist.training.window import Window

logger = logging.getLogger(__name__)


class Trainer:
    """One run on this process, resumed from its newest checkpoint or started."""

    engine: Engine
    training_step: Step
    tracker: Tracker | None
    progress: RunProgress

    def __init__(self, config: RunConfig, world: World, stop: StopRequest, watch: Watch) -> None:
        self.config, self.world, self.stop, self.watch = config, world, stop, watch
        self.prepared = run = prepare(config, world)
        self.step = self.evaluated_step = run.first_step  # optimiser steps done
        self.window = Window(config.batch.global_, world)
        self.optimizer_state: dict[str, Any] | None = None
        self.loss_scale_state: dict[str, float] | None = None
        self.average = WeightAverage.of(run.model, config.ema)
        with world.together():
            # Before the run's folder is made, so that a mistake leaves nothing behind.
            self.teacher = None if run.resumes else Teacher.of(config, run.train, world.device)
            self.folder = RunFolder(config, world)
        self.saving = Saving(run, stop, watch)
        self.evaluations = Evaluations(run, self.average, stop.agreed, self._evaluated)
        self.feed = Feed(run, self._on_batch)
        checkpoint = self.folder.newest_checkpoint()
        if checkpoint is not None:
            watch.after = CONTINUES
            with world.together():
                self._restore(checkpoint)
        self.phase: Phase | None = None
        self.observers = Observers()

    def run(self, launcher: Launcher, make_observers: MakeObservers) -> None:
        """Train and evaluate to the end.

        Raises:
            Stopped: A signal requested it; everything is saved.
            UserError: The loss is not finite, a file cannot be read, the disk is full, ...
        """
        run, result = self.prepared, None
        record = recorded(run, launcher, self.step, self.stop, finished=self.finished)
        try:
            with (
                record as self.tracker,
                run.progress(self.step) as self.progress,
                self.saving.thread,
            ):
                if (tracker := self.tracker) is not None:
                    self.watch.before_end.append(lambda _: tracker.close("FAILED", timeout=5))
                    self.stop.before_end.append(lambda: tracker.close("FAILED", timeout=1))
                    seen = Watched(run, tracker, self.step, self.finished)
                    self.observers = Observers.of(make_observers, seen)
                try:
                    self._train()
                finally:
                    self._leave()
            result = self.evaluations.result
        finally:
            self.observers.on_end(result)

    def _train(self) -> None:
        while not self.finished:
            is_due = self._evaluation_due()
            # An evaluation belongs to the phase of the step before it.
            phase = self.prepared.phase_at(self.step - 1 if is_due else self.step)
            self._enter(phase)
            self._evaluate() if is_due else self._train_epoch()
        self.saving.wait()
        if self.evaluations.result:
            self._log("final", self.evaluations.result)

    @property
    def finished(self) -> bool:
        return self.step >= self.prepared.last_step and not self._evaluation_due()

    def _evaluation_due(self) -> bool:
        return self.step != self.evaluated_step and self.prepared.is_evaluated_at(self.step)

    def _enter(self, phase: Phase) -> None:
        """Set up T, optimiser, engine and data of a phase, unless it is already active."""
        if self.phase is phase:
            return
        if self.phase is None or phase.section.optimizer != "continue":
            self._leave()
            self._open_engine(phase)
        self.training_step = Step(
            self.config,
            self.prepared.model,
            self.engine,
            self.world,
            self.prepared.micro_batches,
            teacher=self.teacher,
            average=self.average,
            phase=phase.number,
        )
        self.feed.open(self.step)
        self.phase = phase

    def _open_engine(self, phase: Phase) -> None:
        run, optimizer = self.prepared, make_optimizer(self.prepared.model, phase.optimizer)
        parts = EngineParts(run.config, run.model, optimizer, len(run.micro_batches), run.world)
        self.engine = make_engine(parts)
        # At the start of a phase a checkpoint holds the optimiser of the previous phase.
        is_its_own = self.step > phase.first_step or phase.section.optimizer == "continue"
        if self.optimizer_state is not None and is_its_own:
            try:
                self.engine.load_optimizer_state(self.optimizer_state)
            except (AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
                raise UserError(
                    f"the checkpoint's optimizer.pt does not suit the network ({error!r}); remove "
                    "this checkpoint to continue from the one before"
                ) from error
        if self.loss_scale_state is not None and self.engine.loss_scale:
            self.engine.loss_scale.load_state_dict(self.loss_scale_state)
        self.optimizer_state = None
        if self.average is not None:
            self.average.follow()

    def _leave(self) -> None:
        if self.phase is not None:
            if self.engine.loss_scale:
                self.loss_scale_state = self.engine.loss_scale.state_dict()
            self.feed.close()
            self.engine.close()
            self.phase = None

    # --- training -----------------------------------------------------------------------------

    def _train_epoch(self) -> None:
        self.prepared.model.train()
        self.window.restart(self.feed.waited)
        end = self.prepared.end_of_epoch(self.step)
        while self.step < end:
            grad_norm = self._train_step()
            self.progress.advance()
            if self.tracker:
                self.tracker.begin()
            if self.step % self.config.log_every == 0 or self.step == end:
                self._log_window(float(grad_norm))
            if self.stop.agreed():
                self._save_and_stop()
            every = self.config.save.every_steps
            if self.step < end and every and self.step % every == 0:
                self._save()
        if not self._evaluation_due():
            self._save()

    def _train_step(self) -> Tensor:
        """Take one optimiser step; return the norm of its gradient, ()."""
        lr = self.prepared.learning_rate(self.step)
        timesteps = self.training_step.timesteps(self.step)
        with memory.explained(self.config, self.prepared.train, self.world.device):
            update, sums = self.training_step.take(self.step, self.feed.of_step(self.step), lr)
        self.step += 1
        self.watch.progress(f"step {self.step}")
        self.window.add(self.step, update, sums, timesteps)
        if self.world.device.type == "cpu":
            self._check_finite()
        return update.grad_norm

    def _on_batch(self, step: int, batch: Batch) -> None:
        self.watch.progress(f"step {step}")
        self.observers.on_batch(step, batch)

    def _log_window(self, grad_norm: float) -> None:
        self._check_finite()
        values = {
            **self.prepared.where(self.step),
            **self.window.close(self.feed.waited, self.engine.loss_scale),
            "lr": self.prepared.learning_rate(self.step - 1),
            "grad_norm": grad_norm,
            "eta_s": self.progress.seconds_left(),
        }
        self._log("train", values)
        self.progress.report_training(self.step, values)
        self.observers.on_line("train", self.step, values)
        self.window.restart(self.feed.waited)

    def _check_finite(self) -> None:
        """End the run, on all processes, if too many steps in a row were not finite."""
        non_finite = self.window.non_finite
        if not (last := non_finite.limit_reached_at):
            return
        with self.feed.again(last - 1) as batches:
            examination = self.training_step.examine(last - 1, batches)
        reports = self.world.gather(None if examination.is_finite else str(examination))
        lr, checkpoints = self.prepared.learning_rate(last - 1), self.folder.checkpoints
        self.saving.wait()
        with self.world.together():
            non_finite.fail(lr, reports, self.saving.step, checkpoints)

    # --- evaluation ---------------------------------------------------------------------------

    def _evaluate(self) -> None:
        """Evaluate and save; if a stop interrupts, save alone, and the resumed run evaluates."""
        self.prepared.decide_looks_ahead()
        try:
            evaluations = self.evaluations.at(self.step)
        except Interrupted:
            self._save_and_stop()
        self.evaluated_step = self.step
        for kind, values in evaluations:
            values.update(self.prepared.where(self.step))
            values.update(self.observers.on_evaluation(self.step, Evaluated(kind, values)))
            self._log(kind, values)
            self.progress.report_evaluation(self.step, values, of_average=kind == AVERAGE)
        self._save(evaluations)
        for kind, values in evaluations:
            self.observers.on_line(kind, self.step, values)

    def _evaluated(self, samples: int, total: int) -> None:
        self.watch.progress(f"evaluation after step {self.step}")
        self.progress.advance_evaluation(samples, total)

    def _log(self, kind: str, values: Mapping[str, Any]) -> None:
        if self.tracker:
            self.tracker.log(kind, self.step, values)

    # --- state --------------------------------------------------------------------------------

    def _save(self, evaluated: Sequence[Evaluated] = ()) -> None:
        """Begin to write a checkpoint, with evaluations of its weights and their average."""
        self._check_finite()
        self.saving.wait()
        scale = self.engine.loss_scale
        now = state.RunState(
            self.step,
            self.evaluated_step,
            result=self.evaluations.result,
            window=self.window.total(),
            non_finite=self.window.non_finite.state_dict(),
            loss_scale=None if scale is None else scale.state_dict(),
            world_size=self.world.world_size,
            data=self.prepared.train.fingerprint,
            teacher=None if self.teacher is None else self.teacher.fingerprint,
            looks_ahead=self.prepared.model.looks_ahead,
            skips_zeros=self.prepared.skips_zeros,
        )
        self.saving.begin(now, self.engine.optimizer_state(), self.average, evaluated, self.tracker)

    def _save_and_stop(self) -> NoReturn:
        self._save()
        self.saving.wait()
        self.progress.bar.close()  # else it would be drawn again below the line
        # Trackers and plots may take some more seconds.
        logger.info("stopped at step %d, all saved; the same command continues", self.step)
        raise Stopped

    def _restore(self, checkpoint: Checkpoint) -> None:
        """Resume from a checkpoint, and open the teacher if still needed."""
        then = state.restore(checkpoint, self.prepared, self.average)
        self.step = self.saving.step = then.step
        self.evaluated_step, self.evaluations.result = then.evaluated_step, then.result
        self.window.restore(then.window, then.non_finite)
        self.loss_scale_state, self.optimizer_state = then.loss_scale, checkpoint.optimizer
        if self.world.rank == 0:
            if self.finished:
                logger.info("%s was trained before: nothing to do", self.folder.path)
            else:
                logger.info("continuing %s from step %d", self.folder.path, self.step)
        if not self.finished:
            self.teacher = state.teacher_again(then, checkpoint.path, self.prepared)
