"""Layers: neurons, batch norm and both as one operation, with spikes kept as bytes."""
