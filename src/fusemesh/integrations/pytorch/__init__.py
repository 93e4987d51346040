"""PyTorch's own attention functions, computed by FuseMesh."""
