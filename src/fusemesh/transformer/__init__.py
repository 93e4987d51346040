"""One Transformer (decoder, encoder or encoder-decoder), built from the modules of fusemesh.hybrid.tensor.modules."""

from .config import TransformerConfig
from .model import Transformer

__all__ = ["Transformer", "TransformerConfig"]
