"""tetdist: distributed training of spiking networks with Temporal Efficient Training.

Importing it registers the models with timm and needs torch and timm alone.
"""

import os

__version__ = "0.1.0"

# A command loads what it needs when it needs it; see tetdist_command.py.
if os.environ.pop("TETDIST_COMMAND", None) is None:
    from tetdist import losses, models
    from tetdist.nn import neurons

    __all__ = ["losses", "models", "neurons"]
