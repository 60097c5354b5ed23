"""Train and evaluate a small spiking network on real digits: data/digits, runs/quickstart."""

import os
import shlex
import subprocess
import sys

from tetdist.apps.cli.common import program, run_command
from tetdist.config.flags import Parser
from tetdist.distributed.launchers import as_launcher
from tetdist.errors import typed

DATA, RUN = "data/digits", "runs/quickstart"
STEPS: tuple[tuple[str, ...], ...] = (
    ("digits", DATA),
    ("train", "--config", "quickstart.yaml"),
    ("eval", RUN, "--json", f"{RUN}/evaluation.json"),
)


def main(arguments: list[str] | None = None) -> int:
    """Return the exit status: 0 done, or that of the failed command."""
    parser = Parser(
        prog=program("quickstart"),
        description="Prepare 5,000 digits, train on 4,000, evaluate on the other 1,000: two "
        "minutes on two cores. The same command continues when stopped.",
    )
    parser.parse_args(arguments)
    return run_command(run, interrupted="interrupted; the same command continues")


def run() -> int:
    for command, *rest in STEPS:
        print(f"$ {typed(command, *rest)}", flush=True)
        if status := _status_of([sys.executable, "-m", "tetdist_command", command, *rest]):
            return status
    print(f"\nThe run is in {RUN}, its curves are in {RUN}/plots/learning_curves.png.")
    print(f"To train with another seed: {typed('train')} {shlex.join(STEPS[1][1:])} seed=1 name=s1")
    return 0


def _status_of(command: list[str]) -> int:
    """Return a command's exit status; after Ctrl-C, when it has saved and ended."""
    process = subprocess.Popen(command, env=os.environ | as_launcher())
    try:
        return process.wait()
    except KeyboardInterrupt:  # the terminal has sent it to the command as well
        return process.wait() or 130
