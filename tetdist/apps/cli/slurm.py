"""Send a run to a Slurm cluster, once; it finishes by itself.

    python launch/slurm.py --config sew34_t4.yaml --nodes 2 --gpus-per-node 8
    python launch/slurm.py --config sew34_t4.yaml --dry-run --gpu H100
    python launch/slurm.py status|cancel|resume runs/sew34_t4

Time limits and preemptions stop it at a saved step and it goes on; so it does after a crash of a
node. docs/slurm.md says more.
"""

import logging
import sys

from tetdist.apps.cli.common import answer
from tetdist.apps.slurm import command


def main(arguments: list[str] | None = None) -> int:
    """Exit status: 0 as asked, 1 a followed run did not finish, 2 a mistake of the user's."""
    options = command.parse_arguments(sys.argv[1:] if arguments is None else arguments)
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    return answer(lambda: command.run(options), interrupted="interrupted")
