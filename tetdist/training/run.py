"""One process's part of a run: join the others, train, say how it ended."""

import logging

from tetdist.config.identity import of_all_hosts
from tetdist.config.schema import RunConfig
from tetdist.distributed.signals import StopRequest
from tetdist.distributed.watchdog import Watch
from tetdist.distributed.world import World, join
from tetdist.errors import PeerFailed, Stopped
from tetdist.training.run_summary import Launcher
from tetdist.training.trainer import Trainer


def train(config: RunConfig, launcher: Launcher | None = None) -> int:
    """Do this process's part of the run.

    Returns:
        Its exit status: 0 finished, 3 another process of the run died or hangs, 128 + n stopped by
        signal n.

    Raises:
        PeerFailed: Another process died before the training began.
    """
    # A launcher has its own way to show what one process raises.
    shows_errors, launcher = launcher is None, launcher or Launcher()
    on_failure = launcher.on_failure
    try:
        with (
            join(config.device, config.peer_timeout, config.run_dir, of_all_hosts(config)) as world,
            StopRequest(world) as stop,
            Watch(world, config.peer_timeout, shows_errors=shows_errors) as watch,
        ):
            watch.before_end.append(lambda verdict: on_failure(PeerFailed(verdict)))
            return _train(config, launcher, world, stop, watch)
    except PeerFailed as error:
        on_failure(error)
        raise


def _train(
    config: RunConfig, launcher: Launcher, world: World, stop: StopRequest, watch: Watch
) -> int:
    try:
        trainer = Trainer(config, world, stop, watch, launcher)
        trainer.run()
    except Stopped:
        logging.info("stopped at step %d, all saved; the same command continues", trainer.step)
        return stop.exit_status
    except Exception as error:
        if not watch.shows_errors:
            # Which process is gone says more than the connection to it that broke here.
            watch.await_verdict(error)
        launcher.on_failure(error)
        raise
    return 0
