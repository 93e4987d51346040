"""Backend ``triton`` of linear layers: launchers, kernels and tiles."""
