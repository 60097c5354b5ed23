"""Make a folder of images of a CIFAR archive; all it does is in tetdist/apps/cli/cifar.py."""

import sys

from tetdist_command import run

if __name__ == "__main__":
    sys.exit(run("cifar"))
