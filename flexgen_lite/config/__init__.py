"""The engine's configuration."""
