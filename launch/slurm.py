"""Send a run to a Slurm cluster; its code is in tetdist/apps/cli/slurm.py."""

import sys

from tetdist_command import run

if __name__ == "__main__":
    sys.exit(run("slurm"))
