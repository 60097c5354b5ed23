"""Weights of other libraries taken over, and trained networks given away."""
