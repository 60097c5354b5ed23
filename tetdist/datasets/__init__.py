"""Data sets on disk: their indexes, layouts, archives and shards, checks, held-out parts."""
