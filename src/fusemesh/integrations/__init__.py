"""FuseMesh's attention behind the interfaces of other libraries: PyTorch's, Hugging Face's and flash-attn's."""
