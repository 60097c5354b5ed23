"""Storage: files written whole or not at all, checkpoints, and the Hugging Face hub."""
