"""``attn_implementation="fusemesh"`` for Hugging Face models; see ``interface.py``."""

from .interface import attention as attention
from .interface import attention_mask as attention_mask
from .interface import register as register
