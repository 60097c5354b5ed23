"""Stream a recording through a network; its code is in tetdist/apps/cli/replay.py."""

import sys

from tetdist_command import run

if __name__ == "__main__":
    sys.exit(run("replay"))
