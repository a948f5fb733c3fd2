"""Datasets of Ray Data through engines: rows of a cluster's job, an engine in each actor."""
