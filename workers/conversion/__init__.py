"""Writes a checkpoint anew, with its weights in few bits. Runs in the process of a command."""
