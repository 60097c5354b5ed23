"""Export a trained network; its code is in tetdist/apps/cli/export.py."""

import sys

from tetdist_command import run

if __name__ == "__main__":
    sys.exit(run("export"))
