"""The demonstration: a small record-normalising model, its data and its training script."""
