"""The processes of a run: who they are, what they agree on, whether they live."""
