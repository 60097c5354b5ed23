"""Draw what a network does with one sample; its code is in tetdist/apps/cli/show.py."""

import sys

from tetdist_command import run

if __name__ == "__main__":
    sys.exit(run("show"))
