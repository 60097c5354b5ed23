"""Computed work of a training step, and the time that a kind of GPU needs for it."""
