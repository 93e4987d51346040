"""Backend ``triton`` of the head's product with the cross entropy: launchers, kernels and tiles."""
