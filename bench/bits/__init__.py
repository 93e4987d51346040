"""The calls of equal_bits.py: each a name, a function of drawn inputs and a backend, and the backends asked."""
