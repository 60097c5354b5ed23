"""The work of a training step, and the time that a kind of GPU takes for it: computed."""
