"""The answer of all commands to a mistake, a missing package and Ctrl-C."""

import sys
from collections.abc import Callable
from pathlib import Path

from tetdist.errors import PEER_FAILED, PeerFailed, UserError, sentence, typed

# A person's mistakes; anything else is a fault of ours and keeps its traceback.
MISTAKES = (UserError, ModuleNotFoundError)


def answer(
    command: Callable[[], int | None],
    *,
    interrupted: str = "interrupted; nothing was written",
    mistakes: tuple[type[Exception], ...] = MISTAKES,
) -> int:
    """Carry out a command; its exit status: 2 for a person's mistake, 3 where another process of
    several has died, 130 for Ctrl-C.

    Args:
        command: Returns its exit status; None is 0.
        interrupted: What is said after Ctrl-C.
        mistakes: What is said in one sentence.
    """
    try:
        return command() or 0
    except mistakes as error:
        return fail(error)
    except PeerFailed as error:
        fail(error)
        return PEER_FAILED
    except KeyboardInterrupt:
        print(interrupted, file=sys.stderr)
        return 130


def fail(error: Exception, prefix: str = "") -> int:
    """Say what is wrong; the exit status of that."""
    print(f"{prefix}error: {sentence(error)}", file=sys.stderr)
    return 2


def check_new_weights(output: Path) -> None:
    """Refuse to write weights over others, or into a checkpoint, which they would damage.

    Raises:
        UserError: ``--output`` would do so.
    """
    from tetdist.storage import checkpoint

    if (output.parent / checkpoint.MANIFEST_FILE).exists():
        raise UserError(f"--output: {output.parent} is a checkpoint; choose another folder")
    if output.exists():
        raise UserError(f"{output} exists; choose another --output, or remove it first")


def program(command: str) -> str:
    """The name of a command in its own --help."""
    return typed(command).removeprefix("python ")
