"""Train a spiking network; the same command continues a run that was stopped."""

import argparse
import logging
import os
import re
import shutil
import sys
import textwrap
from contextlib import nullcontext
from pathlib import Path

from tetdist.apps.cli.common import MISTAKES, add_local_rank, fail, program
from tetdist.config import loading, schema
from tetdist.config.documentation import Documented, documented_keys
from tetdist.config.flags import add_import
from tetdist.config.inheritance import DEFAULT, annotated
from tetdist.config.key_parser import KeyParser
from tetdist.config.messages import nearest
from tetdist.errors import PEER_FAILED, PeerFailed, UserError, typed
from tetdist.nn.neurons import kind_of
from tetdist.plugins import import_files
from tetdist.storage.hub import check_source
from tetdist.tracking.mlflow_store import check_store
from tetdist.tracking.trackers import check_names


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = KeyParser(
        prog=program("train"),
        description="Train a spiking network. The same command continues a stopped run.",
        epilog="examples:\n"
        "  deepspeed tetdist/train.py --config sew34_t4.yaml data.root=/imagenet\n"
        f"  {typed('train')} --config quickstart.yaml seed=1 name=second",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_config()
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="key=value",
        help="override a key of the configuration: seed=1, phases.0.epochs=2, data.root=...",
    )
    add_import(parser)
    parser.add_argument(
        "--print-config",
        action="store_true",
        help="print the full configuration, with all defaults and each value's origin, then exit",
    )
    parser.add_argument(
        "--explain",
        action="store_true",
        help="list all configuration keys, or the given ones (--explain batch), with type, default "
        "and description, and exit",
    )
    add_local_rank(parser)
    options = parser.parse_intermixed_args(arguments)
    if not options.explain:
        parser.require_config(options)
    return options


def main(arguments: list[str] | None = None) -> int:
    """Return the exit status: 0 finished, 2 a user error, 3 another process of the run died or
    hangs, 128 + n stopped by signal n.

    The deepspeed launcher exits with the status of the first process that fails; if signal n
    killed that process, with 256 - n.
    """
    options = parse_arguments(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    # After Ctrl-C during its import, torch would print the statistics of its caches.
    logging.getLogger("torch").setLevel(logging.WARNING)
    rank = os.environ.get("RANK", "0")
    if rank != "0":
        logging.getLogger().setLevel(logging.ERROR)
    try:
        config = read_config(options)
    except MISTAKES as error:
        # All processes raise this error; only rank 0 prints it.
        return fail(error) if rank == "0" else 2
    if config is None:
        return 0
    try:
        from tqdm.contrib.logging import logging_redirect_tqdm

        from tetdist.apps.reports.observers import observers
        from tetdist.training.run import train

        # On a terminal, a line would otherwise continue the bar's line.
        with logging_redirect_tqdm() if sys.stderr.isatty() else nullcontext():
            return train(config, observers)
    except MISTAKES as error:
        return fail(error, "" if rank == "0" else f"rank {rank}: ")
    except PeerFailed as error:
        fail(error, "" if rank == "0" else f"rank {rank}: ")
        return PEER_FAILED
    except KeyboardInterrupt:
        # Interrupted before the run began.
        print("interrupted; earlier checkpoints are kept", file=sys.stderr)
        return 130


def read_config(options: argparse.Namespace) -> schema.RunConfig | None:
    """Return the configuration; None after --explain or --print-config."""
    from tetdist.apps.reports.reference import find_reference
    from tetdist.datasets.index import check_indexed

    if options.explain:
        files = [file for name in options.config or () for file in loading.imports_in(name)]
        import_files([*files, *options.imports])
        inherits = "Configuration file or recipe from which a file inherits the keys that it omits."
        known = {"base": Documented("text", "default: none", inherits)} | documented_keys()
        chosen = set[str]()
        for key in options.overrides or [""]:
            # Users may type phases.0.epochs, optimizer=..., the beginning of a key, or its end.
            word = re.sub(r"\.\d+(?=\.|$)", ".N", key.partition("=")[0])
            named = {one for one in known if not word or f"{one}.".startswith(f"{word}.")}
            named = named or {one for one in known if f".{word}." in f".{one}."}
            chosen |= named
            if not named:
                near = nearest(schema.RunConfig, word.split(".")).replace(".0.", ".N.")
                near = re.sub("^set (phases|save)", r"see \1", near)
                raise UserError(
                    f"--explain: there is no key {key!r}; {near} (--explain alone lists all keys)"
                )
        # A pipe gets a line for each key, for grep.
        width = shutil.get_terminal_size().columns if sys.stdout.isatty() else sys.maxsize
        for key, documented in known.items():
            if key in chosen:
                print(textwrap.fill(f"{key} {documented}", width, subsequent_indent=" " * 4))
        return None
    # Several processes check the data later, together, since each host may have its own.
    needs_data = not options.print_config and "RANK" not in os.environ

    draft = loading.draft(options.config, options.overrides, options.imports)
    config = draft.config
    check_names(config.tracking.trackers)
    if config.tracking_uri is not None:
        check_store(config.tracking_uri)
    if config.reference is not None:
        find_reference(config.reference)
    if needs_data:
        check_indexed(config, draft.data_command)
        if config.init_checkpoint and not (config.run_dir / "checkpoints").is_dir():
            try:
                check_source(Path(config.init_checkpoint))
            except UserError as error:
                raise UserError(f"init_checkpoint: {error}") from error
    config = draft.completed()
    if options.print_config:
        model = config.model
        of_kind = {
            f"model.neuron.{key}": f"{DEFAULT} of {kind_of(model.neuron)}, in place of {own}"
            for key, (own, _) in model.changed_by_kind.items()
        }
        print(annotated(config.as_yaml(), {**of_kind, **draft.origins}), end="")
        return None
    return config
