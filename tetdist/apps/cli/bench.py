"""Measure the speed of this machine; what a benchmark compares takes turns.

step uses random images; loader generates JPEG files if it gets none.
"""

import argparse
from pathlib import Path

from tetdist.apps.cli.common import program, run_command, write_result
from tetdist.config import names
from tetdist.config.flags import Parser, positive
from tetdist.storage.files import check_writable

MODES = ("none", "blocks", "timesteps")


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(prog=program("bench"), description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)

    def command(name: str, what: str, *, repeats: int, batch: int) -> argparse.ArgumentParser:
        benchmark = commands.add_parser(name, help=what, description=what)
        add = benchmark.add_argument
        add("--batch", type=positive, default=batch, metavar="B", help="micro-batch")
        add("--repeats", type=positive, default=repeats, help="measuring rounds")
        add("--json", type=Path, metavar="FILE", help="also write the result as JSON")
        return benchmark

    step = command("step", "time and memory of a training step", repeats=7, batch=4)
    step.add_argument("--model", default="sew_resnet34", help="default: sew_resnet34")
    step.add_argument("--size", type=positive, help="image side in pixels; default: the model's")
    text = "timesteps a sample (default: 4)"
    step.add_argument("--timesteps", type=positive, default=4, metavar="T", help=text)
    choices = ["fp32", "tf32", "bf16"]
    step.add_argument("--precision", choices=choices, default="fp32", help="default: fp32")
    text = "default: auto, a GPU if there is one"
    step.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto", help=text)
    step.add_argument(
        "--modes",
        nargs="+",
        choices=MODES,
        default=["none"],
        help="recompute nothing, blocks, or blocks in segments of two timesteps; default: none",
    )
    loader = command("loader", "images a second from JPEG files to batches", repeats=9, batch=32)
    loader.add_argument("--data", type=Path, metavar="FOLDER", help="JPEGs; default: generated")
    loader.add_argument("--size", type=positive, default=224, help="image side in pixels")
    loader.add_argument("--threads", type=positive, default=2, help="decoding threads")
    loader.set_defaults(device="cpu")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    options = parse_arguments(arguments)
    return run_command(lambda: measure(options), interrupted="interrupted")


def measure(options: argparse.Namespace) -> None:
    """Run one benchmark and print its result."""
    if options.command == "step":
        names.check_network(options.model)
    if options.json:
        check_writable("--json", options.json)
    # Imported after these checks, because torch takes seconds.
    from tetdist.apps.benchmarks import bench, data
    from tetdist.distributed.devices import choose_device

    options.device = choose_device(options.device, local_rank=0).type
    benchmark = bench if options.command == "step" else data
    result = benchmark.measure(options)
    write_result(options.json, result | {"machine": bench.machine(options.device)})
    print(benchmark.table(result))  # last, because the output may be full
