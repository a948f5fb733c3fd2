"""From messages to a prompt, by the chat template of the model."""
