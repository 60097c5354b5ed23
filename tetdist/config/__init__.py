"""The configuration of a run: its schema, how it is read, checked and compared."""
