"""Requests and sequences: accepted, waiting, in the batch, answered. Pure logic."""
