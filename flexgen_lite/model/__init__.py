"""A Hugging Face model directory, and what the engine knows of the model in it."""
