"""Checks of a machine with GPUs: correct results, and speed. One file for each check."""
