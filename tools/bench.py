"""Measure speed and memory; its code is in tetdist/apps/cli/bench.py."""

import sys

from tetdist_command import run

if __name__ == "__main__":
    sys.exit(run("bench"))
