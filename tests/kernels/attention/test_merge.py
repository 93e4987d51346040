"""Layer: one process, CPU, no Triton. Partial results over parts of the keys, merged, are attention over all keys."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch

import fusemesh
from fusemesh import merge_attention
from fusemesh.kernels.testing import budget

B, H, HKV, SQ, D, DV = 2, 4, 2, 5, 8, 6


def inputs(keys: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> dict[str, torch.Tensor]:
    """q, k, v, mask, sinks; the mask leaves row 1 no key at all and row 2 only the first one."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {"q": (B, H, SQ, D), "k": (B, HKV, keys, D), "v": (B, HKV, keys, DV), "sinks": (H,)}
    x = {name: torch.randn(shape, generator=generator, dtype=torch.float64) for name, shape in shapes.items()}
    x = {name: t.to(dtype) for name, t in x.items()}
    x["mask"] = torch.rand(B, 1, SQ, keys, generator=generator) > 0.3
    x["mask"][:, :, 1] = False
    x["mask"][:, :, 2, 1:] = False
    return x


def attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor, sinks: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention written out in q's dtype, differentiable; not the package's."""
    k, v = (x.repeat_interleave(H // HKV, 1) for x in (k, v))
    s = (q @ k.mT * D**-0.5).masked_fill(~mask, -math.inf)
    empty = ~mask.any(-1, keepdim=True).expand(*s.shape[:-1], 1)
    s = s.masked_fill(empty, 0.0)
    lse = torch.logsumexp(s, -1, keepdim=True)
    total = lse if sinks is None else torch.logaddexp(lse, sinks.to(s.dtype)[:, None, None])
    out = torch.exp(s - total).masked_fill(empty, 0.0) @ v
    return out, lse.masked_fill(empty, -math.inf).squeeze(-1)


def parts_of(x: dict[str, torch.Tensor], bounds: list[int]) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """out and lse of the keys between neighbouring bounds, by the package's reference."""
    found = []
    for low, high in itertools.pairwise(bounds):
        k, v, mask = x["k"][:, :, low:high], x["v"][:, :, low:high], x["mask"][..., low:high]
        found.append(fusemesh.flash_attention(x["q"], k, v, mask=mask, return_lse=True, backend="reference"))
    return [out for out, _ in found], [lse for _, lse in found]


SPLITS = {
    "one": [0, 11],
    "two": [0, 4, 11],
    "three": [0, 1, 2, 11],
    "four": [0, 3, 6, 9, 11],
    "with_empty_parts": [0, 0, 5, 5, 11, 11],
    "nothing_at_all": [0, 0, 0],
}


@pytest.mark.parametrize("with_sinks", [False, True])
@pytest.mark.parametrize("split", SPLITS)
def test_merged_parts_are_the_whole(split: str, with_sinks: bool) -> None:
    """Values and the gradients of q, k, v and sinks, in fp64, where some rows see no key in some or in all parts."""
    bounds = SPLITS[split]
    x = inputs(bounds[-1])
    leaves = [x[name].requires_grad_() for name in ("q", "k", "v", "sinks")]
    sinks = x["sinks"] if with_sinks else None
    out, lse = merge_attention(*parts_of(x, bounds), sinks)
    want_out, want_lse = attend(x["q"], x["k"], x["v"], x["mask"], sinks)
    torch.testing.assert_close(out, want_out, rtol=0, atol=1e-13)
    torch.testing.assert_close(lse, want_lse, rtol=0, atol=1e-13)
    assert (out[:, :, 1] == 0).all() and (lse[:, :, 1] == -math.inf).all()
    generator = torch.Generator().manual_seed(1)
    do = torch.randn(out.shape, generator=generator, dtype=torch.float64)
    dlse = torch.randn(lse.shape, generator=generator, dtype=torch.float64)
    leaves = leaves if with_sinks else leaves[:3]
    got = torch.autograd.grad((out, lse), leaves, (do, dlse))
    want = torch.autograd.grad((want_out, want_lse), leaves, (do, dlse))
    for name, a, b in zip(("q", "k", "v", "sinks"), got, want, strict=False):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-13, msg=lambda m, name=name: f"d{name}: {m}")


def test_gradients_of_the_merge_itself() -> None:
    """First and second derivatives against finite differences."""
    generator = torch.Generator().manual_seed(2)
    outs = [torch.randn(1, 2, 3, 4, generator=generator, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    lses = [torch.randn(1, 2, 3, generator=generator, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    sinks = torch.randn(2, generator=generator, dtype=torch.float64, requires_grad=True)

    def merge(*tensors: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return merge_attention(tensors[:3], tensors[3:6], tensors[6])

    assert torch.autograd.gradcheck(merge, (*outs, *lses, sinks))
    assert torch.autograd.gradgradcheck(merge, (*outs, *lses, sinks))


@pytest.mark.parametrize("with_sinks", [False, True])
def test_rows_without_a_key_take_and_give_nothing(with_sinks: bool) -> None:
    """What stands in a part that a row sees nothing of, and in the gradients of a row without key, may be NaN."""
    generator = torch.Generator().manual_seed(3)
    outs = [torch.randn(1, 2, 3, 4, generator=generator) for _ in range(2)]
    lses = [torch.randn(1, 2, 3, generator=generator) for _ in range(2)]
    lses[0][:, :, 0] = -math.inf
    lses[1][:, :, 1] = -math.inf
    for lse in lses:
        lse[:, :, 2] = -math.inf
    for out, lse in zip(outs, lses, strict=True):
        out[lse == -math.inf] = math.nan
    leaves = [x.requires_grad_() for x in (*outs, *lses)]
    sinks = torch.zeros(2, requires_grad=True) if with_sinks else None
    out, lse = merge_attention(outs, lses, sinks)
    assert (out[:, :, 2] == 0).all() and (lse[:, :, 2] == -math.inf).all()
    for row, part in ((0, 1), (1, 0)):
        share = 1.0 if sinks is None else lses[part][:, :, row, None].sigmoid()
        torch.testing.assert_close(out[:, :, row], share * outs[part][:, :, row])
        assert torch.equal(lse[:, :, row], lses[part][:, :, row])
    do, dlse = torch.ones_like(out), torch.ones_like(lse)
    do[:, :, 2], dlse[:, :, 2] = math.nan, math.nan
    leaves += [] if sinks is None else [sinks]
    gradients = torch.autograd.grad((out, lse), leaves, (do, dlse))
    assert all(gradient.isfinite().all() for gradient in gradients)
    for gradient, leaf in zip(gradients[:2], lses, strict=True):
        assert (gradient[leaf == -math.inf] == 0).all() and (gradient[leaf != -math.inf] != 0).all()


def test_a_sink_of_minus_infinity_is_none_and_a_huge_one_takes_all() -> None:
    x = inputs(11)
    parts = parts_of(x, [0, 4, 11])
    plain = merge_attention(*parts)
    absent = merge_attention(*parts, torch.full((H,), -math.inf, dtype=torch.float64))
    assert all(torch.equal(a, b) for a, b in zip(plain, absent, strict=True))
    out, lse = merge_attention(*parts, torch.full((H,), 1e4, dtype=torch.float64))
    assert (out == 0).all() and torch.equal(lse, plain[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_error_budget(dtype: torch.dtype) -> None:
    """Parts in the tested dtype, large lse: as good as eager attention over all keys at once."""
    x = inputs(64, dtype, seed=4)
    x["q"] = 6 * x["q"]
    out, lse = merge_attention(*parts_of(x, [0, 20, 30, 31, 64]), x["sinks"])
    exact = attend(*(x[name].double() for name in ("q", "k", "v")), x["mask"], x["sinks"].double())
    eager = attend(x["q"], x["k"], x["v"], x["mask"], x["sinks"])
    eager_lse = attend(*(x[name].float() for name in ("q", "k", "v")), x["mask"])[1]
    assert out.dtype == dtype and lse.dtype == torch.float32
    budget.check("out", out, exact[0], eager[0])
    budget.check("lse", lse, exact[1], eager_lse)


def test_packed_sequences() -> None:
    """out [total, H, Dv] with lse [H, total]: the same numbers."""
    x = inputs(11)
    outs, lses = parts_of(x, [0, 4, 11])
    want_out, want_lse = merge_attention(outs, lses, x["sinks"])
    packed_outs = [out.transpose(1, 2).flatten(0, 1) for out in outs]
    packed_lses = [lse.transpose(0, 1).flatten(1) for lse in lses]
    out, lse = merge_attention(packed_outs, packed_lses, x["sinks"])
    torch.testing.assert_close(out, want_out.transpose(1, 2).flatten(0, 1), rtol=0, atol=1e-15)
    torch.testing.assert_close(lse, want_lse.transpose(0, 1).flatten(1), rtol=0, atol=1e-15)


def test_compiles_whole() -> None:
    x = inputs(11)
    outs, lses = parts_of(x, [0, 4, 11])
    compiled = torch.compile(merge_attention, backend="aot_eager", fullgraph=True)
    for got, want in zip(compiled(outs, lses, x["sinks"]), merge_attention(outs, lses, x["sinks"]), strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=1e-15)


OUT, LSE = torch.zeros(1, 2, 3, 4), torch.zeros(1, 2, 3)
WRONG: dict[str, tuple[str, tuple[Any, ...], str, str]] = {
    "no_parts": ("outs", ([], []), "at least one tensor", "0 of them"),
    "a_tensor": ("outs", (OUT, [LSE]), "a tuple or list", "Tensor"),
    "lses_of_numbers": ("lses", ([OUT], [1.0]), "a tuple or list of at least one tensor", "1 of them"),
    "other_count": ("lses", ([OUT, OUT], [LSE]), "as many as outs, 2", "1"),
    "two_dims": ("outs", ([OUT[0, 0]], [LSE]), "[B, H, Sq, Dv] or packed", "(3, 4)"),
    "integers": ("outs", ([OUT.int()], [LSE]), "float tensors", "torch.int32"),
    "other_shape": ("outs[1]", ([OUT, OUT[:, :, :2]], [LSE, LSE]), "(1, 2, 3, 4)", "(1, 2, 2, 4)"),
    "other_dtype": ("outs[1]", ([OUT, OUT.half()], [LSE, LSE]), "torch.float32", "torch.float16"),
    "other_device": ("outs[1]", ([OUT, OUT.to("meta")], [LSE, LSE]), "on cpu", "on meta"),
    "lse_half": ("lses[0]", ([OUT.half()], [LSE.half()]), "torch.float32", "torch.float16"),
    "lse_shape": ("lses[0]", ([OUT], [LSE.mT]), "(1, 2, 3)", "(1, 3, 2)"),
    "sinks_a_number": ("sinks", ([OUT], [LSE], 1.0), "[H] = [2]", "float"),
    "sinks_shape": ("sinks", ([OUT], [LSE], torch.zeros(3)), "[H] = [2]", "(3,)"),
    "sinks_dtype": ("sinks", ([OUT], [LSE], torch.zeros(2, dtype=torch.float64)), "torch.float32", "torch.float64"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_calls(case: str) -> None:
    name, arguments, expected, received = WRONG[case]
    with pytest.raises(ValueError) as caught:
        merge_attention(*arguments)
    text = str(caught.value)
    assert text.startswith(f"{name}: expected ") and "; " in text
    assert expected in text.partition(", received ")[0] and received in text.partition(", received ")[2]
