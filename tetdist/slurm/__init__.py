"""A run on a Slurm cluster."""
