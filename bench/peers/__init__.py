"""Whom FuseMesh is compared with: PyTorch's own ops, and packages where they are installed."""
