"""Ours against other inference engines on the same machine: see `__main__.py`."""
