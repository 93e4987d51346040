"""The model of a run: a new Transformer of the configured sizes, or a pretrained one out of a Hugging Face folder."""
