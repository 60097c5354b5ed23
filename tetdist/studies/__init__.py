"""Several runs that answer a question."""
