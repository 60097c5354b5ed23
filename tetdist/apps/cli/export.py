"""Give a trained network away: as weights with a card, to timm, NIR, ONNX, torch.export or the hub.

    python tools/export.py runs/sew34_t4 --format safetensors --output sew34_t4
    python tools/export.py runs/sew34_t4 --best --format nir --output sew34_t4.nir
    python tools/export.py runs/sew34_t4 --best --push ORG/NAME --dry-run

docs/weights.md says what each format holds and what it cannot.
"""

import argparse
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from tetdist.apps.cli.common import answer, check_new_weights, program
from tetdist.config.flags import add_import
from tetdist.errors import UserError
from tetdist.wording import counted

if TYPE_CHECKING:
    from tetdist.apps.weights.trained import Trained

# The ending of --output for each format.
ENDINGS = {
    "safetensors": ".safetensors",
    "nir": ".nir",
    "onnx": ".onnx",
    "onnx-step": ".onnx",
    "torch": ".pt2",
}
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
        help="a run folder (its last checkpoint), the folder of a checkpoint or an export, a "
        ".safetensors file, or hf:ORG/NAME",
    )
    add("--format", choices=["safetensors", "timm", "nir", "onnx", "onnx-step", "torch"])
    add(
        "--output",
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
    add_hub(parser.add_argument_group("the Hugging Face hub"))
    options = parser.parse_args(arguments)
    check_hub(parser, options)
    if options.output is not None:
        check_output(parser, options.format, options.output)
    if options.timesteps is not None and options.timesteps < 1:
        parser.error("--timesteps must be at least 1")
    if options.dt is not None and options.format != "nir":
        parser.error("--dt has a meaning with --format nir only")
    if options.dt is not None and not 0 < options.dt < float("inf"):
        parser.error("--dt must be above 0")
    return options


def add_hub(group: argparse._ArgumentGroup) -> None:
    """Add the options of a push."""
    add = group.add_argument
    add(
        "--push",
        metavar="ORG/NAME",
        help="upload what --format timm writes to this repository, which is made, private, if "
        "there is none (--output FOLDER: keep it there, too)",
    )
    add("--public", action="store_true", help="make the repository one that all can see")
    add("--dry-run", action="store_true", help="say what would be uploaded, and upload nothing")


def check_hub(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    """Refuse options of a push that do not suit each other, and a missing --format or --output."""
    from tetdist.storage.hub import is_repository

    if options.push is None:
        for flag in ("public", "dry_run"):
            if getattr(options, flag):
                parser.error(f"--{flag.replace('_', '-')} has a meaning with --push only")
        if options.format is None or options.output is None:
            parser.error("give --format and --output, or --push ORG/NAME")
        return
    if not is_repository(options.push):
        parser.error(f"--push {options.push}: a repository is called ORG/NAME")
    if options.format not in (None, "timm"):
        parser.error(f"--push uploads what --format timm writes; leave out {options.format}")
    options.format = "timm"


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
    from tetdist.apps.weights import export as formats
    from tetdist.apps.weights.trained import load
    from tetdist.plugins import import_files

    if options.output is not None:
        check_new_weights(options.output)
    import_files(options.imports)
    which = "best" if options.best else "last"
    trained = load(options.checkpoint, which, options.timesteps, ema=options.ema)
    if options.push is not None:
        publish(trained, options)
        return
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
        case "onnx-step":
            said = formats.write_onnx_step(trained, output)
        case "torch":
            said = formats.write_torch(trained, output)
        case other:
            raise AssertionError(other)
    print(f"wrote {output}: {said}")


def publish(trained: "Trained", options: argparse.Namespace) -> None:
    """Push a network to the hub, or say what would be pushed.

    Raises:
        UserError: Its classes have no names, it cannot be written, or the hub does not take it.
    """
    import tetdist
    from tetdist.apps.weights.export import write_timm
    from tetdist.storage import hub

    repo, private = options.push, not options.public
    if not trained.description.classes:
        raise UserError(
            "--push: these weights do not name their classes, which those who fetch them need; "
            "convert them again with --classes"
        )
    with TemporaryDirectory() as aside:
        folder = options.output or Path(aside, "it")
        write_timm(trained, folder, repo)
        if options.output is not None:
            print(f"wrote {folder}")
        if options.dry_run:
            kind = "private" if private else "public"
            sizes = {path.name: path.stat().st_size for path in sorted(folder.iterdir())}
            print(f"would push to {hub.destination(repo)}, {kind} if there is none yet:")
            for name, size in sizes.items():
                print(f"{size:14,} bytes  {name}")
            print(f"{sum(sizes.values()):14,} bytes  in {counted(len(sizes), 'file')}")
            print("nothing was sent")
            return
        step = counted(trained.description.step, "step")
        message = f"{trained.config.name} after {step}, by tetdist {tetdist.__version__}"
        pushed = hub.push(folder, repo, private=private, message=message)
        print(f"pushed {pushed.url}, commit {pushed.commit}")
