"""Sends runs to a Slurm cluster. The only part of the project that knows submitit.

slurm.py is the program; job.py is what it makes the cluster run.
"""
