"""The state of a run in its checkpoints, and its resumption from them."""

import logging
from dataclasses import dataclass, fields
from pathlib import Path

from tetdist.errors import UserError
from tetdist.storage import checkpoint
from tetdist.training.ema import WeightAverage
from tetdist.training.prepared import Prepared
from tetdist.training.teacher import Teacher

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class RunState:
    """Trainer state stored in a checkpoint besides the model and optimiser."""

    step: int  # optimiser steps done
    evaluated_step: int  # step of the last evaluation
    result: dict[str, float]  # of the last evaluation, and the best one so far
    window: list[float]  # sums over all processes since the last line of metrics
    non_finite: dict[str, int]  # see `NonFiniteSteps`
    loss_scale: dict[str, float] | None  # see `LossScale`
    world_size: int
    data: str  # the index's fingerprint
    teacher: str | None  # the teacher's fingerprint
    looks_ahead: bool | None = None  # see `check_network`
    skips_zeros: bool | None = None  # whether convolutions of spikes skip zeros


def restore(saved: checkpoint.Checkpoint, run: Prepared, average: WeightAverage | None) -> RunState:
    """Restore a checkpoint's weights and their average; return the state.

    Raises:
        UserError: The run cannot continue from it.
    """
    names = [field.name for field in fields(RunState)]
    state = RunState(**{name: saved.state[name] for name in names if name in saved.state})
    if state.looks_ahead is not None:
        run.model.looks_ahead = state.looks_ahead
    checkpoint.load_weights(run.model, saved.model, saved.path)
    if average is not None:
        if saved.average is None:
            raise UserError(
                f"ema.decay: {saved.path} has no moving average to continue from; set another "
                "name=..., or ema.decay=null"
            )
        file = saved.path / checkpoint.EMA_FILE
        checkpoint.check_weights(average.state_dict(), saved.average, file)
        average.load_state_dict(saved.average)
    if state.data != run.train.fingerprint:
        raise UserError(
            f"{saved.path} was trained on other data than {run.config.data.index_dir} now "
            "describes; restore that data, or set another name=..."
        )
    if run.config.batch_norm.sync and state.world_size != run.world.world_size:
        raise UserError(
            f"batch_norm.sync normalises over all processes, and {saved.path} was trained on "
            f"{state.world_size} of them, not {run.world.world_size}; start as many"
        )
    if state.skips_zeros not in (None, run.skips_zeros) and run.world.rank == 0:
        then, now = (
            ("skipped zeros", "do not") if state.skips_zeros else ("did not skip zeros", "do")
        )
        logger.warning(
            "before, convolutions of spikes %s, and here they %s: another processor, or no "
            "compiler; rounding differs, so results may differ from those of a run in one place",
            *(then, now),
        )
    return state


def teacher_again(state: RunState, path: Path, run: Prepared) -> Teacher | None:
    """Load the teacher of a resumed run, if it has one.

    Raises:
        UserError: The teacher has changed since the checkpoint at ``path`` was written.
    """
    teacher = Teacher.of(run.config, run.train, run.world.device)
    if teacher is not None and state.teacher != teacher.fingerprint:
        raise UserError(
            f"loss.distillation.teacher: {path} learned from another network than "
            f"{run.config.loss.distillation.teacher} now is; restore that, or set another name=..."
        )
    return teacher
