"""Train a spiking network; its code is in tetdist/apps/cli/train.py."""

import sys
from pathlib import Path

# When it runs this file, Python searches its folder first, where names such as data and events
# would hide other packages' modules. A launcher may also start it without tetdist installed.
if sys.path and Path(sys.path[0]).resolve() == Path(__file__).resolve().parent:
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from tetdist_command import run

if __name__ == "__main__":
    sys.exit(run("train"))
