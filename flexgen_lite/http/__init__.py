"""The OpenAI API over HTTP, in front of an engine."""
