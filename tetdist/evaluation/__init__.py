"""The evaluation of a trained network: accuracy, early exit, firing, operations."""
