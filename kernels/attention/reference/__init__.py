"""Backend ``reference``: attention in plain PyTorch, which defines what is right."""
