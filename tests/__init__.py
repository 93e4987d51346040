"""The tests; see the docstring of each file for its layer."""
