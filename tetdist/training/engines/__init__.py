"""Engines (DeepSpeed, plain torch): backward pass, averaging over processes, clipping, update."""
