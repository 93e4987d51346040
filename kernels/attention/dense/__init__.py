"""Attention of batches: flash_attention, its ops, merging, and MultiheadAttention."""
