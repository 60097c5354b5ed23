"""Make tensors from event recordings; its code is in tetdist/apps/cli/prebin_dvs.py."""

import sys

from tetdist_command import run

if __name__ == "__main__":
    sys.exit(run("prebin_dvs"))
