"""Measurements of speed and memory, of tetdist and of others side by side."""
