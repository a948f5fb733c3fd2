"""A batch file through an engine, row by row, into a file of results."""
