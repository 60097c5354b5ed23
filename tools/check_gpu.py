"""Check a machine with GPUs; its code is in tetdist/apps/cli/check_gpu.py."""

import sys

from tetdist_command import run

if __name__ == "__main__":
    sys.exit(run("check_gpu"))
