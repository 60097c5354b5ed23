"""Backward pass, averaging over processes, clipping and update: DeepSpeed's and plain torch's."""
