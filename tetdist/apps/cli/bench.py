"""Run a benchmark; everything that it compares takes turns within one run.

All but data run on the CPU or a GPU, on random inputs; data generates images if it has none.
"""

import argparse
import importlib.util
from pathlib import Path

from tetdist.apps.cli.common import program, run_command, write_result
from tetdist.config.flags import positive
from tetdist.errors import UserError
from tetdist.storage.files import check_writable


def numbers(text: str) -> list[int]:
    return [positive(part) for part in text.split(",")]


MODES = ("none", "blocks", "timesteps", "reference")


def modes(text: str) -> list[str]:
    given = text.split(",")
    if unknown := [mode for mode in given if mode not in MODES]:
        raise argparse.ArgumentTypeError(f"{unknown[0]!r} is not one of {', '.join(MODES)}")
    return given


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog=program("bench"), description=__doc__.split("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)

    def command(name: str, precision: str, what: str) -> argparse.ArgumentParser:
        one = commands.add_parser(name, help=what, description=what)
        one.add_argument("--model", default="sew_resnet34", help="default: sew_resnet34")
        one.add_argument("--size", type=positive, help="image side in pixels; default: the model's")
        one.add_argument("--precision", choices=["fp32", "tf32", "bf16"], default=precision)
        one.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
        one.add_argument("--json", type=Path, metavar="FILE", help="also write the result as JSON")
        return one

    def contestants(one: argparse.ArgumentParser, default: str) -> None:
        one.add_argument(
            "--modes",
            type=modes,
            default=default,
            metavar=",".join(MODES),
            help="ways to run our model: none (as it is), activation checkpointing of blocks or "
            f"timesteps, reference (the plain definitions); default: {default}",
        )
        one.add_argument(
            "--segment", type=positive, default=2, metavar="K", help="timesteps a checkpoint"
        )
        one.add_argument(
            "--spikingjelly",
            choices=["eager", "compiled"],
            help="also measure the same network with spikingjelly's neurons",
        )

    model = command("step", "fp32", "time of a training step, compared with other networks")
    model.add_argument("--timesteps", type=positive, default=4, metavar="T")
    model.add_argument("--batch", type=positive, default=4, metavar="B")
    model.add_argument("--repeats", type=positive, default=7, help="measuring rounds")
    model.add_argument("--evaluate", action="store_true", help="time an evaluation's forward pass")
    contestants(model, "none")

    memory = command("memory", "fp32", "bytes kept for the backward pass, by T")
    memory.add_argument("--timesteps", type=numbers, default=[1, 2, 4, 8, 16], metavar="1,2,4")
    contestants(memory, "none,blocks,timesteps")

    stream = command("stream", "fp32", "one timestep of a stream, beside other ways to run it")
    stream.add_argument("--timesteps", type=positive, default=4, metavar="T")
    stream.add_argument("--batch", type=positive, default=1, metavar="B")
    stream.add_argument(
        "--exits",
        type=float,
        metavar="MEAN",
        help="also time a batch that decided samples leave, after MEAN timesteps on average",
    )
    stream.add_argument("--threads", type=positive, help="default: torch's own number")
    stream.add_argument("--repeats", type=positive, default=50, help="alternating rounds")

    scaling = command("scaling", "bf16", "several processes against one")
    scaling.add_argument("--timesteps", type=positive, default=4, metavar="T")
    scaling.add_argument("--batch", type=positive, default=4, metavar="B", help="micro-batch size")
    scaling.add_argument("--accumulation", type=positive, default=1, help="micro-batches a step")
    scaling.add_argument("--engine", choices=["deepspeed", "torch"], default="deepspeed")
    scaling.add_argument("--processes", type=positive, default=2)
    scaling.add_argument("--threads", type=positive, help="threads a process; default: its cores")
    scaling.add_argument("--repeats", type=positive, default=5, help="measuring rounds")
    scaling.add_argument("--steps", type=positive, default=2, help="steps a round")

    what = "images a second, compared with DALI's own reader and torchvision's DataLoader"
    data = commands.add_parser("data", help=what, description=what)
    data.add_argument("--data", type=Path, metavar="FOLDER", help="JPEGs; default: generated")
    data.add_argument("--images", type=positive, default=3000, help="images an epoch")
    data.add_argument("--size", type=positive, default=224, help="image side in pixels")
    data.add_argument("--batch", type=positive, default=32, metavar="B")
    data.add_argument("--threads", type=positive, default=2, help="threads or workers")
    data.add_argument("--repeats", type=positive, default=9, help="measuring rounds")
    data.add_argument("--batches", type=positive, default=15, help="batches a round")
    data.add_argument("--epochs", type=int, default=0, help="measure memory after so many epochs")
    data.add_argument("--wait", action="store_true", help="also time a training step's data wait")
    data.add_argument("--json", type=Path, metavar="FILE", help="also write the result as JSON")
    data.set_defaults(device="cpu")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    options = parse_arguments(arguments)
    return run_command(lambda: measure(options), interrupted="interrupted")


def measure(options: argparse.Namespace) -> None:
    """Run one benchmark and print its result."""
    from tetdist.apps.benchmarks import bench, data, scaling, streaming
    from tetdist.distributed.devices import choose_device

    if options.json:
        check_writable("--json", options.json)
    if (problem := problem_of(options)) is not None:
        raise UserError(problem)
    options.device = choose_device(options.device, local_rank=0).type
    measure_it, table = {
        "data": (data.measure, data.table),
        "memory": (bench.measure_memory, bench.memory_table),
        "scaling": (scaling.measure, scaling.table),
        "stream": (streaming.measure, streaming.table),
        "step": (bench.measure_model, bench.model_table),
    }[options.command]
    result = measure_it(options)
    print(table(result))
    write_result(options.json, result | {"machine": bench.machine(options.device)})


def problem_of(options: argparse.Namespace) -> str | None:
    """Return what is wrong with the options, before measuring; None if nothing is."""
    import timm

    from tetdist import models

    if options.command == "data":
        return None
    known = models.names()
    if options.model not in known:
        return f"--model: {options.model!r} is not a spiking model; choose from {', '.join(known)}"
    size = timm.get_pretrained_cfg(options.model).input_size[-1]
    if options.model in (
        "vggsnn",
        "spiking_convnet",
        "spiking_convnet_dvs",
        "spiking_resnet19_dvs",
    ):
        # The classifiers of these networks take all positions, so the size is fixed.
        if options.size not in (None, size):
            return f"--size: {options.model} takes {size} pixels only, not {options.size}; omit it"
    elif options.size is not None and options.size < 33 and size == 224:
        return f"--size: {options.size} leaves the last batch norm one pixel; give 33 or more"
    exits = getattr(options, "exits", None)
    if exits is not None and not 1 <= exits <= options.timesteps:
        return f"--exits: {exits} is not between 1 and --timesteps {options.timesteps}"
    if getattr(options, "spikingjelly", None):
        if importlib.util.find_spec("spikingjelly") is None:
            return "--spikingjelly: the package is not installed; pip install spikingjelly"
        from tetdist.apps.benchmarks.contestants import has_spikingjelly_network

        if not has_spikingjelly_network(options.model):
            return f"--spikingjelly: spikingjelly has no {options.model}; omit it"
    return None
