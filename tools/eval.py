"""Evaluate a checkpoint; its code is in tetdist/apps/cli/eval.py."""

import sys

from tetdist_command import run

if __name__ == "__main__":
    sys.exit(run("eval"))
