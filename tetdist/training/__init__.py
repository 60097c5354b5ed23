"""The training loop, and the modules that open, resume and monitor a run."""
