"""Benchmarks of speed and memory, of tetdist and other libraries."""
