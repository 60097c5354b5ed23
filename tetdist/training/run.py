"""One process's part of a run: join the others, train, report how it ended."""

from tetdist.config.identity import of_all_hosts
from tetdist.config.schema import RunConfig
from tetdist.distributed.signals import StopRequest
from tetdist.distributed.watchdog import Watch
from tetdist.distributed.world import join
from tetdist.errors import PeerFailed, Stopped
from tetdist.plugins import explained, own_frames
from tetdist.training.observers import MakeObservers
from tetdist.training.run_record import Launcher
from tetdist.training.trainer import Trainer


def train(
    config: RunConfig,
    make_observers: MakeObservers,
    launcher: Launcher | None = None,
) -> int:
    """Run this process's part of the training.

    Args:
        make_observers: Makes the run's observers, on rank 0.
        launcher: Program that started the run; None for a person's command.

    Returns:
        Exit status: 0 finished, 3 another process of the run died or hangs, 128 + n stopped by
        signal n.

    Raises:
        PeerFailed: Another process died before the training began.
    """
    # With a launcher, the watch prints no errors: the launcher does.
    shows_errors, launcher = launcher is None, launcher or Launcher()
    on_failure, shared = launcher.on_failure, of_all_hosts(config)
    try:
        with (
            join(config.device, config.peer_timeout, config.run_dir, shared) as world,
            StopRequest(world) as stop,
            Watch(
                world,
                config.peer_timeout,
                shows_errors=shows_errors,
                folder=config.run_dir / "hang",
            ) as watch,
        ):
            watch.before_end.append(lambda verdict: on_failure(PeerFailed(verdict)))
            try:
                trainer = Trainer(config, world, stop, watch)
                with trainer.folder:
                    trainer.run(launcher, make_observers)
            except Stopped:
                stop.is_over = True
                return stop.exit_status
            except Exception as error:
                if not watch.shows_errors:
                    # The name of the lost process is more helpful than the broken connection to it.
                    watch.await_verdict(error)
                on_failure(error)
                # With several processes, the watch names another process's failure.
                is_own = shows_errors and (world.world_size == 1 or own_frames(error))
                if is_own and (mistake := explained(error, config.run_dir)) is not error:
                    raise mistake from error
                raise
            return 0
    except PeerFailed as error:
        on_failure(error)
        raise
