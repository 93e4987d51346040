"""Records and tokens of language models, in memory and on disk."""
