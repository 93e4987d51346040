"""Attention over packed sequences: :func:`api.flash_attention_varlen`."""
