"""From a checkpoint to a model without weights, and where its weights come from."""
