"""Calls of each operation, described once for tests, benchmarks and the tuner: inputs, right answers, costs."""

from __future__ import annotations

from .attention import AttentionCase, self_attention
from .decode import DecodeCase
from .linear import LinearCase
from .packed import PackedCase
from .vocab_loss import VocabLossCase

Case = AttentionCase | DecodeCase | LinearCase | PackedCase | VocabLossCase

__all__ = ["AttentionCase", "Case", "DecodeCase", "LinearCase", "PackedCase", "VocabLossCase", "self_attention"]
