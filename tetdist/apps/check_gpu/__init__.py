"""Checks of a machine with GPUs: is all right that runs there, and how fast? One file each."""
