"""The command of tetdist/reports/compare.py."""

from tetdist.reports.compare import main

__all__ = ["main"]
