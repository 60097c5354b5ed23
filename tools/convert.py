"""Take over somebody's weights; all it does is in tetdist/apps/cli/convert.py."""

import sys

from tetdist_command import run

if __name__ == "__main__":
    sys.exit(run("convert"))
