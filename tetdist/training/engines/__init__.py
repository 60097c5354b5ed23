"""Backward pass, gradient averaging and update."""
