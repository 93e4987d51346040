"""Tensor parallelism: modules, and tables that split a model of plain modules."""
