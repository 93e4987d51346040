"""Backend ``triton``: launchers and kernels of attention."""
