"""Convert weights from other projects to a file for training (init_checkpoint) and eval.

    python tools/convert.py --list
    python tools/convert.py --fetch sew_resnet34
    python tools/convert.py FILE --model sew_resnet34 --from sew --output sew34.safetensors

--list shows the published networks that --fetch downloads and converts.
"""

import argparse
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tetdist.apps.cli.common import check_new_weights, documented_parser, run_command
from tetdist.apps.weights import published
from tetdist.apps.weights.sources import OWN, SOURCES
from tetdist.config import names
from tetdist.config.flags import positive
from tetdist.config.loading import parse
from tetdist.config.overrides import apply_override, refuse_repeated
from tetdist.errors import UserError, typed
from tetdist.storage.files import read_text
from tetdist.wording import counted, meant_path

if TYPE_CHECKING:
    from tetdist.apps.weights.foreign import Converted
    from tetdist.config.schema import RunConfig
    from tetdist.storage.checkpoint import Description

SHOWN = 10  # tensors that do not fit are listed


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = documented_parser("convert", __doc__)
    add = parser.add_argument
    text = ".safetensors, a file of torch.save, or a run of tetdist"
    add("source", nargs="?", metavar="FILE", help=text)
    add("--list", action="store_true", help="list the published networks, and exit")
    text = "download and convert a network of that list, instead of FILE, --model and --from"
    add("--fetch", metavar="NAME", help=text)
    add("--model", metavar="NAME", help="tetdist's model: sew_resnet34, vggsnn, ...")
    choices = ["auto", *SOURCES]
    add("--from", dest="layout", choices=choices, default="auto", help="project that wrote FILE")
    text = "new file (default with --fetch: NAME.safetensors)"
    add("--output", metavar="FILE.safetensors", type=Path, help=text)
    add("--timesteps", type=positive, metavar="T", help="T of its training; default: the model's")
    add(
        "--classes",
        metavar="WHERE",
        type=Path,
        help="class names: a folder of class folders, such as ROOT/val, or a file with one name a "
        "line; without it, evaluation only checks the number of classes",
    )
    add(
        "--allow-missing",
        action="store_true",
        help="accept missing, unknown or differently shaped weights; missing ones are initialised",
    )
    add(
        "overrides",
        nargs="*",
        metavar="key=value",
        help="keys of the configuration stored in the new file: model.neuron.decay=0.5, "
        "model.arguments.connect_function=and, model.num_classes=100, data.image_size=128",
    )
    parser.set_defaults(keys=())  # those of a published network
    options = parser.parse_intermixed_args(arguments)
    if options.list:
        return options
    if options.fetch is not None:
        if options.model or options.layout != "auto":
            parser.error("--fetch names the model and the project; leave out --model and --from")
        options.overrides[:0] = [options.source] if options.source else []
        options.output = options.output or Path(f"{options.fetch}.safetensors")
    elif None in (options.source, options.model, options.output):
        parser.error("give FILE, --model and --output, or --fetch NAME, or --list")
    if options.output.suffix != ".safetensors":
        parser.error(f"--output must end in .safetensors, unlike {options.output}")
    return options


def main(arguments: list[str] | None = None) -> int:
    options = parse_arguments(arguments)
    return run_command(
        lambda: list_published() if options.list else convert_file(options),
        interrupted="interrupted; the same command starts over, and continues a download",
    )


def list_published() -> None:
    print(published.listing())
    print(f"\n{typed('convert', '--fetch', 'NAME')} downloads and converts a network.")
    print("Addresses and accuracies are the authors'; they were not tried here.")


def convert_file(options: argparse.Namespace) -> None:
    fetched = None if options.fetch is None else published.named(options.fetch)
    if fetched is None:
        options.source = file = Path(options.source)
        if not file.exists():
            raise UserError(f"there is no file {file}; {meant_path(file, 'correct its name')}")
        names.check_network(options.model)
    check_new_weights(options.output)
    import torch

    from tetdist.apps.weights import foreign
    from tetdist.storage import checkpoint, foreign_files

    before = None
    if fetched is not None:
        options.source, state = published.obtain(fetched, foreign_files.read)
        options.model, options.layout, options.keys = fetched.model, fetched.source, fetched.keys
        options.timesteps = options.timesteps or fetched.timesteps
    elif checkpoint.is_own(options.source):
        state, before = checkpoint.load_model_file(options.source)
        options.layout = OWN
    else:
        state = foreign_files.read(options.source)
    layout = options.layout
    source = foreign.source_of(state, options.source) if layout == "auto" else layout
    num_classes = foreign.num_classes(state, source)
    config, timesteps = configuration(options, source, num_classes, before)
    classes = class_names(options, config, before)
    torch.manual_seed(config.seed)
    assert config.model.num_classes is not None
    kind = config.data.input_kind
    model = config.model.build(
        num_classes=config.model.num_classes, timesteps=timesteps, input_kind=kind
    )
    converted = foreign.convert(state, source, model)
    report(converted, options, config, source, timesteps)
    description = checkpoint.Description(
        config=config.as_dict(),
        classes=classes,
        timesteps=timesteps,
        step=0 if before is None else before.step,
        binning=None if before is None else before.binning,
        validation=None,
        converted={"file": options.source.name, "from": source},
        published=None if fetched is None else fetched.claim,
    )
    checkpoint.write_model_file(options.output, converted.weights, description)
    print(f"wrote {options.output}")
    if fetched is not None:
        print(f"evaluate it: {typed('eval', options.output, '--data')} FOLDER_OF_{fetched.data}")


def configuration(
    options: argparse.Namespace,
    source: str,
    num_classes: int | None,
    before: "Description | None",
) -> tuple["RunConfig", int]:
    """Return a configuration that builds and evaluates the network, and its T.

    ``before`` describes the weights if they are tetdist's.
    """
    import timm

    from tetdist import models
    from tetdist.apps.weights.foreign import arguments_of, neuron_of, scale_of

    timesteps = options.timesteps or models.default_timesteps(options.model)
    cfg = timm.get_pretrained_cfg(options.model)
    side = cfg.input_size[-1]
    num_classes = num_classes or cfg.num_classes
    data: dict[str, Any] = {"kind": "events", "root": "data"}
    if source == "i2e":
        data = {"root": "data", "image_size": side, "images_as_events": {}}
    elif models.input_kind(options.model) == "images":
        scale = scale_of(source, num_classes) or {"mean": cfg.mean, "std": cfg.std}
        data = {
            "root": "data",
            "image_size": side,
            "resize": math.floor(side / cfg.crop_pct),  # as timm
            "interpolation": cfg.interpolation,
            "mean": list(scale["mean"]),
            "std": list(scale["std"]),
        }
    raw: dict[str, Any] = {
        "name": options.output.stem,
        "model": {
            "name": options.model,
            "num_classes": num_classes,
            "neuron": neuron_of(source, options.model),
        },
        "data": data,
        "batch": {"global": 256, "micro": 32},
        "phases": [{"epochs": 1, "timesteps": timesteps, "optimizer": {"lr": 0.1}}],
    }
    if arguments := arguments_of(source, options.model):
        raw["model"]["arguments"] = arguments
    if before is not None:
        model = before.config["model"] | {"name": options.model, "num_classes": num_classes}
        raw = before.config | {"name": options.output.stem, "model": model}
        timesteps = options.timesteps or before.timesteps
    refuse_repeated(options.overrides)
    for override in (*options.keys, *options.overrides):
        apply_override(raw, override)
    overrides, used = options.overrides, before is not None
    config = parse(raw, "the configuration", only_used=used, overrides=overrides)
    return config, timesteps


def class_names(
    options: argparse.Namespace, config: "RunConfig", before: "Description | None"
) -> list[str] | None:
    if options.classes is None:
        names = None if before is None else before.classes
        return names if len(names or ()) == config.model.num_classes else None
    try:
        if options.classes.is_dir():
            names = sorted(path.name for path in options.classes.iterdir() if path.is_dir())
        else:
            names = read_text(options.classes).split("\n")
            names = [name.strip() for name in names if name.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--classes: {options.classes} cannot be read ({error})") from error
    if len(names) != config.model.num_classes:
        raise UserError(
            f"--classes: {options.classes} names {counted(len(names), 'class')}, but the model has "
            f"{config.model.num_classes}"
        )
    return names


def report(
    converted: "Converted",
    options: argparse.Namespace,
    config: "RunConfig",
    source: str,
    timesteps: int,
) -> None:
    """Print which tensors were converted; refuse those that do not fit without --allow-missing."""
    missing, unexpected = converted.missing, converted.unexpected
    carried = len(converted.weights) - len(missing) - len(converted.initialised)
    total = counted(len(converted.weights), "tensor")
    print(f"{options.source}: {carried} of {total} converted, as weights of {source}")
    if converted.unused:
        unused = counted(len(converted.unused), "tensor")
        print(f"  left out: {unused} that the network does not use: {', '.join(converted.unused)}")
    if converted.initialised:
        print(
            f"  initialised: {counted(len(converted.initialised), 'tensor')} that a ReLU network "
            f"lacks, such as {converted.initialised[0]}"
        )
    for heading, lines in (("missing", missing), ("unknown", unexpected)):
        for line in lines[:SHOWN]:
            print(f"  {heading}: {line}")
        if len(lines) > SHOWN:
            print(f"  {heading}: {len(lines) - SHOWN} more")
    if (missing or unexpected) and not options.allow_missing:
        raise UserError(
            f"{options.source} is not a {config.model.name} of {source}: "
            f"{counted(len(missing), 'tensor')} missing or of another shape and "
            f"{len(unexpected)} unknown (see above); choose another --model or --from, or give "
            "--allow-missing to initialise the missing ones and drop the rest"
        )
    if not carried:
        raise UserError(
            f"no tensor in {options.source} fits {config.model.name}; choose another --model"
        )
    from tetdist.nn import neurons

    neuron = ", ".join(
        f"{key} {value}" for key, value in neurons.as_dict(config.model.neuron).items()
    )
    assumed = " (assumed, the file does not store it)" * (source != OWN)
    print(f"  neuron{assumed}: {neuron}; T={timesteps}")
    if source == "qkformer" and not config.model.arguments.get("mixes_samples"):
        print(
            "  QKFormer's published accuracies come from code in which the samples of a batch "
            "influence each other; here they do not, so accuracy is lower: see "
            "model.arguments.mixes_samples in docs/weights.md"
        )
