"""A run: set-up, training, evaluation, prediction, metrics, scaling."""
