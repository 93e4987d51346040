"""Faults planted in compiled kernels: which are noticed, and by what (command: python -m bench.mutations)."""
