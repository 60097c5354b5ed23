"""Convert other libraries' weights; its code is in tetdist/apps/cli/convert.py."""

import sys

from tetdist_command import run

if __name__ == "__main__":
    sys.exit(run("convert"))
