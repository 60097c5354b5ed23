"""Starts the commands: `tetdist COMMAND`, and those of tools/, launch/ and tetdist/train.py.

`import tetdist` loads torch and timm, which takes seconds. A command answers --help and mistakes
before that, and sets variables that torch reads when it is loaded; so it asks tetdist/__init__.py,
by TETDIST_COMMAND, to load nothing ahead. That is why this module is outside the package.
"""

import importlib
import os
import signal
import sys

COMMANDS = {
    "train": "train a network; the same command continues a stopped run",
    "eval": "evaluate a checkpoint",
    "slurm": "send a run to a Slurm cluster; status, cancel, resume",
    "study": "train several configurations with several seeds, and report",
    "compare_runs": "where two runs part, or several side by side",
    "images": "index, check, shard or extract a data set of images",
    "prebin_dvs": "make tensors of recordings of event cameras",
    "digits": "make the data set of the quickstart",
    "cifar": "make a folder of images of a CIFAR archive",
    "convert": "take over weights from elsewhere",
    "export": "export a trained network",
    "bench": "measure speed and memory",
    "check_gpu": "check a machine with GPUs before training on it: ten minutes",
    "quickstart": "make the digits, train on them, evaluate: minutes on two cores",
}


def main() -> int:
    """Run ``tetdist COMMAND ...``; its exit status."""
    name, *arguments = sys.argv[1:] or ["--help"]
    name = name.replace("-", "_") if not name.startswith("-") else name
    if name in ("-h", "--help"):
        print("usage: tetdist COMMAND ...   (tetdist COMMAND --help says more)\n")
        print("\n".join(f"  {command:13} {text}" for command, text in COMMANDS.items()))
        return 0
    if name not in COMMANDS:
        known = ", ".join(COMMANDS)
        print(f"error: there is no command {name!r}; there are {known}", file=sys.stderr)
        return 2
    return run(name, arguments)


def run(name: str, arguments: list[str] | None = None) -> int:
    """Run the command in tetdist/cli/NAME.py with ``arguments``, or ``sys.argv``'s.

    Returns:
        Its exit status.
    """
    os.environ["TETDIST_COMMAND"] = name
    # Threads that spin while they wait for each other take the cores from those that decode images;
    # on a busy machine that cost a factor of three.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    # When a process has died, torch prints a C++ stack of each that notices; the watchdog names it.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    # In the background of a script the shell has Ctrl-C ignored, and what it starts inherits that.
    # But whoever ends the script so, or sends SIGINT on purpose, means what the script has started,
    # too, which would else go on at full load unseen. What is to stay can have a session (setsid).
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        from tetdist.distributed.starters import end_with_starters

        end_with_starters()
        command = importlib.import_module(f"tetdist.cli.{name}")
    except ModuleNotFoundError as error:
        print(f"error: the package {error.name} is not installed", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return int(command.main(arguments))


if __name__ == "__main__":
    sys.exit(main())
