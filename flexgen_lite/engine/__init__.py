"""The coordinator's process: it drives the workers and serves the clients."""
