"""Train a study; its code is in tetdist/apps/cli/study.py."""

import sys

from tetdist_command import run

if __name__ == "__main__":
    sys.exit(run("study"))
