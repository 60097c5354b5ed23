"""Say how runs are; all it does is in tetdist/apps/cli/status.py."""

import sys

from tetdist_command import run

if __name__ == "__main__":
    sys.exit(run("status"))
