"""Average the weights of several networks; its code is in tetdist/apps/cli/average.py."""

import sys

from tetdist_command import run

if __name__ == "__main__":
    sys.exit(run("average"))
