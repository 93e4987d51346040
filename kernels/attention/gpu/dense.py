"""Attention of batches on the GPU: the modules of backend ``triton`` for it."""

from .backward import backward as backward
from .forward import forward as forward
