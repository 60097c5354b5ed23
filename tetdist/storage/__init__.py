"""Storage: atomic writing of files, checkpoints, and the Hugging Face hub."""
