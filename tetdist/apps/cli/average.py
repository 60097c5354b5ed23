"""Average the weights of several trained networks, with running statistics of the mean's own.

    python tools/average.py runs/sew34_t4/checkpoints/step-* --output mean.safetensors
    python tools/average.py runs/a runs/b --data /data/imagenet --output mean.safetensors
    python tools/eval.py --checkpoint mean.safetensors

The running statistics are computed anew over training samples, augmented as in training. It also
runs on several processes, under the deepspeed launcher or torchrun.
"""

import argparse
import logging
from pathlib import Path

from tetdist.apps.cli.common import answer, check_new_weights, program
from tetdist.apps.cli.eval import HANGS_AFTER, evaluation_config
from tetdist.config.flags import add_import, positive
from tetdist.wording import counted


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
        help="run folders (their last checkpoints), folders of checkpoints or exports, or "
        ".safetensors files, of one network; of a single one only the running statistics are new",
    )
    add("--output", required=True, metavar="FILE.safetensors", type=Path)
    add("--best", action="store_true", help="of run folders, the best checkpoints")
    add("--ema", action="store_true", help="the moving averages of the weights")
    add("--data", metavar="ROOT", help="folder of train/; default: as in the first one's training")
    add("--index", metavar="DIR", help="folder of the index; default: ROOT/index")
    add(
        "--samples",
        type=positive,
        metavar="N",
        help="training samples for the running statistics, in whole batches of an optimiser step "
        "(default: an epoch)",
    )
    add("--threads", type=positive, metavar="N", help="threads that decode")
    add("--precision", choices=["bf16", "fp32", "tf32", "fp16", "fp64"])
    add("--execution", choices=["fused", "reference"], help="default: fused")
    add("--device", choices=["auto", "cpu", "cuda"], default="auto")
    add_import(parser)
    # The deepspeed launcher adds it; the environment says the same.
    add("--local_rank", "--local-rank", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.output.suffix != ".safetensors":
        parser.error("--output must end in .safetensors")
    # What evaluation_config reads besides.
    options.checkpoint, options.batch, options.variant = options.sources[0], None, None
    return options


def main(arguments: list[str] | None = None) -> int:
    options = parse_arguments(arguments)
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    return answer(lambda: average(options))


def average(options: argparse.Namespace) -> None:
    from tetdist import plugins
    from tetdist.apps.weights.average import mean_weights, recompute_statistics
    from tetdist.distributed.watchdog import Watch
    from tetdist.distributed.world import join
    from tetdist.evaluation.variants import with_classes_of_model
    from tetdist.nn.batch_norm import has_running_statistics
    from tetdist.order import steps_per_epoch
    from tetdist.storage import checkpoint
    from tetdist.tracking.progress import FileProgress
    from tetdist.training.setup import load_model, open_split

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
        data = world.run_on_all(lambda: open_split(config, "train", world))
        known, source = config.model.num_classes, str(options.checkpoint)
        index = world.run_on_all(
            lambda: with_classes_of_model(data, description.classes, known, source)
        )
        epoch = world.run_on_all(lambda: steps_per_epoch(len(index), config.batch.global_))
        model = load_model(config, index, weights, options.checkpoint, world)
        said = "it has no running statistics"
        if has_running_statistics(model):
            model.set_timesteps(description.timesteps)
            with FileProgress() as shown:
                tell = shown.titled("running statistics", "sample")

                def progress(done: int, total: int) -> None:
                    watch.progress("the running statistics")
                    if world.rank == 0:
                        tell(done, total)

                taken = recompute_statistics(
                    model,
                    config,
                    index,
                    world,
                    options.samples or epoch * config.batch.global_,
                    progress,
                )
            said = f"its running statistics are of {counted(taken, 'training sample')}"
            # The weights themselves stay those of the mean, also where another type computed.
            for key, value in model.state_dict().items():
                if key.rpartition(".")[2] in ("running_mean", "running_var"):
                    weights[key] = value.to("cpu", weights[key].dtype)

        def write() -> None:
            if world.rank == 0:
                checkpoint.write_model_file(options.output, weights, description)
                print(f"wrote {options.output}: {description.averaged}; {said}")

        world.run_on_all(write)
