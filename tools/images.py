"""Index, check, pack and unpack images; its code is in tetdist/apps/cli/images.py."""

import sys

from tetdist_command import run

if __name__ == "__main__":
    sys.exit(run("images"))
