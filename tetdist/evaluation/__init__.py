"""What a trained network does: accuracy, early exit, firing, operations."""
