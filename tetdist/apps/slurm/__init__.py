"""Runs on a Slurm cluster: submitted once, and resumed until they are finished."""
