"""Layer: kernels, one process. Options may be Python's, numpy's or PyTorch's numbers; what travels is Python's."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from torch._dynamo.testing import CompileCounter

import fusemesh
from fusemesh import MultiheadAttention, Origin
from fusemesh.kernels.attention.call import score_mods
from fusemesh.kernels.attention.call.options import Options
from fusemesh.kernels.attention.call.validation import normalise
from tests.support import spellings

Q = torch.randn(2, 2, 5, 16, generator=torch.Generator().manual_seed(0))


def _scaled(s: torch.Tensor, i_b: Any, i_h: Any, i_q: Any, i_k: Any, *, by: float) -> torch.Tensor:
    return s * by


SCALED = score_mods.register_score_mod(score_mods.ScoreMod("scalars_scaled", None, None, _scaled, num_params=1))

# What is written in other types, as options: from the value to the options.
NUMBERS: dict[str, tuple[float, Any]] = {
    "scale": (0.25, lambda x: {"scale": x}),
    "softcap": (2, lambda x: {"softcap": x}),
    "dropout_p": (0.25, lambda x: {"dropout_p": x, "seed": 3}),
    "score_mod": (0.5, lambda x: {"score_mod": SCALED(by=x)}),
}
INTEGERS: dict[str, tuple[int, Any]] = {
    "window": (3, lambda x: {"window": (x, None)}),
    "seed": (3, lambda x: {"dropout_p": 0.25, "seed": x}),
    "origin": (2, lambda x: {"causal": True, "origin": Origin(q=x, k=x, head=x, batch=x)}),
}


def spelled(name: str) -> tuple[Any, Any, dict[str, Any]]:
    value, options = {**NUMBERS, **INTEGERS}[name]
    found = spellings.numbers(value) if name in NUMBERS else spellings.integers(int(value))
    # PyTorch takes no tensor or array with a dimension for a number; positions and seeds may be tensors, and stay ones.
    tensors = name in ("seed", "origin")
    found = {
        k: x for k, x in found.items() if getattr(x, "ndim", 0) == 0 and not (tensors and isinstance(x, torch.Tensor))
    }
    return value, options, found


@pytest.mark.parametrize("name", [*NUMBERS, *INTEGERS])
def test_every_number_becomes_pythons(name: str) -> None:
    value, options, found = spelled(name)
    want = normalise(Q, Q, Options(**options(value)))
    assert len(found) >= 5
    for kind, x in found.items():
        call = normalise(Q, Q, Options(**options(x)))
        assert call.spec == want.spec, kind
        assert call.seed is None or torch.equal(call.seed, want.seed), kind  # type: ignore[arg-type]
        numbers = [*dataclasses.astuple(call.spec)]
        assert all(type(n) in (int, float, type(None), tuple) for n in numbers), (kind, numbers)


def test_every_function_takes_them() -> None:
    """Several options at once, through each function; flags may be numpy's."""
    three, half, yes = np.int64(3), torch.tensor(0.5), np.bool_(True)
    plain = {"window": (3, 0), "scale": 0.5, "softcap": 2.0, "causal": True}
    others = {"window": np.array([3, 0]), "scale": half, "softcap": np.float32(2), "causal": yes}
    flat, cu = Q[0].transpose(0, 1), torch.tensor([0, 3, 5])
    varlen: dict[str, Any] = {"align": "bottom_right"}
    lens = torch.tensor([3, 5])
    for options in (plain, others):
        n: Any = 3 if options is plain else three
        found = [
            fusemesh.flash_attention(Q, Q, Q, **options, return_lse=yes)[0],
            fusemesh.attention_forward(Q, Q, Q, **options, dropout_p=half, seed=n)[0],
            fusemesh.flash_attention_varlen(flat, flat, flat, cu, cu, n, n, **options, **varlen),
            fusemesh.flash_attention_varlen(flat, flat, flat, cu, cu, n, n, causal=np.bool_(False)),
            fusemesh.flash_attention_decode(Q, Q, Q, cache_lens=lens, align="bottom_right", **options),
            fusemesh.flash_attention_decode(Q, Q, cache_lens=lens, v_dim=n),
        ]
        if options is plain:
            want = found
    assert all(torch.equal(a, b) for a, b in zip(found, want, strict=True))
    for window, cap in (((3, 0), 2.0), (torch.tensor([3, 0]), np.float32(2))):
        torch.manual_seed(0)
        module = MultiheadAttention(8, 2, dropout=0.0, window=window, softcap=cap)
        assert module.window == (3, 0) and module.softcap == 2.0
    with pytest.raises(ValueError, match=r"^window: expected None or \(left, right\)"):
        MultiheadAttention(8, 2, window=3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"^softcap: expected a finite number above 0"):
        MultiheadAttention(8, 2, softcap=torch.ones(2))  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["scale", "softcap", "dropout_p", "score_mod"])
def test_what_is_no_number_is_refused_by_name(name: str) -> None:
    _, options = NUMBERS[name]
    for kind, x in {**spellings.WRONG_NUMBERS, "[1]": torch.ones(1)}.items():
        if x is None and name in ("scale", "softcap"):
            continue
        with pytest.raises(ValueError, match=f"^{name}.*: expected .*received") as caught:
            normalise(Q, Q, Options(**options(x)))
        assert "; " in str(caught.value), kind
    for x in spellings.WRONG_PAIRS.values():
        if x is not None:
            with pytest.raises(ValueError, match=r"^window: expected .*received"):
                normalise(Q, Q, Options(window=x))


def test_compiled_calls_take_pythons_numbers_in_one_graph() -> None:
    """Integers become symbols at the second value; a float is compiled for each value, as PyTorch's own scale is."""

    def call(q: torch.Tensor, window: int, scale: float) -> Any:
        return fusemesh.flash_attention(q, q, q, window=(window, 0), scale=scale)

    count = CompileCounter()
    compiled = torch.compile(call, backend=count, fullgraph=True)
    for window, scale in ((2, 0.5), (3, 0.5), (4, 0.5), (4, 0.75)):
        assert torch.equal(compiled(Q, window, scale), call(Q, window, scale))
    assert count.frame_count == 3
