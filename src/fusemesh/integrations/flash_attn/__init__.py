"""flash-attn 2's functions, computed by FuseMesh; see ``functions.py`` for what they share."""

from .cache import flash_attn_with_kvcache as flash_attn_with_kvcache
from .functions import flash_attn_func as flash_attn_func
from .functions import flash_attn_kvpacked_func as flash_attn_kvpacked_func
from .functions import flash_attn_qkvpacked_func as flash_attn_qkvpacked_func
from .functions import flash_attn_varlen_func as flash_attn_varlen_func
from .functions import flash_attn_varlen_kvpacked_func as flash_attn_varlen_kvpacked_func
from .functions import flash_attn_varlen_qkvpacked_func as flash_attn_varlen_qkvpacked_func
