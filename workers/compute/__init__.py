"""The compute worker: the forward of the model, attention of prompts, sampling."""
