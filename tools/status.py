"""Show the status of runs; its code is in tetdist/apps/cli/status.py."""

import sys

from tetdist_command import run

if __name__ == "__main__":
    sys.exit(run("status"))
