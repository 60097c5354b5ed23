"""Make a folder of images of Fashion-MNIST; its code is in tetdist/apps/cli/fashion_mnist.py."""

import sys

from tetdist_command import run

if __name__ == "__main__":
    sys.exit(run("fashion_mnist"))
