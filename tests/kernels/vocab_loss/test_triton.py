"""Layer: one process, Triton's interpreter. The loss's kernels against fp64 by the error budget.

Outputs are NaN before the kernels write them, inputs lie in a sea of NaN, and sizes are odd. Chunks and the columns of
a program are several, the last ones ragged.
"""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import pytest
import torch

import fusemesh
from fusemesh.kernels import backends
from fusemesh.kernels.measure.cases import VocabLossCase
from fusemesh.kernels.runtime import launch
from fusemesh.kernels.testing import budget, poison
from fusemesh.kernels.vocab_loss import chunked
from fusemesh.kernels.vocab_loss.chunked import Head
from fusemesh.kernels.vocab_loss.gpu import loss, tiles

pytestmark = pytest.mark.interpreter

SIZES = [(1, 17, 150), (70, 24, 333), (7, 100, 130), (130, 1, 65), (65, 65, 1)]  # N, E, V; tiles are 64 x 64 x 64
HEADS = list(itertools.product((False, True), (1.0, 0.25), (None, 3.0)))  # has_bias, scale, softcap
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


@pytest.fixture(autouse=True)
def several_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two parts where rows are one tile, one part else; chunks of three halves of a tile."""
    monkeypatch.setattr(tiles, "_ENOUGH_PROGRAMS", 2)
    monkeypatch.setattr(loss, "columns_of_a_chunk", lambda *_: 192)


def check(case: VocabLossCase, change: Any = lambda x: None) -> dict[str, torch.Tensor]:
    """Compare a case's results with fp64: gradients by the budget of its dtype, the loss by that of fp32."""
    x = case.inputs()
    change(x)
    inside = {name: poison.surround(t).view if name in case.leaves(x) else t for name, t in x.items()}
    with poison.poisoned_empty():
        found = case.compute(inside, "triton")
    exact, eager, absolute = case.expected(x)
    wide = {name: t.float() if t.is_floating_point() else t for name, t in x.items()}
    eager["loss"] = case.eager_call(wide)
    assert found.keys() == exact.keys()
    ratio = {1: (budget.RATIOS[case.torch_dtype][0],) * 2}  # of one element the mean is the largest
    for name, value in found.items():
        assert value.dtype == (torch.float32 if name == "loss" else case.torch_dtype)
        limits = {"absolute": absolute.get(name), "ratio": ratio.get(value.numel())}
        budget.check(name, value, exact[name], eager[name], **limits)
    return found


def cases() -> list[VocabLossCase]:
    """Every head in every dtype; the sizes take turns."""
    heads = itertools.product(DTYPES, HEADS)
    return [
        VocabLossCase(dtype, n, e, v, *head, ignored=min(2, n - 1))
        for (dtype, head), (n, e, v) in zip(heads, itertools.cycle(SIZES), strict=False)
    ]


@pytest.mark.parametrize("case", cases(), ids=str)
def test_loss_and_every_gradient(case: VocabLossCase) -> None:
    backends.reset_call_counts()
    first = check(case)
    assert backends.call_counts() == {("vocab_loss_forward", "triton"): 1, ("vocab_loss_backward", "triton"): 1}
    again = case.compute(case.inputs(), "triton")
    for name in first:
        assert torch.equal(first[name], again[name]), f"{name}: two runs differ"


@pytest.mark.parametrize("dtype", DTYPES)
def test_far_from_zero(dtype: str) -> None:
    """Logits around 3000, of which exponentials overflow where nothing is subtracted from them."""

    def far(x: dict[str, torch.Tensor]) -> None:
        x["h"][:, 0], x["weight"][:, 0] = 100.0, 30.0

    check(VocabLossCase(dtype, 9, 40, 150), far)


@pytest.mark.parametrize("backend", ["triton", "torch"])
@pytest.mark.parametrize("hidden", [slice(0, 140), slice(70, 270), slice(150, None)])
def test_columns_that_a_bias_of_minus_infinity_hides(
    hidden: slice, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whole tiles, chunks and programs of them, the first ones too: as if these columns were not there."""
    monkeypatch.setattr(chunked, "CHUNK_BYTES", 1)
    case = VocabLossCase("fp32", 5, 24, 290, has_bias=True)
    x = case.inputs()
    shown = torch.ones(290, dtype=torch.bool)
    shown[hidden] = False
    x["bias"][~shown] = -torch.inf
    x["targets"] = shown.nonzero().squeeze(1)[torch.tensor([0, 3, -1, 5, 7])]
    found = case.compute(x, backend)
    part = {**x, "weight": x["weight"][shown], "bias": x["bias"][shown], "targets": shown.cumsum(0)[x["targets"]] - 1}
    exact, eager, absolute = dataclasses.replace(case, columns=int(shown.sum())).expected(part)
    for name, value in found.items():
        if name in ("dweight", "dbias"):
            assert not value[~shown].any()
            value = value[shown]
        budget.check(name, value, exact[name], eager[name], absolute=absolute.get(name))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_tiles", [1, 2, 9])
def test_the_sums_are_those_of_the_chunks(dtype: str, num_tiles: int) -> None:
    """Targets of other ranks, in front of this one's columns and behind them, have no logit here."""
    x = VocabLossCase(dtype, 70, 33, 333, has_bias=True).inputs()
    head, local = Head(x["weight"], x["bias"], 0.5, 4.0), torch.randint(-300, 600, (70,))
    local[:6] = torch.tensor([0, 332, 333, -1, 2**32 + 3, 3 - 2**32])
    with poison.poisoned_empty():
        found = loss.forward(x["h"], head, local, num_tiles=num_tiles)
    wide, eager = (
        chunked.forward(x["h"].to(t), head._replace(weight=x["weight"].to(t), bias=x["bias"].to(t)), local)
        for t in (torch.float64, torch.float32)
    )
    for name in found._fields:
        budget.check(name, getattr(found, name), getattr(wide, name), getattr(eager, name))
    assert not found.own[(local < 0) | (local >= 333)].any()


@pytest.mark.parametrize("tile", [tiles.Tile(16, 128, 32, group=2), tiles.Tile(32, 16, 64, group=3)], ids=str)
def test_many_tiles_in_groups(tile: tiles.Tile, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles that end with a chunk or with the vocabulary, several rows of them, the last group incomplete."""
    monkeypatch.setattr(tiles, "choose", lambda *_: tile)
    monkeypatch.setattr(tiles, "_ENOUGH_PROGRAMS", 12)
    check(VocabLossCase("fp32", 81, 99, 435, True, 0.5, 3.0))


def test_a_rank_without_columns() -> None:
    h, head, local = torch.randn(5, 8), Head(torch.empty(0, 8), torch.empty(0), 1.0, None), torch.arange(5)
    found = loss.forward(h, head, local)
    assert (found.largest == -torch.inf).all() and not found.total.any() and not found.own.any()
    rows = torch.zeros(3, 5)
    dh, dweight, dbias = loss.backward(rows, h, head, local, (True, True, True))
    assert not dh.any() and dweight.shape == (0, 8) and dbias.shape == (0,)


def test_nothing_counts() -> None:
    x = VocabLossCase("bf16", 5, 24, 100, ignored=5).inputs()
    leaves = [x[name].requires_grad_() for name in ("h", "weight")]
    value = fusemesh.fused_linear_cross_entropy(*leaves, x["targets"], backend="triton")
    assert not value.any() and not any(g.any() for g in torch.autograd.grad(value.sum(), leaves))


def test_nan_is_not_hidden() -> None:
    """Of a row, or of one column: then the largest of the others is still a number."""
    for name, index, rows in (("h", (2, 3), [False, False, True, False, False]), ("weight", (70, 3), [True] * 5)):
        x = VocabLossCase("fp32", 5, 24, 150).inputs()
        x[name][index] = torch.nan
        for backend in ("triton", "torch"):
            value = fusemesh.fused_linear_cross_entropy(x["h"], x["weight"], x["targets"], backend=backend)
            assert value.isnan().tolist() == rows, (name, backend)


STRIDES = {
    "transposed": lambda w: w.t().contiguous().t(),
    "in wider rows": lambda w: torch.cat([w, w], 1)[:, : w.shape[1]],
    "every second row": lambda w: w.repeat_interleave(2, 0)[::2],
}


@pytest.mark.parametrize("name", STRIDES)
def test_weights_of_any_strides_without_a_copy(name: str) -> None:
    x = VocabLossCase("fp32", 9, 40, 150).inputs()
    local, rows = x["targets"], torch.stack([x["dloss"], torch.full((9,), 5.0), torch.ones(9)])
    head, other = (Head(w, None, 1.0, None) for w in (x["weight"], STRIDES[name](x["weight"])))
    for one, same in zip(loss.forward(x["h"], head, local), loss.forward(x["h"], other, local), strict=True):
        assert torch.equal(one, same)
    wanted = (True, True, False)
    have, want = (loss.backward(rows, x["h"], weight, local, wanted) for weight in (other, head))
    for one, same in zip(have[:2], want[:2], strict=True):
        torch.testing.assert_close(one, same)  # PyTorch's products may sum in another order
    seen: list[int] = []
    with launch.intercept(lambda kernel, grid, args, kwargs: seen.append(args[1].data_ptr())):
        loss.forward(x["h"], other, local)
    assert seen == [other.weight.data_ptr()]


def test_addresses_beyond_2_to_the_31() -> None:
    # The second row lies 2^31 + 8 elements after the first; untouched pages of the buffer take no memory.
    far = 2**31 + 8
    weight = torch.empty(far + 32, dtype=torch.float16).as_strided((2, 16), (far, 1))
    weight.copy_(torch.randn(2, 16))
    h, local, rows = torch.randn(3, 16).half(), torch.tensor([0, 1, 1]), torch.ones(3, 3)
    near = weight.clone(memory_format=torch.contiguous_format)
    assert near.stride() == (16, 1)
    for function, arguments in ((loss.forward, ()), (loss.backward, ((True, False, False),))):
        start = (h,) if function is loss.forward else (rows, h)
        have, want = (function(*start, Head(w, None, 1.0, None), local, *arguments) for w in (weight, near))
        assert all(torch.equal(a, b) for a, b in zip(have, want, strict=True) if a is not None)
