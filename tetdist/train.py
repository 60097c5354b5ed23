"""Train a spiking network.

    deepspeed tetdist/train.py --config sew34_t4.yaml data.root=/data/imagenet
    python tetdist/train.py --config quickstart.yaml        (one process)

The same command continues a run that was stopped.
"""

import argparse
import logging
import os
import sys
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

# Run as a file, Python looks for modules beside this one first, where names such as config and
# data would hide other packages' modules; and a launcher may start it where tetdist is not
# installed.
if sys.path and Path(sys.path[0]).resolve() == Path(__file__).resolve().parent:
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

# Threads that spin while they wait for each other take the cores from those that decode images; on
# a busy machine that cost a factor of three. It must be said before torch is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
# When a process has died, torch prints a C++ stack of each that notices; watch.py says which.
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")

if TYPE_CHECKING:
    from tetdist.config.schema import RunConfig


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="tetdist/train.py",
        description="Train a spiking network. The same command continues a stopped run.",
        epilog="examples: deepspeed tetdist/train.py --config sew34_t4.yaml data.root=/imagenet"
        "   |   python tetdist/train.py --config quickstart.yaml seed=1 name=second",
    )
    parser.add_argument(
        "--config", metavar="NAME", help="a YAML file, or the name of one in configs/"
    )
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="key=value",
        help="override a key of the configuration: seed=1, phases.0.epochs=2, data.root=...",
    )
    parser.add_argument(
        "--print-config",
        action="store_true",
        help="show the resolved configuration, with all defaults, and stop",
    )
    parser.add_argument(
        "--explain", action="store_true", help="list every key of a configuration, and stop"
    )
    # The deepspeed launcher adds it; the environment says the same.
    parser.add_argument("--local_rank", "--local-rank", help=argparse.SUPPRESS)
    options = parser.parse_intermixed_args(arguments)
    if not options.config and not options.explain:
        parser.error("--config is missing: a YAML file, or the name of one in configs/")
    return options


def main(arguments: list[str] | None = None) -> int:
    """Exit status: 0 finished, 2 a mistake of the user's, 3 another process of the run died or
    hangs, 128 + n stopped by signal n."""
    options = parse_arguments(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    rank = os.environ.get("RANK", "0")
    if rank != "0":
        logging.getLogger().setLevel(logging.ERROR)
    try:
        from tetdist.errors import UserError
    except ModuleNotFoundError as error:
        return fail(error) if rank == "0" else 2
    except KeyboardInterrupt:
        return 130
    try:
        config = read_config(options)
    except (UserError, ModuleNotFoundError) as error:
        # All processes make this mistake; one says it.
        return fail(error) if rank == "0" else 2
    if config is None:
        return 0
    try:
        return train(config)
    except (UserError, ModuleNotFoundError) as error:
        return fail(error, "" if rank == "0" else f"rank {rank}: ")
    except KeyboardInterrupt:
        # Before the run began, or for the second time.
        print("interrupted; what was saved before is there", file=sys.stderr)
        return 130


def fail(error: Exception, prefix: str = "") -> int:
    text = str(error)
    if isinstance(error, ModuleNotFoundError):
        text = (
            f"the package {error.name} is not installed; "
            "pip install 'tetdist[train,cuda130]' installs all that training needs"
        )
    print(f"{prefix}error: {text}", file=sys.stderr)
    return 2


def read_config(options: argparse.Namespace) -> "RunConfig | None":
    """The configuration; None where showing it was all that was asked for."""
    from tetdist.config import schema as configuration

    if options.explain:
        for key, text in configuration.schema().items():
            print(f"{key:32} {' '.join(text.split())}".rstrip())
        return None
    config = configuration.load(options.config, options.overrides)
    if options.print_config:
        print(config.as_yaml(), end="")
        return None
    return config


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


def train(config: "RunConfig", launcher: Launcher | None = None) -> int:
    """This process's part of the run; exit status as of `main`."""
    from tetdist.distributed.watchdog import PeerFailed, Watch
    from tetdist.distributed.world import StopRequest, join
    from tetdist.errors import Stopped
    from tetdist.training.trainer import Trainer

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
        trainer.folder.farewell(trainer.result)
    return 0


if __name__ == "__main__":
    sys.exit(main())
