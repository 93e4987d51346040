"""The torch.library op of decode. Its caches are arguments that it changes; it has no gradient."""

from __future__ import annotations

from typing import Any

import torch

from ... import backends, env
from ...backend_record import AUTO, implementation
from ...op_rules import by_sample, define
from ..call.errors import wrong
from ..call.op_fields import OpFields
from ..call.tensors import empty_laid_out_like
from ..library import laid_out_like, lse_like
from . import validation
from .spec import DecodeCall

# There are no positions of a whole, no dropout, no fp8 and no packed sequences in decode.
FIELDS = OpFields(
    DecodeCall,
    without=(
        *("origin", "origin_q", "origin_k", "origin_head", "origin_batch"),
        *("seed", "dropout_p", "descale", "packed"),
    ),
    mutable=("k_cache", "v_cache"),
    names={"params": "numbers"},
)


def _decode(*arguments: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Append and attend; see :class:`DecodeCall`."""
    *values, backend = arguments
    call: DecodeCall = FIELDS.unpack(values)
    if env.CHECK:
        validation.check_contents(call)
    if call.k_new is not None:
        caches = [call.k_cache] if call.v_cache is None else [call.k_cache, call.v_cache]
        torch.autograd.graph.increment_version(caches)
    found = None
    if backend in ("triton", AUTO):
        from ...proof import calls

        found = calls.decode(call, values, backend == "triton")
        # The new keys go to the same slots once more.
        backend = backends.instead_of("triton", call.request()).name if found is None else "triton"
    out, lse = implementation(backend, "attention_decode").decode(call) if found is None else found
    backends.count("attention_decode", backend)
    return laid_out_like(out, call.q), lse.contiguous()


def _decode_fake(*arguments: Any) -> tuple[torch.Tensor, torch.Tensor]:
    call: DecodeCall = FIELDS.unpack(arguments[:-1])
    return empty_laid_out_like(call.q, call.v_dim), lse_like(call.q)


def _decode_vmap(info: Any, in_dims: tuple[Any, ...], *arguments: Any) -> tuple[Any, Any]:
    """Each sample by itself; refuses a cache that all samples would append to."""
    call: DecodeCall = FIELDS.unpack(arguments[:-1])
    dims = FIELDS.by_name(in_dims[:-1])
    for name in ("k_cache", "v_cache"):
        if call.k_new is not None and getattr(call, name) is not None and dims[name] is None:
            received = "one that all samples share, to which each would append"
            remedy = "give the mapped function a cache of its own by in_dims, or append before"
            raise wrong(name, "a cache for each sample of torch.func.vmap", received, remedy)
    return by_sample("attention_decode")(info, in_dims, *arguments)


SCHEMA = f"({FIELDS.schema}, str backend) -> (Tensor out, Tensor lse)"
define("attention_decode", SCHEMA, _decode, _decode_fake, _decode_vmap)
