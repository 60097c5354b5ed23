"""Compare runs; its code is in tetdist/apps/cli/compare_runs.py."""

import sys

from tetdist_command import run

if __name__ == "__main__":
    sys.exit(run("compare_runs"))
