"""Packed attention in Triton: the kernels of forward.py and backward.py on views of packed tensors.

Nothing waits for the device, and no length is compiled into a kernel.
"""

from __future__ import annotations

from ..call.packed import by_batch
from . import dense

forward, backward = by_batch(dense.forward, dense.backward)
