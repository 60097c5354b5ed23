"""What a training step asks of a GPU, and how long a GPU of a kind takes for it: computed."""
