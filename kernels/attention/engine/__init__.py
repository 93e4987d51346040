"""Backend ``cpu``: the C++ engine (csrc/) on tensors."""
