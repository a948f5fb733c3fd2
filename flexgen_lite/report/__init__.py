"""A trace of a run as a page to read."""
