"""Layer: application. The probabilities that flash-attn's functions return for tests, negative where dropped."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import fusemesh
from fusemesh.integrations.flash_attn import functions as ours
from tests.support import flash_attn_semantics as published
from tests.support.flash_attn_inputs import LENS_K, LENS_Q, bounds, dense, new, ragged
from tests.support.flash_attn_semantics import SCORES


def test_probabilities_have_no_tangent() -> None:
    x = torch.randn(1, 5, 2, 16, generator=torch.Generator().manual_seed(0))
    cu = torch.tensor([0, 2, 5])

    def of_a_batch(x: torch.Tensor) -> torch.Tensor:
        return ours.flash_attn_func(x, x, x, 0.2, return_attn_probs=True)[2]

    def packed(x: torch.Tensor) -> torch.Tensor:
        return ours.flash_attn_varlen_func(x[0], x[0], x[0], cu, cu, 3, 3, 0.2, return_attn_probs=True)[2]

    for function in (of_a_batch, packed):
        signed, tangent = torch.func.jvp(function, (x,), (x,))
        assert signed.any() and not tangent.any()


def unit_values(lens: list[int], heads: int, dtype: torch.dtype) -> torch.Tensor:
    """Packed values [total, heads, 16]: key j's is the j-th unit vector, so that outputs are probabilities."""
    return torch.cat([torch.eye(n, 16, dtype=dtype) for n in lens])[:, None].expand(-1, heads, -1)


def by_sequence(x: torch.Tensor, lens: list[int]) -> torch.Tensor:
    """Packed [total, H, K] as [B, H, longest, K], with zeros."""
    parts = [torch.nn.functional.pad(part, (0, 0, 0, 0, 0, max(lens) - len(part))) for part in x.split(lens)]
    return torch.stack(parts).transpose(1, 2)


def probabilities(name: str, packed: bool, dtype: torch.dtype, p: float) -> tuple[torch.Tensor, ...]:
    """S_dmask of a call, what it multiplied the values by, and the published probabilities, all [B, H, Sq, Sk]."""
    scores = SCORES[name]
    if packed:
        (q, k, _), v = ragged(dtype), unit_values(LENS_K, 2, dtype)
        want, _ = published.packed(q.double(), k.double(), v.double(), LENS_Q, LENS_K, scores)
        lengths = (bounds(LENS_Q), bounds(LENS_K), max(LENS_Q), max(LENS_K))
        options = scores.arguments(len(LENS_Q), q.shape[1])
        out, _, signed = ours.flash_attn_varlen_func(q, k, v, *lengths, p, **options, return_attn_probs=True)
        return signed, *(by_sequence(x, LENS_Q)[..., : max(LENS_K)] for x in (out, want))
    q, k, _ = dense("few", dtype)
    v = unit_values([k.shape[1]], 2, dtype).expand(2, -1, -1, -1)
    want, _ = published.batched(q.double(), k.double(), v.double(), scores)
    out, _, signed = ours.flash_attn_func(q, k, v, p, **scores.arguments(2, q.shape[2]), return_attn_probs=True)
    return signed, *(x.transpose(1, 2)[..., : k.shape[1]] for x in (out, want))


@pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])
@pytest.mark.parametrize("backend, name", [*(("reference", name) for name in SCORES), ("cpu", "plain"), ("cpu", "all")])
def test_probabilities_with_dropout_are_signed(backend: str, name: str, packed: bool) -> None:
    """The size is that before dropout; the sign is negative exactly where this very call dropped."""
    dtype, p = torch.float64 if backend == "reference" else torch.float32, 0.4
    torch.manual_seed(0)
    with fusemesh.use_backend(backend):
        signed, weights, want = probabilities(name, packed, dtype, p)
    assert signed.shape == want.shape and signed.dtype == dtype and not signed.requires_grad
    close_to = {"rtol": 1e-12, "atol": 1e-12} if backend == "reference" else {"rtol": 1e-5, "atol": 1e-6}
    torch.testing.assert_close(signed.abs().double(), want, **close_to)
    torch.testing.assert_close(torch.where(signed >= 0, signed / (1 - p), 0), weights, **close_to)
    assert torch.equal(weights == 0, signed <= 0)
    assert 0.2 < (signed < 0).sum() / (want > 0).sum() < 0.6


@pytest.mark.interpreter
@pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])
def test_probabilities_of_tritons_calls(packed: bool) -> None:
    torch.manual_seed(0)
    with fusemesh.use_backend("triton"):
        signed, weights, want = probabilities("causal-window", packed, torch.float32, 0.4)
    torch.testing.assert_close(signed.abs().double(), want, rtol=1e-5, atol=1e-6)
    assert torch.equal(weights == 0, signed <= 0) and (signed < 0).any()


def test_probabilities_of_all_functions() -> None:
    """The packed forms' are those of the separate tensors; half precision's are in its dtype; pages change nothing."""
    x, cu = new(2, 5, 3, 4, 16, seed=1, dtype=torch.bfloat16), bounds([5, 5])
    q, k, v = x.unbind(2)
    flat, kv = x.flatten(0, 1), torch.stack((k, v), 2)
    pages = [part.reshape(10, 1, 4, 16) for part in (k, v)]
    table = torch.arange(10, dtype=torch.int32).reshape(2, 5)
    lengths = (cu, cu, 5, 5)
    calls: dict[str, Callable[..., Any]] = {
        "func": lambda **o: ours.flash_attn_func(q, k, v, 0.3, **o),
        "qkvpacked": lambda **o: ours.flash_attn_qkvpacked_func(x, 0.3, **o),
        "kvpacked": lambda **o: ours.flash_attn_kvpacked_func(q, kv, 0.3, **o),
        "varlen": lambda **o: ours.flash_attn_varlen_func(*flat.unbind(1), *lengths, 0.3, **o),
        "varlen_qkvpacked": lambda **o: ours.flash_attn_varlen_qkvpacked_func(flat, cu, 5, 0.3, **o),
        "varlen_kvpacked": lambda **o: ours.flash_attn_varlen_kvpacked_func(
            flat[:, 0], kv.flatten(0, 1), *lengths, 0.3, **o
        ),
        "pages": lambda **o: ours.flash_attn_varlen_func(flat[:, 0], *pages, *lengths, 0.3, block_table=table, **o),
    }
    found = {}
    for name, call in calls.items():
        torch.manual_seed(0)
        _, _, found[name] = call(causal=True, return_attn_probs=True)
        assert found[name].dtype == torch.bfloat16 and (found[name] < 0).any(), name
        torch.testing.assert_close(found[name], found["func"], msg=name)
        assert torch.equal(found[name] < 0, found["func"] < 0), name
    with torch.autocast("cpu", torch.bfloat16):
        wide = ours.flash_attn_func(q.float(), k.float(), v.float(), 0.3, return_attn_probs=True)[2]
    assert wide.dtype == torch.bfloat16
