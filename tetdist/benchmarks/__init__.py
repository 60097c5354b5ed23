"""Measurements of speed and memory, against others side by side."""
