"""Give a trained network away: as weights with a card, to timm, NIR, ONNX or torch.export.

    python tools/export.py runs/sew34_t4 --format safetensors --output sew34_t4
    python tools/export.py runs/sew34_t4 --best --format nir --output sew34_t4.nir

docs/weights.md says what each format holds and what it cannot.
"""

import argparse
from pathlib import Path

from tetdist.cli.common import answer, program
from tetdist.config.flags import add_import

# The ending of --output for each format.
ENDINGS = {"safetensors": ".safetensors", "nir": ".nir", "onnx": ".onnx", "torch": ".pt2"}
# Formats whose --output may be a folder, which has no ending then.
FOLDERS = ("safetensors", "timm")


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog=program("export"), description="Export a trained network."
    )
    add = parser.add_argument
    add(
        "checkpoint",
        metavar="RUN_OR_FILE",
        type=Path,
        help="a run folder (its last checkpoint), the folder of a checkpoint or an export, or a "
        ".safetensors file",
    )
    add("--format", required=True, choices=["safetensors", "timm", "nir", "onnx", "torch"])
    add(
        "--output",
        required=True,
        metavar="PATH",
        type=Path,
        help="a new folder (safetensors, timm) or file (.safetensors: the weights alone; .nir, "
        ".onnx, .pt2)",
    )
    add("--best", action="store_true", help="of a run folder, the best checkpoint")
    add(
        "--ema",
        action="store_true",
        help="the moving average of the weights, of a run that has one; with --best the best "
        "average",
    )
    add("--timesteps", type=int, metavar="T", help="default: as in training")
    add(
        "--dt",
        type=float,
        metavar="SECONDS",
        help="nir: length of a timestep (default: 1e-4, as in other libraries)",
    )
    add_import(parser)
    options = parser.parse_args(arguments)
    check_output(parser, options.format, options.output)
    if options.timesteps is not None and options.timesteps < 1:
        parser.error("--timesteps must be at least 1")
    if options.dt is not None and options.format != "nir":
        parser.error("--dt has a meaning with --format nir only")
    if options.dt is not None and not 0 < options.dt < float("inf"):
        parser.error("--dt must be above 0")
    return options


def check_output(parser: argparse.ArgumentParser, form: str, output: Path) -> None:
    """Refuse an --output that would be something else than its name says."""
    ending = ENDINGS.get(form)
    if output.suffix == ending:
        return
    if form not in FOLDERS:
        parser.error(f"--output of --format {form} must end in {ending}")
    if output.suffix in ENDINGS.values():
        file = f", or a file that ends in {ending}" if ending else ""
        parser.error(
            f"--output of --format {form} is a folder{file}, and {output} is named like a file: "
            f"leave out {output.suffix}"
        )


def main(arguments: list[str] | None = None) -> int:
    options = parse_arguments(arguments)
    return answer(lambda: export(options))


def export(options: argparse.Namespace) -> None:
    from tetdist.exchange import export as formats
    from tetdist.plugins import import_files

    import_files(options.imports)
    which = "best" if options.best else "last"
    trained = formats.load(options.checkpoint, which, options.timesteps, ema=options.ema)
    output: Path = options.output
    match options.format:
        case "safetensors":
            said = formats.write_safetensors(trained, output)
        case "timm":
            said = formats.write_timm(trained, output)
        case "nir":
            said = formats.write_nir(trained, output, options.dt or 1e-4)
        case "onnx":
            said = formats.write_onnx(trained, output)
        case "torch":
            said = formats.write_torch(trained, output)
        case other:
            raise AssertionError(other)
    print(f"wrote {output}: {said}")
