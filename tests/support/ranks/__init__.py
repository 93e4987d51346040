"""Functions that ranks run in distributed tests; ranks import them by their full names."""
