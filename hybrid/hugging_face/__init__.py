"""Hugging Face models on a mesh: families, their folders read and written by slices, their stages for a pipeline."""
