"""Attention of a few new tokens over a KV cache: :func:`api.flash_attention_decode`."""
