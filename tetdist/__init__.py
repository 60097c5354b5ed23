"""tetdist: distributed training of spiking networks with Temporal Efficient Training.

Importing it registers the models with timm and needs torch and timm alone.
"""

import os
import sys

__version__ = "0.1.0"

# Python looks for the module of `python -m`, the word before the arguments; -mtetdist is one word.
_is_main = sys.argv[:1] == ["-m"] and sys.orig_argv[-len(sys.argv)] in ("tetdist", "-mtetdist")

# A command loads what it needs when it needs it; see tetdist_command.py.
if os.environ.pop("TETDIST_COMMAND", None) is None and not _is_main:
    from tetdist import losses, models
    from tetdist.nn import neurons

    __all__ = ["losses", "models", "neurons"]
