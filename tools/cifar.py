"""Make a folder of images from a CIFAR archive; its code is in tetdist/apps/cli/cifar.py."""

import sys

from tetdist_command import run

if __name__ == "__main__":
    sys.exit(run("cifar"))
