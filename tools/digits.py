"""Make the data set of the quickstart; its code is in tetdist/apps/cli/digits.py."""

import sys

from tetdist_command import run

if __name__ == "__main__":
    sys.exit(run("digits"))
