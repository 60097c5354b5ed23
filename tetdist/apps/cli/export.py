"""Export a trained network: weights with a model card, timm, NIR, ONNX, torch.export or the hub."""

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from tetdist.apps.cli.common import add_checkpoint, check_new_weights, program, run_command
from tetdist.config.flags import MOST_TIMESTEPS, Parser, add_import, positive
from tetdist.errors import UserError
from tetdist.plugins import import_files
from tetdist.storage import hub
from tetdist.wording import counted

if TYPE_CHECKING:
    from tetdist.apps.weights.trained import Trained

# File suffix of --output for each format.
ENDINGS = {
    "safetensors": ".safetensors",
    "nir": ".nir",
    "onnx": ".onnx",
    "onnx-step": ".onnx",
    "torch": ".pt2",
}
# Formats whose --output may be a folder without a suffix.
FOLDERS = ("safetensors", "timm")

# Formats of --int8.
WHOLE = ("safetensors", "onnx-step")


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(prog=program("export"), description="Export a trained network.")
    add = parser.add_argument
    add_checkpoint(parser)
    formats = ["safetensors", "timm", "nir", "onnx", "onnx-step", "torch"]
    text = "weights (safetensors, timm), or a graph of all T timesteps (onnx, torch) or of one"
    add("--format", choices=formats, help=f"{text} (onnx-step, nir); see docs/weights.md")
    add(
        "--output",
        metavar="PATH",
        type=Path,
        help="new folder (safetensors, timm) or file (.safetensors: the weights alone; .nir, "
        ".onnx, .pt2)",
    )
    add("--best", action="store_true", help="export the best checkpoint of a run folder")
    add(
        "--ema",
        action="store_true",
        help="export the moving average of the weights, if the run has one; with --best, the best "
        "average",
    )
    add(
        "--int8",
        action="store_true",
        help="write integers, with int8 weights: --format safetensors or onnx-step",
    )
    timesteps = partial(positive, most=MOST_TIMESTEPS)
    add("--timesteps", type=timesteps, metavar="T", help="default: as in training")
    add(
        "--dt",
        type=float,
        metavar="SECONDS",
        help="length of a timestep in NIR (default: 1e-4, as in other libraries)",
    )
    add_import(parser)
    add_hub(parser.add_argument_group("the Hugging Face hub"))
    options = parser.parse_args(arguments)
    check_hub(parser, options)
    if options.int8 and options.format not in WHOLE:
        parser.error(f"--int8 needs --format {' or '.join(WHOLE)}, not {options.format}")
    if options.output is not None:
        check_output(parser, options.format, options.output)
    if options.dt is not None and options.format != "nir":
        parser.error("--dt applies to --format nir only; leave it out")
    if options.dt is not None and not 0 < options.dt < float("inf"):
        parser.error(f"--dt {options.dt:g} must be finite and above 0 seconds, such as 1e-4")
    return options


def add_hub(group: argparse._ArgumentGroup) -> None:
    """Add the options of --push."""
    add = group.add_argument
    add(
        "--push",
        metavar="ORG/NAME",
        help="upload the files of --format timm to this repository, which is created as private if "
        "it does not exist (--output FOLDER: also keep the files there)",
    )
    add("--public", action="store_true", help="create the repository as public")


def check_hub(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    """Refuse contradictory options of --push, and a missing --format or --output."""
    if options.push is None:
        if options.public:
            parser.error("--public applies to --push only; leave it out")
        if options.format is None or options.output is None:
            parser.error("give --format and --output, or --push ORG/NAME")
        return
    if not hub.is_repository(options.push):
        parser.error(f"--push {options.push}: a repository's name must be ORG/NAME")
    if options.format not in (None, "timm"):
        parser.error(f"--push uploads --format timm only; leave out --format {options.format}")
    options.format = "timm"


def check_output(parser: argparse.ArgumentParser, form: str, output: Path) -> None:
    """Refuse an --output whose suffix does not match the format."""
    ending = ENDINGS.get(form)
    if output.suffix != ending and (form not in FOLDERS or output.suffix in ENDINGS.values()):
        rule = "be a folder" if form in FOLDERS else f"end in {ending}"
        parser.error(f"--output of --format {form} must {rule}, unlike {output}")


def main(arguments: list[str] | None = None) -> int:
    options = parse_arguments(arguments)
    return run_command(lambda: export(options))


def export(options: argparse.Namespace) -> None:
    hub.check_source(options.checkpoint)  # before torch is imported
    if options.output is not None:
        check_new_weights(options.output)
    from tetdist.apps.weights import export as formats
    from tetdist.apps.weights.trained import load

    import_files(options.imports)
    which = "best" if options.best else "last"
    trained = load(options.checkpoint, which, options.timesteps, ema=options.ema)
    if options.push is not None:
        publish(trained, options)
        return
    output: Path = options.output
    write: dict[str, Callable[[Trained, Path], str]] = {
        "safetensors": formats.write_safetensors,
        "timm": formats.write_timm,
        "nir": partial(formats.write_nir, dt=options.dt or 1e-4),
        "onnx": formats.write_onnx,
        "onnx-step": formats.write_onnx_step,
        "torch": formats.write_torch,
    }
    if options.int8:
        write["safetensors"] = formats.write_integers
        write["onnx-step"] = formats.write_integer_step
    print(f"wrote {output}: {write[options.format](trained, output)}")


def publish(trained: "Trained", options: argparse.Namespace) -> None:
    """Push a network to the hub."""
    import tetdist
    from tetdist.apps.weights.export import write_timm

    if not trained.description.classes:
        raise UserError(
            "--push: these weights have no class names, which users of the repository need; "
            "convert them again with --classes"
        )
    with TemporaryDirectory() as aside:
        folder = options.output or Path(aside, "export")
        write_timm(trained, folder, options.push)
        if options.output is not None:
            print(f"wrote {folder}")
        step = counted(trained.description.step, "step")
        message = f"{trained.config.name} after {step}, by tetdist {tetdist.__version__}"
        pushed = hub.push(folder, options.push, private=not options.public, message=message)
        print(f"pushed {pushed.url}, commit {pushed.commit}")
