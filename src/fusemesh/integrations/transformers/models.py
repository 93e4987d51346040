"""Refuse Hugging Face models whose code, in the installed version, does not have the attention interface."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any

import torch

from fusemesh import compat
from fusemesh.kernels.attention.call.validation import wrong

# The first versions of transformers whose models of a type have the attention interface, where 4.57's have not.
_ROUTED_SINCE = {"bert": "5.0", "roberta": "5.0", "t5": "5.15", "mt5": "5.15"}
_names: set[str] = set()  # of attn_implementation, that are ours


def check_when_built(implementation: str) -> None:
    """Have transformers' check of attn_implementation refuse this one for models that cannot be routed. Idempotent."""
    from transformers import PreTrainedModel

    _names.add(implementation)

    def wrap(check: Callable[..., str]) -> Callable[..., str]:
        if getattr(check, "checks_for_fusemesh", False):
            return check

        @functools.wraps(check)
        def checked(self: Any, requested_attention: str | None, *args: Any, **kwargs: Any) -> str:
            # The parts of a model made of several ask for themselves.
            if requested_attention in _names and not getattr(self.config, "sub_configs", None):
                kinds = type(self).__mro__[: type(self).__mro__.index(PreTrainedModel)]
                _refuse_own_attention(self.config, [kind.__module__ for kind in kinds])
            return check(self, requested_attention, *args, **kwargs)

        checked.checks_for_fusemesh = True  # type: ignore[attr-defined]
        return checked

    compat.wrap_implementation_check(wrap)


def refuse_by_config(config: Any) -> None:
    """Raise for a model whose own attention would take our None for a mask that hides nothing."""
    _refuse_own_attention(config, [type(config).__module__.replace(".configuration_", ".modeling_")])


def _refuse_own_attention(config: Any, modules: list[str]) -> None:
    """Raise if the model whose classes are in these modules computes attention itself."""
    layer = _own_attention_of(tuple(modules))
    if layer is None:
        return
    since = _ROUTED_SINCE.get(getattr(config, "model_type", ""))
    newer = f"transformers {since} or later routes it" if since else "other versions of transformers may route it"
    raise wrong(
        "attn_implementation",
        "'eager' for this model",
        f"FuseMesh's for a {type(config).__name__}",
        f"{layer} of transformers {sys.modules['transformers'].__version__} computes attention itself and cannot be "
        f"routed; {newer}",
    )


@torch.compiler.assume_constant_result
def _own_attention_of(modules: tuple[str, ...]) -> str | None:
    """Return the first attention class in these modules, if none of them has the attention interface."""
    loaded = {name: vars(sys.modules[name]) for name in modules if ".modeling_" in name and name in sys.modules}
    if any(compat.ATTENTION_REGISTRY in names for names in loaded.values()):
        return None
    for name, names in loaded.items():
        for layer, kind in names.items():
            if isinstance(kind, type) and layer.endswith("Attention") and kind.__module__ == name:
                return layer
    return None
