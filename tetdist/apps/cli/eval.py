"""Evaluate a checkpoint: accuracy at any number of timesteps, early exit, operations, energy.

    python tools/eval.py runs/sew34_t4
    python tools/eval.py model.safetensors --data /data/imagenet --timesteps 1,2,4
    python tools/eval.py runs/sew34_t4 --timesteps 1-8 --report report.html

Evaluation needs no DeepSpeed and no particular machine. It also runs on several processes, under
the deepspeed launcher or torchrun.
"""

import argparse
import logging
import os
from functools import partial
from pathlib import Path

from tetdist.apps.cli.common import add_checkpoint, add_local_rank, program, run_command
from tetdist.apps.reports.evaluation_places import check_places
from tetdist.config.flags import MOST_THREADS, MOST_TIMESTEPS, Parser, add_import, positive


def timesteps_list(text: str) -> list[int]:
    """Parse numbers and ranges, such as 1,2,4 or 1-8 or 1-4,8; sorted, without duplicates."""
    values: set[int] = set()
    for part in text.split(","):
        first, dash, last = part.partition("-")
        if not first.isdecimal() or (dash and not last.isdecimal()):
            raise argparse.ArgumentTypeError(f"{text!r} must be a list such as 1,2,4 or 1-8")
        low, high = int(first), int(last or first)
        if high > MOST_TIMESTEPS:
            raise argparse.ArgumentTypeError(f"{text!r}: at most {MOST_TIMESTEPS} are allowed")
        if not 1 <= low <= high:
            raise argparse.ArgumentTypeError(f"{text!r}: T must be at least 1, and ranges ascend")
        values.update(range(low, high + 1))
    return sorted(values)


def points(text: str) -> float:
    """Parse percentage points of accuracy, from 0 to 100."""
    try:
        value = float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} must be a number, such as 0.5") from None
    if not 0 <= value <= 100:
        raise argparse.ArgumentTypeError(f"{text!r}: percentage points must be from 0 to 100")
    return value


def report_file(text: str) -> Path:
    if Path(text).suffix != ".html":
        raise argparse.ArgumentTypeError(f"{text!r} must end in .html")
    return Path(text)


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(prog=program("eval"), description="Evaluate a checkpoint.")
    add = parser.add_argument
    add_checkpoint(parser)
    text = "use the best checkpoint of a run folder (it was chosen on the validation split)"
    add("--best", action="store_true", help=text)
    text = "use the moving average of the weights, if the run has one; with --best, the best one"
    add("--ema", action="store_true", help=text)
    add("--data", metavar="ROOT", help="folder that holds val/; default: training's")
    add("--index", metavar="DIR", help="folder of the index; default: ROOT/index")
    text = "split to evaluate (default: val, or without one the samples that the run held out)"
    add("--split", help=text)
    text = """report top-1, top-5 and loss at these T, which may exceed the T of training (default:
        1 up to it); all else uses the T of training, or the last of these if it is not listed"""
    add("--timesteps", type=timesteps_list, metavar="1,2,4-8", help=text)
    text = """choose the early-exit threshold that loses at most POINTS of top-1 on the training
        samples that the run held out (data.held_out), and report its effect on this split"""
    add("--exit-within", type=points, metavar="POINTS", help=text)
    text = """choose that threshold on this split instead, without its labels: at most POINTS
        percent of its decisions may differ from those at T; for recordings of the day of use"""
    add("--exit-on", type=Path, metavar="ROOT/SPLIT", help=text)
    text = """also run early exit at that threshold for real: decided samples leave the batch;
        reports images/s beside those of whole passes"""
    add("--measured", action="store_true", help=text)
    text = """evaluate the network in integers (export --int8), and count the decisions that
        differ from those of the real numbers"""
    add("--int8", action="store_true", help=text)
    text = """YAML or JSON file of constants and assumptions of the energy estimate that differ
        from the defaults (docs/evaluation.md)"""
    add("--energy", metavar="FILE", type=Path, help=text)
    add("--batch", type=positive, metavar="N", help="samples a forward pass; default: training's")
    threads = partial(positive, most=MOST_THREADS)
    add("--threads", type=threads, metavar="N", help="decoding threads; default: training's")
    text = "precision of the forward pass; default: training's"
    add("--precision", choices=["bf16", "fp32", "tf32", "fp16", "fp64"], help=text)
    text = "fused kernels, or the definition in plain torch (default: fused)"
    add("--execution", choices=["fused", "reference"], help=text)
    text = "device of the network (default: auto, a GPU if there is one)"
    add("--device", choices=["auto", "cpu", "cuda"], default="auto", help=text)
    add_import(parser)
    add_local_rank(parser)
    add("--json", metavar="FILE", type=Path, help="also write the result as JSON")
    text = "write the result as a self-contained page with plots"
    add("--report", metavar="FILE.html", type=report_file, help=text)
    options = parser.parse_args(arguments)
    for flag, value in (("--exit-on", options.exit_on), ("--measured", options.measured)):
        if value and options.exit_within is None:
            parser.error(f"{flag} needs the early exit of --exit-within; add --exit-within POINTS")
    if options.int8 and options.energy:
        parser.error("--int8 does not support --energy; leave either out")
    return options


def main(arguments: list[str] | None = None) -> int:
    options = parse_arguments(arguments)
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logging.getLogger("huggingface_hub").propagate = False  # it prints its retries itself
    return run_command(lambda: evaluate(options))


def evaluate(options: argparse.Namespace) -> None:
    if "RANK" not in os.environ:  # Several processes check it later, together.
        check_places(options)
    from tetdist.apps.reports.evaluation import evaluate_checkpoint

    evaluate_checkpoint(options)
