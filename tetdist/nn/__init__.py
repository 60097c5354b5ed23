"""Layers: neurons, batch norm, and both as one operation, with spikes stored as bytes."""

# Each of these modules registers its kinds of neurons in `neurons.NEURONS`.
from tetdist.nn import integer_neurons, learned_decay, parallel_neurons

__all__ = ["integer_neurons", "learned_decay", "parallel_neurons"]
