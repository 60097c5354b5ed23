"""One process's part of a run: join the others, train, say how it ended."""

import logging
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field

from tetdist.config.schema import RunConfig
from tetdist.distributed.signals import StopRequest
from tetdist.distributed.watchdog import PeerFailed, Watch
from tetdist.distributed.world import join
from tetdist.errors import Stopped
from tetdist.training.trainer import Trainer


@dataclass(frozen=True)
class Launcher:
    """What a program that starts a run, and starts it again, has to do with it.

    Attributes:
        tags: Further tags for MLflow.
        goes_on_after: Signals after which the run is started again: meanwhile MLflow shows it as
            running.
        on_failure: Told what a process raises, before the other processes lose it and raise, too.
    """

    tags: Mapping[str, str] = field(default_factory=dict)
    goes_on_after: Collection[int] = ()
    on_failure: Callable[[Exception], None] = lambda _: None


def train(config: RunConfig, launcher: Launcher | None = None) -> int:
    """Do this process's part of the run.

    Returns:
        Its exit status: 0 finished, 3 another process of the run died or hangs, 128 + n stopped by
        signal n.
    """
    tasks = launcher or Launcher()
    with (
        join(config.device, config.peer_timeout) as world,
        StopRequest(world) as stop,
        # A launcher has its own way to show what one process raises.
        Watch(world, config.peer_timeout, shows_errors=launcher is None) as watch,
    ):
        watch.before_end.append(lambda verdict: tasks.on_failure(PeerFailed(verdict)))
        try:
            trainer = Trainer(config, world, stop, watch)
            trainer.folder.launcher_tags = tasks.tags
            trainer.folder.goes_on = lambda: stop.exit_status - 128 in tasks.goes_on_after
            trainer.run()
        except Stopped:
            logging.info("stopped at step %d, all saved; the same command continues", trainer.step)
            return stop.exit_status
        except Exception as error:
            tasks.on_failure(error)
            raise
        trainer.folder.log_summary(trainer.result)
    return 0
