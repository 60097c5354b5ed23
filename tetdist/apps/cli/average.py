"""Average the weights of several trained networks, and recompute the running statistics.

They are recomputed over training samples, augmented as in training. The command also runs on
several processes, under the deepspeed launcher or torchrun.
"""

import argparse
import logging
from pathlib import Path

from tetdist.apps.cli.common import (
    CHECKPOINT,
    add_evaluation,
    check_new_weights,
    program,
    run_command,
)
from tetdist.apps.cli.eval import HANGS_AFTER, evaluation_config
from tetdist.config.flags import positive


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog=program("average"), description="Average the weights of several trained networks."
    )
    add = parser.add_argument
    add(
        "sources",
        nargs="+",
        metavar="RUN_OR_FILE",
        type=Path,
        help=f"{CHECKPOINT}; all of one network. With only one, just its running statistics are "
        "recomputed",
    )
    add("--output", required=True, metavar="FILE.safetensors", type=Path)
    add("--best", action="store_true", help="use the best checkpoints of run folders")
    add("--ema", action="store_true", help="use the moving averages of the weights")
    add("--data", metavar="ROOT", help="folder that holds train/; default: the first network's")
    add("--index", metavar="DIR", help="folder of the index; default: ROOT/index")
    add(
        "--samples",
        type=positive,
        metavar="N",
        help="number of training samples for the running statistics, in whole global batches "
        "(default: one epoch)",
    )
    add(
        "--timesteps",
        type=positive,
        metavar="T",
        help="T of the running statistics and of the written network (default: the training's)",
    )
    add_evaluation(parser)
    options = parser.parse_args(arguments)
    if options.output.suffix != ".safetensors":
        parser.error(f"--output must end in .safetensors, unlike {options.output}")
    # evaluation_config also reads these.
    options.checkpoint, options.batch, options.variant = options.sources[0], None, None
    return options


def main(arguments: list[str] | None = None) -> int:
    options = parse_arguments(arguments)
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    return run_command(lambda: average(options))


def average(options: argparse.Namespace, *, silent: bool = False) -> None:
    from tetdist import plugins
    from tetdist.apps.file_progress import file_progress
    from tetdist.apps.weights.average import mean_weights, open_training_split, recompute_statistics
    from tetdist.distributed.watchdog import Watch
    from tetdist.distributed.world import join
    from tetdist.storage import checkpoint
    from tetdist.training.setup import load_model

    with (
        join(options.device, run=vars(options) | {"local_rank": None}) as world,
        Watch(world, HANGS_AFTER, after="nothing was written") as watch,
    ):
        world.run_on_all(lambda: check_new_weights(options.output))
        world.run_on_all(lambda: plugins.import_files(options.imports))
        which = "best" if options.best else "last"
        weights, description = world.run_on_all(
            lambda: mean_weights(options.sources, which, ema=options.ema)
        )
        config = world.run_on_all(lambda: evaluation_config(description.config, options))
        source = options.checkpoint
        index = world.run_on_all(
            lambda: open_training_split(config, description.classes, source, world)
        )
        model = load_model(config, index, weights, source, world)
        timesteps = options.timesteps or description.timesteps
        world.run_on_all(lambda: model.set_timesteps(timesteps))
        with file_progress("running statistics", "sample") as show:
            given = (config, index, world, options.samples, show, watch.progress)
            statistics = recompute_statistics(model, *given)
        # Weights keep the mean's values, even if the model computed in another type.
        for key, value in model.state_dict().items():
            if key.rpartition(".")[2] in ("running_mean", "running_var"):
                weights[key] = value.to("cpu", weights[key].dtype)
        averaged = "; ".join(filter(None, [description.averaged, statistics]))
        changed = description.model_copy(update={"timesteps": timesteps, "averaged": averaged})

        def write() -> None:
            if world.rank == 0:
                checkpoint.write_model_file(options.output, weights, changed)
                if not silent:
                    print(f"wrote {options.output}: {averaged}")

        world.run_on_all(write)
