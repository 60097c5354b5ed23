"""tetdist: distributed training of spiking networks with Temporal Efficient Training.

Importing it registers the models with timm and needs torch and timm alone.
"""

from tetdist import losses, models, neurons

__version__ = "0.1.0"
__all__ = ["losses", "models", "neurons"]
