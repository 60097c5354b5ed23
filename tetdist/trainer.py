"""The training loop, to be read from top to bottom.

All that decides the result is a function of the configuration and the step: phase, epoch,
learning rate, samples, augmentation. So the state of a run is its step, the model, the optimiser
and some running sums, and to resume is to put those back.
"""

import logging
import os
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tetdist import checkpoint, losses, normalization, plots
from tetdist.config import LossSection, RunConfig
from tetdist.data import order, pipeline
from tetdist.data.loaders import eval_loader, train_loader
from tetdist.distributed import StopRequest, World
from tetdist.engine import Engine, make_engine, make_optimizer
from tetdist.errors import Stopped, UserError
from tetdist.evaluate import Interrupted, evaluate
from tetdist.progress import Progress
from tetdist.run import RunFolder, make_model, open_data
from tetdist.schedule import Phase, phase_at, place
from tetdist.tracking import Tracker

logger = logging.getLogger(__name__)

# Of the running sums since the last line of metrics.
LOSS, CORRECT, SAMPLES = range(3)


class Trainer:
    """One run on this process, from its newest checkpoint or from the beginning.

    Raises:
        UserError: Data, checkpoint or run folder do not suit the configuration.
    """

    def __init__(self, config: RunConfig, world: World, stop: StopRequest) -> None:
        self.config, self.world, self.stop = config, world, stop
        batch = config.batch
        self.num_micro_batches = world.together(
            lambda: len(
                order.rank_micro_batches(world.rank, world.world_size, batch.global_, batch.micro)
            )
        )
        self.train_index, self.val_index = world.together(lambda: open_data(config, world))
        self.steps_per_epoch = world.together(
            lambda: order.steps_per_epoch(len(self.train_index), batch.global_)
        )
        self.phases = place(config.phases, self.steps_per_epoch)
        end = self.phases[-1].end_step
        self.last_step = min(end, config.max_steps or end)

        torch.manual_seed(config.seed)
        if config.deterministic:
            # cuBLAS reads it when it is first used, and torch refuses to go on without it.
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(config.deterministic)
        self.model = world.together(lambda: make_model(config, self.train_index))
        self.model.to(world.device)
        normalization.defer_running_statistics(self.model)

        self.step = 0  # optimiser steps done
        self.evaluated_step = 0
        self.result: dict[str, float] = {}  # of the last evaluation, and the best one so far
        # float64, so that it does not matter where a stop cuts the sums in two.
        self.window = torch.zeros(3, dtype=torch.float64, device=world.device)
        self.optimizer_state: dict[str, Any] | None = None
        self.folder = world.together(lambda: RunFolder(config, self.train_index, world))
        self._restore(self.folder.newest_checkpoint())
        self.saved_step = self.step

        self.phase: Phase | None = None
        self.engine: Engine
        self.loader: pipeline.Loader

    # --- the run ------------------------------------------------------------------------------

    def run(self) -> None:
        """Train and evaluate to the end.

        Raises:
            Stopped: A signal asked for it; all is saved.
            UserError: The loss is not finite, a file cannot be read, the disk is full, ...
        """
        with self.folder.tracker(self.step) as self.tracker, self._progress() as self.progress:
            try:
                while not self.finished:
                    if self._evaluation_due():
                        self._enter(phase_at(self.phases, self.step - 1))
                        self._evaluate()
                    else:
                        self._enter(phase_at(self.phases, self.step))
                        self._train_epoch()
            finally:
                self._leave()

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
            self.config, self.model, optimizer, self.num_micro_batches, self.world
        )
        # At the very start of a phase a checkpoint holds the optimiser of the one before.
        if self.optimizer_state is not None and self.step > phase.first_step:
            optimizer.load_state_dict(self.optimizer_state)
        self.optimizer_state = None
        epoch, step_in_epoch = divmod(self.step, self.steps_per_epoch)
        share = pipeline.Share(
            seed=self.config.seed,
            global_batch=self.config.batch.global_,
            micro_batch=self.config.batch.micro,
            rank=self.world.rank,
            world_size=self.world.world_size,
            epoch=epoch,
            step_in_epoch=step_in_epoch,
        )
        self.loader = train_loader(self.config, self.train_index, share, self.world)
        self.phase = phase

    def _leave(self) -> None:
        if self.phase is not None:
            self.loader.close()
            self.engine.close()
            self.phase = None

    # --- training -----------------------------------------------------------------------------

    def _train_epoch(self) -> None:
        """Train to the end of the epoch."""
        self.model.train()
        clock = _Clock()
        end = min((self.step // self.steps_per_epoch + 1) * self.steps_per_epoch, self.last_step)
        while self.step < end:
            lr, grad_norm = self._train_step(clock)
            self.progress.advance(self.config.batch.global_)
            if self.step % self.config.log_every == 0 or self.step == end:
                self._log_window(lr, float(grad_norm), clock)
            if self.stop.agreed():
                self._save()
                raise Stopped
            every = self.config.save.every_steps
            if self.step < end and every and self.step % every == 0:
                self._save()
        if not self._evaluation_due():
            self._save()

    def _train_step(self, clock: "_Clock") -> tuple[float, Tensor]:
        """One optimiser step. Returns its learning rate and the norm of its gradient."""
        assert self.phase is not None
        lr = self.phase.learning_rate(self.step)
        for _ in range(self.num_micro_batches):
            with clock.waiting():
                images, labels, _ = next(self.loader)
            images, labels = self._on_device(images), self._on_device(labels)
            logits = self.engine.forward(images)  # (T, B, K)
            loss = compute_loss(self.config.loss, logits, labels)
            self.engine.backward(loss)
            self._count(logits.detach(), labels, loss.detach())
        grad_norm, applied = self.engine.update(lr)
        normalization.update_running_statistics(self.model, self.world.mean_, applied)
        self.step += 1
        clock.samples += self.config.batch.global_
        # On a GPU the device is not asked at every step: a step whose gradient is not finite
        # changes nothing and leaves its mark in the sums, which are looked at before they are
        # logged or saved.
        self.window[LOSS] += torch.where(applied, 0.0, torch.nan)
        if self.world.device.type == "cpu" and not applied:
            self._end_non_finite(lr)
        return lr, grad_norm

    def _on_device(self, tensor: Tensor) -> Tensor:
        if tensor.device.type == "cpu" and self.world.device.type == "cuda":
            # From pinned memory the host need not wait for the copy.
            return tensor.pin_memory().to(self.world.device, non_blocking=True)
        return tensor.to(self.world.device)

    def _count(self, logits: Tensor, labels: Tensor, loss: Tensor) -> None:
        correct = (logits.mean(0).argmax(-1) == labels).sum()
        num_samples = len(labels)
        self.window[LOSS] += loss.double() * num_samples
        self.window[CORRECT] += correct
        self.window[SAMPLES] += num_samples

    def _window_sums(self) -> list[float]:
        """The sums over all processes, checked."""
        sums = self.world.sum(self.window.tolist())
        if sums[LOSS] != sums[LOSS]:
            assert self.phase is not None
            self._end_non_finite(self.phase.learning_rate(self.step - 1))
        return sums

    def _end_non_finite(self, lr: float) -> None:
        since = (self.step - 1) // self.config.log_every * self.config.log_every + 1
        at_once = self.world.device.type == "cpu"
        where = f"step {self.step}" if at_once else f"one of the steps {since} to {self.step}"
        saved = "no checkpoint has been saved yet"
        if self.saved_step:
            saved = f"the last good checkpoint is of step {self.saved_step}, in "
            saved += str(self.folder.checkpoints)

        def fail() -> None:
            raise UserError(
                f"the loss or its gradient is not finite at {where} (learning rate {lr:.4g}); that "
                f"step changed nothing, and {saved}. A smaller phases.*.optimizer.lr, a warm-up "
                "(phases.*.warmup_epochs) or gradient_clipping are the usual remedies"
            )

        self.world.together(fail)

    def _log_window(self, lr: float, grad_norm: float, clock: "_Clock") -> None:
        sums = self._window_sums()
        self.window.zero_()
        values: dict[str, Any] = {
            "epoch": round(self.step / self.steps_per_epoch, 6),
            "phase": self._phase_number(),
            "loss": sums[LOSS] / sums[SAMPLES],
            "top1": 100 * sums[CORRECT] / sums[SAMPLES],
            "lr": lr,
            "grad_norm": grad_norm,
            "samples_per_s": clock.samples / clock.seconds(),
            "data_wait": 100 * clock.waited / clock.seconds(),
        }
        self._log("train", values)
        self.progress.report_training(self.step, values)
        clock.restart()

    def _phase_number(self) -> int:
        assert self.phase is not None
        return self.phase.number

    # --- evaluation ---------------------------------------------------------------------------

    def _evaluate(self) -> None:
        """Evaluate and save; a stop in between leaves the evaluation to the continued run."""
        started = time.monotonic()
        try:
            with eval_loader(self.config, self.val_index, self.world) as batches:
                result = evaluate(
                    self.model,
                    batches,
                    len(self.val_index),
                    self.world,
                    bf16=self.config.precision == "bf16",
                    stop=self.stop.agreed,
                )
        except Interrupted:
            self._save()
            raise Stopped from None
        self.evaluated_step = self.step
        is_best = not self.result or result.top1 > self.result["best_top1"]
        if is_best:
            self.result |= {"best_top1": result.top1, "best_step": self.step}
        self.result["top1"] = result.top1
        values = {
            "epoch": round(self.step / self.steps_per_epoch, 6),
            "phase": self._phase_number(),
            "timesteps": result.timesteps,
            "samples": result.samples,
            "loss": result.loss,
            "top1": result.top1,
            "top5": result.top5,
            "best_top1": self.result["best_top1"],
            "per_timestep_top1": result.per_timestep_top1,
            "firing_rate": result.firing_rate,
            "seconds": time.monotonic() - started,
        }
        self._log("val", values)
        self.progress.report_evaluation(self.step, values)
        self._save(best=is_best, validation={"top1": result.top1, "top5": result.top5})
        if self.tracker:
            self._plot(self.tracker)

    def _plot(self, tracker: Tracker) -> None:
        plot = self.folder.path / "plots" / "learning_curves.png"
        try:
            plot.parent.mkdir(exist_ok=True)
            plots.learning_curves(tracker.path, plot)
        except (UserError, OSError) as error:
            # Training is worth more than its picture.
            logger.warning("no plot was made: %s", error)
            return
        tracker.artifact(plot)

    def _log(self, kind: str, values: dict[str, Any]) -> None:
        if self.tracker:
            self.tracker.log(kind, self.step, values)

    # --- state --------------------------------------------------------------------------------

    def _save(self, best: bool = False, validation: dict[str, float] | None = None) -> None:
        """Write a checkpoint, from rank 0."""
        state = {
            "step": self.step,
            "evaluated_step": self.evaluated_step,
            "result": self.result,
            "window": self._window_sums(),
            "world_size": self.world.world_size,
            "data": self.train_index.fingerprint,
        }
        described = self.config.as_dict()
        # So that it can be evaluated from another folder.
        described["data"]["root"] = str(Path(self.config.data.root).resolve())
        described["data"]["index"] = str(self.config.data.index_dir.resolve())
        description = {
            "config": described,
            "classes": list(self.train_index.classes),
            "timesteps": self.model.timesteps,
            "step": self.step,
            "validation": validation,
        }

        def write() -> None:
            if self.tracker:
                self.tracker.sync()
                path = checkpoint.save(
                    self.folder.checkpoints,
                    model=self.model,
                    optimizer=self.engine.optimizer,
                    description=description,
                    state=state,
                    keep_last=self.config.save.keep_last,
                    best=best,
                )
                self.tracker.set_tag(
                    "best_checkpoint" if best else "checkpoint", str(path.resolve())
                )

        self.world.together(write)
        self.saved_step = self.step

    def _restore(self, found: checkpoint.Checkpoint | None) -> None:
        if found is None:
            return
        checkpoint.load_weights(self.model, found.model, found.path)
        state = found.state
        if state["data"] != self.train_index.fingerprint:
            raise UserError(
                f"{found.path} was trained on other data than what {self.config.data.index_dir} "
                "now describes; restore the data, or give the run another name"
            )
        self.step, self.evaluated_step = state["step"], state["evaluated_step"]
        self.result, self.optimizer_state = state["result"], found.optimizer
        if self.world.rank == 0:
            self.window += torch.tensor(state["window"], dtype=torch.float64).to(self.window.device)
            if self.finished:
                logger.info("%s was trained before: nothing to do", self.folder.path)
            else:
                logger.info("continuing %s from step %d", self.folder.path, self.step)

    def _progress(self) -> Progress:
        return Progress(
            self.step,
            self.last_step,
            self.steps_per_epoch,
            self.config.batch.global_,
            silent=self.world.rank != 0,
        )

    tracker: Tracker | None
    progress: Progress


def compute_loss(section: LossSection, logits: Tensor, labels: Tensor) -> Tensor:
    """The configured loss of logits (T, B, K)."""
    if section.kind == "sdt":
        return losses.sdt_loss(logits, labels, label_smoothing=section.label_smoothing)
    return losses.tet_loss(
        logits,
        labels,
        regularization=section.lambda_,
        phi=section.phi,
        label_smoothing=section.label_smoothing,
    )


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
