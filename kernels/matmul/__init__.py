"""Matmuls of linear layers, fused with their activations, on one device and over a process group."""
