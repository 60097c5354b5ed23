"""Shared arguments, and handling of user errors, missing packages and Ctrl-C."""

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tetdist.config.flags import Parser
from tetdist.errors import PEER_FAILED, PeerFailed, UserError, printable, sentence, typed
from tetdist.plugins import explained
from tetdist.storage.files import explaining, write_text
from tetdist.tracking.metrics_file import strict
from tetdist.wording import are, counted

# Help of an argument that names a trained network.
CHECKPOINT = (
    "run folder or name (last checkpoint), checkpoint or export folder, .safetensors file, "
    "hf:ORG/NAME[@REVISION] of the Hugging Face hub, or tetdist:NAME (`tetdist list` names them)"
)
# Errors that the user can fix, beside those of files, for which tetdist_command answers.
MISTAKES = (UserError, ModuleNotFoundError)


def run_command(
    command: Callable[[], int | None],
    *,
    interrupted: str = "interrupted; nothing was written",
) -> int:
    """Run a command and return its exit status: 2 for a user error, 3 if another process of the
    run has died, 130 for Ctrl-C.
    """
    try:
        return command() or 0
    except MISTAKES as error:
        return fail(error)
    except PeerFailed as error:
        fail(error)
        return PEER_FAILED
    except KeyboardInterrupt:
        print(interrupted, file=sys.stderr)
        return 130
    except Exception as error:
        if (mistake := explained(error)) is error:
            raise
        return fail(mistake)


def fail(error: Exception, prefix: str = "") -> int:
    """Print an error and return the exit status 2."""
    print(f"{prefix}error: {sentence(error)}", file=sys.stderr)
    return 2


def check_new_weights(output: Path) -> None:
    """Refuse an output that exists, whose folder is missing, or that would damage a checkpoint."""
    if output.exists():
        raise UserError(f"{output} exists; choose another --output, or remove it first")
    if not output.absolute().parent.is_dir():
        raise UserError(f"--output: there is no folder {output.parent}; correct it, or make it")
    if (output.parent / "manifest.json").exists():  # checkpoint.MANIFEST_FILE, without torch
        raise UserError(f"--output: {output.parent} is a checkpoint; choose another folder")


def report_bad(bad: Sequence[tuple[str, str]], kind: str, number: int) -> None:
    """Print the first 20 bad files with their faults, and the number of bad files."""
    for path, reason in bad[:20]:
        print(printable(f"bad: {path}: {reason}"), file=sys.stderr)
    if bad:
        shown = " (the first 20 are above)" * (len(bad) > 20)
        print(f"{len(bad)} of {counted(number, kind)} {are(len(bad))} bad{shown}", file=sys.stderr)


def write_result(file: Path | None, values: Any) -> None:
    """Write a result as JSON, if a file is given; non-finite numbers become text."""
    if file:
        # YAML has dates, JSON does not.
        text = json.dumps(strict(values), indent=1, allow_nan=False, default=str)
        with explaining(file):
            write_text(file, f"{text}\n")


def program(command: str) -> str:
    """Return a command's name for its --help."""
    return typed(command).removeprefix("python ")


def documented_parser(command: str, doc: str | None) -> argparse.ArgumentParser:
    """Return a parser whose --help is a module's docstring, with the command as typed here."""
    return Parser(
        prog=program(command),
        description=(doc or "").replace(f"python tools/{command}.py", typed(command)),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def add_checkpoint(parser: argparse.ArgumentParser) -> None:
    """Take a trained network as a position, or from ``--checkpoint``."""
    add, form = parser.add_mutually_exclusive_group(required=True).add_argument, "RUN_OR_FILE"
    # Without SUPPRESS, a missing position would overwrite the flag's value.
    none = argparse.SUPPRESS

    def path(text: str) -> Path | str:
        run = text.removesuffix("/config.yaml")
        is_name = Path("runs", run).is_dir() and not Path(run).exists()
        return text if text is none else Path("runs" if is_name else "", run)

    add("checkpoint", nargs="?", metavar=form, type=path, default=none, help=CHECKPOINT)
    add("--checkpoint", metavar=form, type=path, help="the same as RUN_OR_FILE")


def add_local_rank(parser: argparse.ArgumentParser) -> None:
    """Accept what the deepspeed launcher adds; LOCAL_RANK in the environment has the same value."""
    parser.add_argument("--local_rank", "--local-rank", help=argparse.SUPPRESS)
