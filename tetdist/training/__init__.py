"""The training loop, and what opens, continues and watches over a run."""
