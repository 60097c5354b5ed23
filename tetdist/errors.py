"""Exceptions that commands print as one sentence, and the advice in these sentences.

No message, and no file that a command writes, holds a password of an address; see
`without_passwords`.
"""

import errno
import re
import shlex
import sys
from pathlib import Path

# Extras that install a package that may be missing; all other packages come with training.
_EXTRAS = {
    "h5py": "train,events",
    "lz4": "train,events",
    "mlxtend": "train,quickstart",
    "nir": "train,export",
    "nirtorch": "test",
    "onnx": "train,export",
    "onnxruntime": "train,export",
    "onnxscript": "train,export",
    "spikingjelly": "spikingjelly",
    "tensorboard": "tensorboard",
    "wandb": "wandb",
    "zstandard": "train,events",
}
_PASSWORDS = re.compile(
    # A server's user is removed, too. Digits after a colon may be a port.
    r"\b(https?://)(?:[^\s/?#]*|[^\s/?#:]*:(?!\d)\S*)@"
    r"|\b((?!https?:)[\w+]+://[^\s:/]*):\S*(?=@)"
    r"|([?&](?:\w*passw(?:or)?d|\w*token|odbc_connect)=)[^\s&#'\"]*"
)
_CHECKOUT = Path(__file__).resolve().parents[1]
# The scripts of a checkout by their command, where not in tools/.
_SCRIPTS = {
    "train": "tetdist/train.py",
    "slurm": "launch/slurm.py",
    "torchrun": "launch/torchrun.py",
}


class UserError(ValueError):
    """A mistake that the user can correct.

    Its text is one clear sentence that names the key, file or step and the way out. Commands print
    it and exit with status 2, as for an OSError that names a file. Any other exception is a bug of
    tetdist and keeps its traceback.
    """


class WrongValue(UserError):
    """A wrong value, or a contradiction, of a key.

    Args:
        key: The dotted key, within the section or neuron that refuses its value.
        text: Remainder of the sentence, without the value: "must be above 0".
        value: The value; it comes last if the text begins with "must", else before the text.
    """

    def __init__(self, key: str, text: str, value: object = "") -> None:
        if value == "":
            verbs = ("must", "needs", "has no ", "is missing")
            super().__init__(f"{key}{' ' if text.startswith(verbs) else ': '}{text}")
        elif text.startswith("must"):
            super().__init__(f"{key} {text}, not {value}")
        else:
            super().__init__(f"{key}: {value} {text}")
        self.key, self.text, self.value = key, text, value

    def within(self, *sections: str) -> "WrongValue":
        """Return the error with the names of sections before its key."""
        return WrongValue(".".join([*sections, self.key]), self.text, self.value)

    def names(self, key: str) -> bool:
        """Return whether the text names another key, which the value contradicts."""
        return key in re.findall(r"[\w.]+", self.text)


class PeerFailed(Exception):
    """Raised when another process of the run has died, hangs or failed; the text says which.

    Commands print it and exit with status `PEER_FAILED`.
    """


PEER_FAILED = 3


class FailedElsewhere(SystemExit):
    """Raised when an action failed on another process of the run, which prints the cause."""


class Stopped(Exception):
    """A signal ended the run after a saved step; the same command continues it."""


def sentence(error: Exception) -> str:
    """Return an error as a sentence: of a missing package with the command that installs it, of the
    operating system with its file."""
    if isinstance(error, ModuleNotFoundError) and error.name:
        package = error.name.partition(".")[0]
        extra = _EXTRAS.get(package, "train,cuda130")
        return f"the package {package} is not installed; {pip_install(extra)}"
    text = str(error)
    if isinstance(error, OSError) and error.filename is not None:
        text = (
            f"{error.filename} cannot be used ({error.strerror}); correct this path, or its place"
        )
    return printable(without_passwords(text))


def printable(text: str) -> str:
    """Escape control characters: a name may contain them, and a terminal would obey them."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def without_passwords(text: str) -> str:
    """Remove passwords from the addresses in a text, and user names from those of http servers."""
    return _PASSWORDS.sub(lambda found: found[1] or found[2] or found[3], text)


def script_of(command: str) -> Path | None:
    """Return the script of a command in the checkout; None if tetdist is installed without one."""
    script = _CHECKOUT / _SCRIPTS.get(command, f"tools/{command}.py")
    # tetdist/train.py is in an installed package, too; launch/ is not.
    is_checkout = (_CHECKOUT / _SCRIPTS["slurm"]).is_file()
    return script if is_checkout and script.is_file() else None


def typed(command: str, *arguments: object) -> str:
    """Return the command line to type for a command: a script of the checkout, or ``tetdist
    COMMAND``."""
    # A user of `tetdist` may not be in the checkout's folder.
    script = None if Path(sys.argv[0]).name == "tetdist" else script_of(command)
    program = f"python {script.relative_to(_CHECKOUT)}" if script else f"tetdist {command}"
    shown = (shlex.quote(without_passwords(str(argument))) for argument in arguments)
    return " ".join([program, *shown])


def pip_install(extras: str) -> str:
    """Return the command that installs tetdist with these extras; it is on no package index."""
    if script_of("slurm"):
        return f"pip install -e {shlex.quote(f'{_CHECKOUT}[{extras}]')}"
    return f"pip install 'FOLDER_OR_WHEEL[{extras}]', with the folder or wheel of tetdist"


def way_out(error: BaseException) -> str:
    """Return the advice for a file that could not be written."""
    number = error.errno if isinstance(error, OSError) else None
    if number in (errno.EACCES, errno.EPERM, errno.EROFS):
        return "get permission to write there, or choose another runs_dir=..."
    if number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return "free disk space, or choose another runs_dir=..."
    if isinstance(error, MemoryError):
        return "free memory"
    return "correct that, or choose another runs_dir=..."
