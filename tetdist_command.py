"""Start a command: `tetdist COMMAND`, or a script of tools/, launch/ or tetdist/train.py.

`import tetdist` loads torch and timm, which takes seconds. A command must handle --help and user
errors before that, and set variables that torch reads at import; so it sets TETDIST_COMMAND, which
makes tetdist/__init__.py load nothing ahead. That is why this module is outside the package.
"""

import contextlib
import difflib
import errno
import importlib
import os
import signal
import sys
from collections.abc import Callable
from typing import TextIO

# Errors of writing, which name no file: a full, damaged or read-only disk.
DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS)
COMMANDS = {
    "train": "train a network; the same command continues a stopped run",
    "eval": "evaluate a checkpoint",
    "replay": "stream a recording through a network trained on windows of a fixed size",
    "show": "draw a sample's spikes, the network's answer over time and what speaks for it",
    "slurm": "submit a run to a Slurm cluster; status, cancel, resume",
    "torchrun": "start processes with torchrun, and exit with their status",
    "study": "train several configurations with several seeds, and report",
    "status": "show progress, ETA, results and checkpoint of runs",
    "compare_runs": "compare the results, keys, metrics and weights of runs",
    "images": "index, check or shard a data set of images",
    "prebin_dvs": "convert recordings of event cameras to tensors",
    "digits": "write the data set of the quickstart",
    "cifar": "unpack a CIFAR archive into image folders",
    "fashion_mnist": "write Fashion-MNIST as image folders",
    "convert": "convert weights of other projects",
    "export": "export a trained network",
    "bench": "measure the speed of a training step and of the loader",
    "check_gpu": "check a machine with GPUs before training on it; takes ten minutes",
    "list": "list recipes, networks, neurons, losses and optimisers",
    "quickstart": "train and evaluate on handwritten digits; two minutes on two cores",
}


def main() -> int:
    """Run ``tetdist COMMAND ...`` and return its exit status."""
    return _answer_while_read(lambda: _main(*(sys.argv[1:] or ["--help"])))


def run(name: str, arguments: list[str] | None = None) -> int:
    """Run the command in tetdist/apps/cli/NAME.py with ``arguments``, or ``sys.argv``'s.

    Returns:
        Its exit status; 141, as a shell says it, when what reads its output has ended.
    """
    return _answer_while_read(lambda: _run(name, arguments))


def _answer_while_read(command: Callable[[], int]) -> int:
    """Carry out a command, and answer for its output: all that it prints passes through here.

    A command whose output nobody reads any more, as with ``... | head``, ends silently. An error
    of a file or disk is printed as one sentence.
    """
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            # It is closed, and the next file to be opened would get its number.
            setattr(sys, name, os.fdopen(os.open(os.devnull, os.O_RDWR), mode))
    try:
        try:
            return command()
        except SystemExit as ended:  # argparse's, after --help as well
            if isinstance(ended.code, str):
                raise
            return ended.code or 0
        except KeyboardInterrupt:  # before the command itself answers
            print("interrupted; nothing was written", file=sys.stderr)
            return 130
        finally:
            # Python's own exit takes a second, in which Ctrl-C would print a traceback.
            signal.signal(signal.SIGINT, signal.SIG_IGN)
            # Python itself would do so later, where nobody could see that it fails.
            sys.stdout.flush()
    except OSError as error:
        streams = (sys.stdout, sys.stderr) if error.filename is None else ()
        lost = [stream for stream in streams if is_lost(stream)]
        if not lost:
            if error.filename is None and error.errno not in DISK:
                raise  # another pipe is broken: that is a fault
            from tetdist.errors import sentence

            print(f"error: {sentence(error)}", file=sys.stderr)
            return 2
        for stream in lost:
            with contextlib.suppress(OSError):
                stream.close()  # else Python would try to write the rest at its end
        if isinstance(error, BrokenPipeError):
            return 128 + signal.SIGPIPE
        if sys.stderr not in lost:
            text = f"error: the output cannot be written ({error.strerror})"
            print(f"{text}; free disk space, or redirect it to another place", file=sys.stderr)
        return 2


def is_lost(stream: TextIO) -> bool:
    """Return whether a stream takes no output: its disk is full, or its reader has gone."""
    try:
        # Standard error keeps what it could not write, and fails again without more.
        stream.write("" if stream is sys.stderr else "\n")
        stream.flush()
    except OSError:
        return True
    return False


def _main(name: str, *arguments: str) -> int:
    name = name.replace("-", "_") if not name.startswith("-") else name
    if name in ("-h", "--help", "help"):
        if arguments and not arguments[0].startswith("-"):
            return _main(arguments[0], "--help")
        print("usage: tetdist COMMAND ...   (tetdist COMMAND --help shows its options)")
        print("       tetdist --version\n")
        print("\n".join(f"  {command:13} {text}" for command, text in COMMANDS.items()))
        return 0
    if name == "--version":
        from importlib.metadata import version

        print(f"tetdist {version('tetdist')}")
        return 0
    if name not in COMMANDS:
        known = [*COMMANDS, "--help", "--version", "train --explain"]
        close = difflib.get_close_matches(name, known, n=1, cutoff=0.63)  # infer is not cifar
        hint = f"did you mean {close[0]}?" if close else f"choose from {', '.join(COMMANDS)}"
        print(f"error: there is no command {name!r}; {hint}", file=sys.stderr)
        return 2
    return _run(name, list(arguments))


def _run(name: str, arguments: list[str] | None) -> int:
    if "tetdist" not in sys.modules:  # its import removes this again
        os.environ["TETDIST_COMMAND"] = name
    # Threads that spin while they wait for each other take the cores from those that decode images;
    # on a busy machine that cost a factor of three.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    # When a process has died, torch prints a C++ stack of each that notices; the watchdog names it.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    # A shell starts a script's background commands with Ctrl-C ignored, and their children inherit
    # that. But a SIGINT to the script is meant for this command, too, which would otherwise go on
    # at full load, unseen. What is to go on can have a session of its own (setsid).
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        from tetdist.distributed.launchers import end_with_launchers

        end_with_launchers()
        command = importlib.import_module(f"tetdist.apps.cli.{name}")
    except ModuleNotFoundError as error:
        from tetdist.errors import sentence

        print(f"error: {sentence(error)}", file=sys.stderr)
        return 2
    return int(command.main(arguments))


if __name__ == "__main__":
    sys.exit(main())
