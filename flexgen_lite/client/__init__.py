"""The Python client of an engine, and what it submits and gets."""
