"""Applications around the core, which never imports them: commands, Slurm, studies, reports."""
