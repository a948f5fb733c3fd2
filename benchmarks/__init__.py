"""Measurements, each of ours against a peer in one run."""
