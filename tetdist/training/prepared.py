"""A run before its first step: data opened, phases scheduled, network built."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from tetdist import order
from tetdist.config.checks import check_gpu
from tetdist.config.identity import differences
from tetdist.config.schema import RunConfig
from tetdist.data.splits import evaluated_split, open_data
from tetdist.datasets.index import Index
from tetdist.distributed.world import World
from tetdist.errors import UserError
from tetdist.models import SpikingNetwork
from tetdist.network import agree_on_looks_ahead, choose_kernels, make_model
from tetdist.nn import batch_norm, neurons
from tetdist.nn.fast import native_zeros
from tetdist.nn.precision import choose_algorithms, parameter_type
from tetdist.storage import checkpoint, selection
from tetdist.tracking.progress import RunProgress
from tetdist.training.schedule import Phase, image_timesteps, phase_at, schedule_phases
from tetdist.wording import counted

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Prepared:
    """Everything about a run that does not change between its steps.

    Attributes:
        model: The network, on its device; the same on all processes.
        phases: Phases with their optimiser steps.
        last_step, first_step: Steps at which the run ends, and begins unless it resumes.
        micro_batches: Numbers of this process's micro-batches, counted over all processes.
        data_split: Name of the evaluated split; see `evaluated_split`.
        resumes: True if the run has a checkpoint of its own, and needs no initial weights.
    """

    config: RunConfig
    world: World
    train: Index
    val: Index
    model: SpikingNetwork
    phases: list[Phase]
    steps_per_epoch: int
    last_step: int
    first_step: int
    micro_batches: Sequence[int]
    data_split: str | None
    resumes: bool

    def phase_at(self, step: int) -> Phase:
        return phase_at(self.phases, step)

    def learning_rate(self, step: int) -> float:
        """Return the learning rate of the update after ``step`` completed ones."""
        return self.phase_at(step).learning_rate(step)

    def where(self, step: int) -> dict[str, float]:
        """Return epoch and phase for a line of metrics after ``step`` steps."""
        return {
            "epoch": round(step / self.steps_per_epoch, 6),
            "phase": self.phase_at(step - 1).number,
        }

    def end_of_epoch(self, step: int) -> int:
        """Return the last step of the epoch that begins at or contains ``step``."""
        return min((step // self.steps_per_epoch + 1) * self.steps_per_epoch, self.last_step)

    def is_evaluated_at(self, step: int) -> bool:
        """Return whether the configuration asks for an evaluation after ``step`` steps."""
        epoch, step_in_epoch = divmod(step, self.steps_per_epoch)
        due = step_in_epoch == 0 and epoch % self.config.evaluate_every == 0
        return due or step == self.last_step

    def decide_looks_ahead(self) -> None:
        """Check a user's network again, with its present weights, if that is not decided."""
        if not self.config.model.is_own or self.model.looks_ahead is not None:
            return
        state = self.model.state_dict()
        with self.world.together(), torch.random.fork_rng(devices=[]):
            copy = make_model(self.config, self.train, lambda copy: copy.load_state_dict(state))
        self.model.looks_ahead = copy.looks_ahead
        agree_on_looks_ahead(self.model, self.world)

    @property
    def skips_zeros(self) -> bool:
        """True if convolutions of spikes skip zeros in training (nn/fast/native_zeros.py)."""
        if self.world.device.type != "cpu" or self.config.execution != "fused":
            return False
        return self.config.precision in ("fp32", "tf32") and torch.float32 in native_zeros.types()

    def progress(self, step: int) -> RunProgress:
        """Return the progress display of rank 0 from ``step`` on; others show nothing."""
        return RunProgress(
            step,
            self.last_step,
            self.steps_per_epoch,
            self.config.batch.global_,
            work=partial(image_timesteps, self.phases, global_batch=self.config.batch.global_),
            phases=len(self.config.phases),
            settle=self.world.wait_for_device,
            silent=self.world.rank != 0,
        )


def prepare(config: RunConfig, world: World) -> Prepared:
    """Open data and build the model, on every process."""
    with world.together():
        prepared = _prepare(config, world)
    if config.model.is_own:
        agree_on_looks_ahead(prepared.model, world)
    if config.execution == "fused":
        with world.together():
            choose_kernels(world)
    return prepared


def _prepare(config: RunConfig, world: World) -> Prepared:
    if world.device.type == "cpu":
        check_gpu(config)
    train, val = open_data(config, world)
    data_split = evaluated_split(config.data, config.seed)
    bins, seen = train.timesteps or 0, max(phase.most_timesteps for phase in config.phases)
    if bins > seen and world.rank == 0:
        way = f"set phases.{len(config.phases) - 1}.timesteps={bins} to see all"
        logger.warning("training sees the first %d of the data's %d time bins; %s", seen, bins, way)
    batch = config.batch
    steps_per_epoch = order.steps_per_epoch(len(train), batch.global_)
    phases = schedule_phases(config.phases, steps_per_epoch, batch.global_)
    end = phases[-1].end_step
    last_step, first_step = min(end, config.max_steps or end), phases[config.start_phase].first_step
    if last_step <= first_step:
        raise UserError(
            f"max_steps={config.max_steps} ends the run before phase {config.start_phase} begins, "
            f"after step {first_step}; raise it: max_steps counts from the first phase"
        )
    if config.profile is not None and config.profile[0] > last_step:
        raise UserError(
            f"profile: step {config.profile[0]:,} comes after the run's last step, {last_step:,}; "
            "choose earlier steps"
        )
    torch.manual_seed(config.seed)
    choose_algorithms(config.precision, deterministic=config.deterministic)
    resumes = selection.last(config.run_dir / "checkpoints") is not None
    source = None if resumes else config.init_checkpoint
    load = partial(_load_initial_weights, config, train, world, source) if source else None
    model = make_model(config, train, load)
    model.to(world.device, parameter_type(config.precision))
    batch_norm.defer_running_statistics(model)
    if config.batch_norm.sync and world.world_size > 1:
        batch_norm.synchronize(model, world.mean_, world.world_size)
    micro_batches = order.rank_micro_batches(
        world.rank, world.world_size, batch.global_, batch.micro
    )
    return Prepared(
        config,
        world,
        train,
        val,
        model,
        phases,
        steps_per_epoch,
        last_step,
        first_step,
        micro_batches,
        data_split,
        resumes,
    )


def _load_initial_weights(
    config: RunConfig, index: Index, world: World, source: str, model: SpikingNetwork
) -> None:
    """Load the weights that ``init_checkpoint`` names; rank 0 logs them."""
    weights, description = checkpoint.load_model_file(Path(source))
    classes = description.config["model"].get("num_classes") or len(description.classes or ())
    # As in timm, a classifier of other classes starts anew: it has one row a class.
    anew = {
        key: own
        for key, own in model.state_dict().items()
        if own.shape[:1] == (model.num_classes,) != (classes,)
        and weights.get(key, own).shape == (classes, *own.shape[1:])
    }
    checkpoint.load_weights(model, weights | anew, Path(source))
    if world.rank != 0:
        return
    source_model, own_model = description.config["model"], config.as_dict()["model"]
    source_model = source_model | {"neuron": neurons.completed(source_model.get("neuron", {}))}
    for change in differences({"model": source_model}, {"model": own_model}):
        if not change.startswith(("model.num_classes", "model.freeze")):
            logger.warning("init_checkpoint comes from another network: %s", change)
    if anew:
        change = f"{counted(model.num_classes, 'class')} instead of {classes}"
        logger.info("starting anew, for %s: %s", change, ", ".join(anew))
    elif description.classes not in (None, list(index.classes)):
        logger.warning("init_checkpoint was trained on other classes than those of the data")
    logger.info(
        "beginning with the weights of %s (step %s, T=%s)",
        source,
        description.step,
        description.timesteps,
    )
