"""Start processes with torchrun; its code is in tetdist/apps/cli/torchrun.py."""

import sys

from tetdist_command import run

if __name__ == "__main__":
    sys.exit(run("torchrun"))
