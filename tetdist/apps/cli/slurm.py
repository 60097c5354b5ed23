"""Submit a run to a Slurm cluster once; it requeues itself until it is finished.

    python launch/slurm.py --config sew34_t4.yaml --nodes 2 --gpus-per-node 8
    python launch/slurm.py --config sew34_t4.yaml --dry-run --gpu H100
    python launch/slurm.py status|cancel|resume runs/sew34_t4

After a time limit or a preemption the run resumes at the step that it saved; after a node's crash,
at the last checkpoint. docs/slurm.md has the details.
"""

import logging
import sys

from tetdist.apps.cli.common import run_command
from tetdist.apps.slurm import command


def main(arguments: list[str] | None = None) -> int:
    """Return the exit status: 0 success, 1 a followed run did not finish, 2 a user error."""
    options = command.parse_arguments(sys.argv[1:] if arguments is None else arguments)
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    return run_command(lambda: command.run(options), interrupted="interrupted")
