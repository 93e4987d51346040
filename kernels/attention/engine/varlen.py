"""Packed attention on the C++ engine, which reads the lengths where they are."""

from __future__ import annotations

from ..call.packed import by_batch
from . import dense

forward, backward = by_batch(dense.forward, dense.backward)
