"""Evaluate a checkpoint: exact accuracy at any number of timesteps, firing rates.

    python tools/eval.py --checkpoint runs/sew34_t4
    python tools/eval.py --checkpoint model.safetensors --data /data/imagenet --timesteps 1,2,4

Needs neither DeepSpeed nor the machine that trained. Also runs on several processes, under the
deepspeed launcher or torchrun.
"""

import argparse
import dataclasses
import json
import logging
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

# See tetdist/train.py: threads that spin while they wait take the cores from those that decode.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

HANGS_AFTER = 600  # seconds without progress of one of several processes

if TYPE_CHECKING:
    from tetdist.config import RunConfig
    from tetdist.evaluate import Evaluation


def timesteps_list(text: str) -> list[int]:
    try:
        values = [int(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list such as 1,2,4") from None
    if min(values) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: the least is 1")
    return sorted(set(values))


def positive(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0")
    return int(text)


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="tools/eval.py", description="Evaluate a checkpoint.")
    parser.add_argument(
        "--checkpoint",
        required=True,
        metavar="RUN_OR_FILE",
        type=Path,
        help="a run folder (its last checkpoint), a checkpoint folder, or a .safetensors file",
    )
    parser.add_argument(
        "--best",
        action="store_true",
        help="of a run folder, the best checkpoint, which was chosen on this very split",
    )
    parser.add_argument("--data", metavar="ROOT", help="folder of val/; default: as in training")
    parser.add_argument("--index", metavar="DIR", help="folder of the index; default: ROOT/index")
    parser.add_argument("--split", default="val", help="split to evaluate (default: val)")
    parser.add_argument(
        "--timesteps",
        type=timesteps_list,
        metavar="1,2,4",
        help="numbers of timesteps to report (default: 1 to that of the training)",
    )
    parser.add_argument("--batch", type=positive, metavar="N", help="samples of one forward pass")
    parser.add_argument("--threads", type=positive, metavar="N", help="threads that decode")
    parser.add_argument("--precision", choices=["bf16", "fp32", "fp16", "fp64"])
    parser.add_argument("--execution", choices=["fused", "reference"], help="default: fused")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    parser.add_argument("--json", metavar="FILE", type=Path, help="write the result there, too")
    # The deepspeed launcher adds it; the environment says the same.
    parser.add_argument("--local_rank", "--local-rank", help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    options = parse_arguments(arguments)
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    try:
        from tetdist.errors import UserError
    except ModuleNotFoundError as error:
        return fail(f"the package {error.name} is not installed; pip install 'tetdist[train]'")
    try:
        return evaluate_checkpoint(options)
    except UserError as error:
        return fail(str(error))
    except ModuleNotFoundError as error:
        return fail(f"the package {error.name} is not installed; pip install 'tetdist[train]'")
    except KeyboardInterrupt:
        return fail("interrupted; nothing was written", 130)


def fail(text: str, status: int = 2) -> int:
    print(f"error: {text}", file=sys.stderr)
    return status


def evaluate_checkpoint(options: argparse.Namespace) -> int:
    from tetdist import checkpoint
    from tetdist.data.loaders import eval_loader
    from tetdist.data.splits import recorded_split
    from tetdist.distributed import join
    from tetdist.evaluate import evaluate
    from tetdist.precision import parameter_type
    from tetdist.progress import sample_bar
    from tetdist.run import make_model, open_split
    from tetdist.watch import Watch

    with join(options.device) as world, Watch(world, HANGS_AFTER) as watch:
        weights, description = world.together(
            lambda: checkpoint.load_model_file(
                options.checkpoint, "best" if options.best else "last"
            )
        )
        config = world.together(lambda: evaluation_config(description["config"], options))
        index = world.together(lambda: open_split(config, options.split, world))
        world.together(
            lambda: check_classes(description["classes"], config, index.classes, options)
        )
        model = world.together(lambda: make_model(config, index))
        model.to(world.device, parameter_type(config.precision))
        world.together(lambda: checkpoint.load_weights(model, weights, options.checkpoint))
        trained_timesteps = description["timesteps"]
        wanted = options.timesteps or list(range(1, trained_timesteps + 1))
        if index.timesteps is not None and wanted[-1] > index.timesteps:
            return fail(f"--timesteps: the data has {index.timesteps} time bins, not {wanted[-1]}")
        # The network is causal and at rest when a sample begins, so that one pass at the largest
        # T also gives the result at all smaller ones.
        model.set_timesteps(wanted[-1])
        bar = sample_bar(len(index), "evaluate", silent=world.rank != 0)

        def progress(count: int) -> None:
            bar.update(count * world.world_size)
            watch.progress("the evaluation")

        with bar, eval_loader(config, index, world) as batches:
            result = evaluate(
                model,
                batches,
                len(index),
                world,
                precision=config.precision,
                progress=progress,
            )
        if world.rank == 0:
            data_split = recorded_split(config.data.root)
            print(table(result, wanted, options, description, data_split))
            if options.json:
                write_json(options.json, result, wanted, options, description, data_split)
    return 0


def evaluation_config(raw: dict[str, Any], options: argparse.Namespace) -> "RunConfig":
    """The training's configuration with the command line's changes."""
    from tetdist.config import parse

    data = dict(raw["data"])
    if options.data:
        data |= {"root": options.data, "index": None}
    if options.index:
        data["index"] = options.index
    if options.threads:
        data["threads"] = options.threads
    data["device"] = "cpu"
    changed = {
        **raw,
        "data": data,
        # What only training knows of.
        "checkpoint": "none",
        "engine": "torch",
        "zero_stage": 0,
        "batch_norm": {"sync": False},
        "execution": options.execution or "fused",
        "precision": options.precision or raw["precision"],
    }
    if options.batch:
        changed["batch"] = {**raw["batch"], "eval": options.batch}
    return parse(changed, str(options.checkpoint), warn=False)


def check_classes(
    trained: list[str] | None,
    config: "RunConfig",
    present: tuple[str, ...],
    options: argparse.Namespace,
) -> None:
    from tetdist.errors import UserError

    if trained is None:
        # Converted from a file that does not name them.
        if config.model.num_classes != len(present):
            raise UserError(
                f"the data has {len(present)} classes and {options.checkpoint} knows "
                f"{config.model.num_classes}; give the data set of its training with --data"
            )
        return
    if list(present) == trained:
        return
    extra, missing = sorted(set(present) - set(trained)), sorted(set(trained) - set(present))
    problem = f"unknown to the model are {extra[:3]}" if extra else f"missing are {missing[:3]}"
    raise UserError(
        f"the data has other classes than {options.checkpoint} was trained on ({problem}); give "
        "the data set of the training with --data"
    )


def table(
    result: "Evaluation",
    wanted: list[int],
    options: argparse.Namespace,
    description: Any,
    data_split: str | None,
) -> str:
    of_split = f" of the split {data_split}" if data_split else ""
    lines = [
        f"{options.checkpoint}: {description['config']['model']['name']}, step "
        f"{description['step']}, {result.samples} samples of {options.split}{of_split}",
        "",
        "  T   top-1 %   top-5 %     loss",
    ]
    for t in wanted:
        top1, top5, loss = (
            values[t - 1]
            for values in (
                result.per_timestep_top1,
                result.per_timestep_top5,
                result.per_timestep_loss,
            )
        )
        lines.append(f"{t:3}{top1:10.2f}{top5:10.2f}{loss:9.4f}")
    lines += ["", f"  firing rate over {result.timesteps} timesteps"]
    lines += [f"{rate:10.4f}  {layer}" for layer, rate in result.firing_rate.items()]
    return "\n".join(lines)


def write_json(
    path: Path,
    result: "Evaluation",
    wanted: list[int],
    options: argparse.Namespace,
    description: Any,
    data_split: str | None,
) -> None:
    from tetdist.errors import UserError

    values = {
        "checkpoint": str(options.checkpoint),
        "model": description["config"]["model"]["name"],
        "step": description["step"],
        "split": options.split,
        **({"data_split": data_split} if data_split else {}),
        "reported_timesteps": wanted,
        **dataclasses.asdict(result),
    }
    aside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        aside.write_text(json.dumps(values, indent=1) + "\n")
        aside.replace(path)
    except OSError as error:
        raise UserError(f"--json: cannot write {path}: {error.strerror}") from error


if __name__ == "__main__":
    sys.exit(main())
