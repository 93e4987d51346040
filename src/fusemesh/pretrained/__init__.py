"""A user's Hugging Face folder as the model of a run."""
