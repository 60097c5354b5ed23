"""Sums and timing between two lines of training metrics."""

import logging
import math
import platform
import time
from typing import Any

import torch
from torch import Tensor

from tetdist.distributed.world import World
from tetdist.training.engines.base import LossScale, Update
from tetdist.training.health import NonFiniteSteps
from tetdist.training.step import CORRECT, LOSS, SAMPLES
from tetdist.training.stragglers import RankTimes, Stragglers, compared
from tetdist.wording import counted

logger = logging.getLogger(__name__)


class Window:
    """Sums and timing of the steps since the last line of metrics.

    Attributes:
        sums: This process's LOSS, CORRECT and SAMPLES, (3,), on the device; float64, so that a stop
            in between does not change the result.
        non_finite: Skipped steps.
    """

    def __init__(self, global_batch: int, world: World) -> None:
        self._world, self._global_batch = world, global_batch
        self._hosts = world.gather(platform.node())
        self.sums = torch.zeros(3, dtype=torch.float64, device=world.device)
        self.non_finite = NonFiniteSteps(world.device)
        self._stragglers = Stragglers()
        self.restart(0.0)

    def restart(self, waited: float) -> None:
        """Restart the clock; ``waited`` is `Feed.waited` now."""
        self._started, self._waited_before = time.monotonic(), waited
        self._steps = self._timesteps = 0

    def add(self, step: int, update: Update, sums: Tensor, timesteps: int) -> None:
        """Add a step (from 1) and its T, without synchronising with a GPU.

        A step without a finite gradient changed nothing, and its sums are left out.
        """
        self.sums += torch.where(update.applied, sums, 0.0)
        self.non_finite.record(step, update.applied)
        self._step = step
        self._steps += 1
        self._timesteps += timesteps

    def restore(self, total: list[float], non_finite: dict[str, int]) -> None:
        """Continue from a checkpoint's sums, which rank 0 keeps for all processes."""
        self.non_finite.load_state_dict(non_finite)
        if self._world.rank == 0:
            self.sums += torch.tensor(total, dtype=torch.float64).to(self.sums.device)

    def close(self, waited: float, scale: LossScale | None) -> dict[str, Any]:
        """Return the metrics over all processes; the next window begins with `restart`.

        Args:
            waited: `Feed.waited` now.
            scale: The engine's.
        """
        sums = self.sums.tolist()  # this waits for the device
        steps = max(self._steps, 1)
        own = time.monotonic() - self._started - self._world.waiting.take()
        data = waited - self._waited_before
        gathered = self._world.gather_numbers([*sums, own / steps, data / steps])
        ranks = [RankTimes(host, *of[3:]) for host, of in zip(self._hosts, gathered, strict=True)]
        if self._world.rank == 0:
            for straggler in self._stragglers.new(ranks):
                logger.warning("%s", straggler)
        loss, correct, samples = map(math.fsum, list(zip(*gathered, strict=True))[:3])
        if self._world.rank == 0 and not math.isfinite(loss):  # skipped steps count as 0
            logger.warning("the loss is %s though its gradient is finite; correct loss.kind", loss)
        skipped = self.non_finite.new()
        if self._world.rank == 0 and skipped:
            text = "step %d: %s since the last line had no finite gradient and changed nothing"
            logger.warning(text, self._step, counted(skipped, "step"))
        seconds = max(time.monotonic() - self._started, 1e-9)
        values: dict[str, Any] = {
            "loss": loss / samples if samples else math.nan,
            "top1": 100 * correct / samples if samples else math.nan,
            "non_finite_steps": skipped,
            "samples_per_s": self._steps * self._global_batch / seconds,
            "image_timesteps_per_s": self._timesteps * self._global_batch / seconds,
            **compared(ranks, seconds / steps),
        }
        device = self._world.device
        if device.type == "cuda":
            values["peak_memory"] = torch.cuda.max_memory_allocated(device) / 2**30
        if scale is not None:
            values |= {"loss_scale": scale.value, "overflows": scale.overflows}
        self.sums.zero_()
        return values

    def total(self) -> list[float]:
        """Return LOSS, CORRECT and SAMPLES over all processes."""
        assert (LOSS, CORRECT, SAMPLES) == (0, 1, 2)
        return self._world.sum(self.sums.tolist())
