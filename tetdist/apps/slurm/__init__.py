"""A run on a Slurm cluster: submitted once, and continued until it is finished."""
