"""flexgen-lite as a model of the Language Model Evaluation Harness (the `lm_eval` package)."""
