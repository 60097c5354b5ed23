"""The command of tetdist/benchmarks."""

from tetdist.benchmarks.bench import main

__all__ = ["main"]
