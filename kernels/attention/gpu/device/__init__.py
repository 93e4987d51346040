"""Functions that attention's Triton kernels are made of; nothing here launches."""
