"""Private and undocumented names of torch and transformers that this floor uses, each with the reason.

Tried with torch 2.13.0 and 2.14.1, transformers 5.20.2 and 5.24.0. tests/app/test_compat.py tells by name which of them
a new version no longer has.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import sys
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any, NamedTuple

import torch


class FusedPath(NamedTuple):
    """A function of torch that torch.nn calls and :func:`fusemesh.accelerate` replaces."""

    name: str

    @property
    def shown(self) -> str:
        """The name that routes and reports show."""
        return f"torch.{self.name}"


# The fused inference paths of nn.MultiheadAttention and nn.TransformerEncoderLayer call these functions: there is no
# public hook between the module and its kernel.
FUSED_ATTENTION = FusedPath("_native_multi_head_attention")
FUSED_ENCODER_LAYER = FusedPath("_transformer_encoder_layer_fwd")


class _CompilersTable(importlib.abc.MetaPathFinder):
    """Loads torch.compile's table of PyTorch's functions so that it names the original of a function replaced by us."""

    NAME = "torch._dynamo.trace_rules"

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name != self.NAME:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path, target)
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def exec_module(module: Any) -> None:
            execute(module)
            _name_originals(module)

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def _name_originals(table: Any) -> None:
    """Have torch._dynamo.trace_rules, which finds functions by their names, find the originals of those we replace."""
    load = getattr(table, "load_object", None)
    if load is not None and not hasattr(load, "names_originals"):

        def load_object(name: str) -> Any:
            return original_of(load(name))

        load_object.names_originals = True  # type: ignore[attr-defined]
        table.load_object = load_object


def original_of(function: Any) -> Any:
    """Return the function of PyTorch that ``function`` replaces, or ``function`` where it replaces none."""
    return getattr(function, "replaced_by_fusemesh", function)


def keep_out_of_compilers_table() -> None:
    """Have torch.compile know PyTorch's functions also where its package is imported while they are replaced.

    It looks them up by name when it is imported, and traces into what is not in its table; PyTorch's own
    multi_head_attention_forward does not compile so. To import it here would take 2 s of programs that compile nothing.
    """
    if _CompilersTable.NAME in sys.modules:
        _name_originals(sys.modules[_CompilersTable.NAME])
    elif not any(isinstance(x, _CompilersTable) for x in sys.meta_path):
        sys.meta_path.insert(0, _CompilersTable())


def is_tracing_tensor(kind: type) -> bool:
    """Return whether ``kind`` is a tensor class of torch.compile or torch.export: their package is private."""
    return kind.__module__.startswith("torch._subclasses.")


def norms(tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    """Return the 2-norm of each tensor by one kernel for all: torch.nn.utils has only the norm over all of them."""
    return list(torch._foreach_norm(tensors))


def skip_steps_where(optimizer: torch.optim.Optimizer, flag: torch.Tensor) -> None:
    """Have a fused optimizer do nothing in steps where the fp32 scalar ``flag``, read on the device, is not 0.

    GradScaler sets this attribute; a public way would copy the flag to the host in every step.
    """
    optimizer.found_inf = flag  # type: ignore[attr-defined]


# The global by which a modeling file of transformers that has the attention interface looks the attention up.
ATTENTION_REGISTRY = "ALL_ATTENTION_FUNCTIONS"


def causal_mask_function() -> Callable[..., Any]:
    """Return transformers' mask function of plain causal layers, to recognise it by identity."""
    from transformers.masking_utils import causal_mask_function as found

    return found


def bidirectional_mask_function() -> Callable[..., Any] | None:
    """Return transformers' mask function that hides nothing; None in versions without it."""
    from transformers import masking_utils

    return getattr(masking_utils, "bidirectional_mask_function", None)


def boolean_mask(**arguments: Any) -> torch.Tensor | None:
    """Return the boolean mask of transformers' own sdpa attention, of which ours is a special case."""
    from transformers.masking_utils import sdpa_mask

    return sdpa_mask(**arguments)


def wrap_implementation_check(wrap: Callable[[Callable[..., str]], Callable[..., str]]) -> None:
    """Replace transformers' check of ``attn_implementation`` by ``wrap`` of it.

    It is the only place that a model passes before it is built; AttentionInterface.register has no refusal.
    """
    from transformers import PreTrainedModel

    check = PreTrainedModel.get_correct_attn_implementation
    PreTrainedModel.get_correct_attn_implementation = wrap(check)  # type: ignore[method-assign]
