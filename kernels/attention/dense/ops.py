"""The torch.library ops of attention of batches; library.py defines them."""

from __future__ import annotations

from types import ModuleType

from ..call.op_fields import OpFields
from ..call.options import Call
from ..library import register_attention

FIELDS = OpFields(Call, without=("packed",))


def _reference() -> ModuleType:
    from ..reference import dense

    return dense


register_attention("attention", FIELDS, _reference)
