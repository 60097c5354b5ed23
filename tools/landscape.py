"""Measure the sharpness of trained networks; its code is in tetdist/apps/cli/landscape.py."""

import sys

from tetdist_command import run

if __name__ == "__main__":
    sys.exit(run("landscape"))
