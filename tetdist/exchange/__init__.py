"""Weights and networks in and out."""
