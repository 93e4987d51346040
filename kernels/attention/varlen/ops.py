"""The torch.library ops of packed attention; library.py defines them."""

from __future__ import annotations

from types import ModuleType

from ..call.op_fields import OpFields
from ..call.options import Call
from ..library import register_attention

# Positions are the sequences' own, and fp8 is refused.
FIELDS = OpFields(Call, without=("origin", "descale"))


def _reference() -> ModuleType:
    from ..reference import varlen

    return varlen


register_attention("attention_varlen", FIELDS, _reference)
