"""The command of tetdist/studies."""

from tetdist.studies.local import main

__all__ = ["main"]
