"""Backend ``torch``: F.scaled_dot_product_attention, where its semantics suffice."""
