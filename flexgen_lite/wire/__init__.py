"""What crosses between processes, and the ways that it takes."""
