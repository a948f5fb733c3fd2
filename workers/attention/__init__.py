"""The attention worker: the KV cache of its share of the sequences, and attention over it."""
