"""Attention calls for the tests of kernels: tables of cases, guarded runs, and the comparison with fp64."""

from __future__ import annotations

import contextlib
import itertools
import math
import random
import types
from collections.abc import Iterator
from dataclasses import replace
from typing import Any
from unittest import mock

import torch

from fusemesh.kernels.attention.call.tensors import empty_laid_out_like
from fusemesh.kernels.attention.gpu import backward as triton_backward
from fusemesh.kernels.attention.gpu import bias_gradient as triton_bias_gradient
from fusemesh.kernels.attention.gpu import forward as triton_forward
from fusemesh.kernels.attention.reference import dense as reference
from fusemesh.kernels.measure.cases import AttentionCase
from fusemesh.kernels.measure.cases.common import DTYPES
from fusemesh.kernels.testing import poison


class Guard:
    """Hands out outputs that lie inside larger buffers of NaN, and tells whether anything beyond them was written."""

    def __init__(self) -> None:
        self.rows: list[tuple[torch.Tensor, int]] = []
        self.outputs: list[poison.Surrounded] = []

    def empty(self, *shape: Any, dtype: torch.dtype, device: Any = None) -> torch.Tensor:
        """torch.empty, contiguous, with 256 elements of NaN on either side."""
        sizes = torch.Size(shape[0] if len(shape) == 1 and not isinstance(shape[0], int) else shape)
        buffer = torch.full((sizes.numel() + 512,), math.nan, dtype=dtype)
        self.rows.append((buffer, sizes.numel()))
        return buffer[256 : 256 + sizes.numel()].view(sizes)

    def empty_laid_out_like(self, tensor: torch.Tensor, last: int) -> torch.Tensor:
        """As the function of spec.py, with NaN on either side in every dimension."""
        plain = empty_laid_out_like(tensor, last)
        is_transposed = plain.stride(1) < plain.stride(2)
        memory = plain.transpose(1, 2) if is_transposed else plain
        guarded = poison.surround(torch.full_like(memory, math.nan))
        self.outputs.append(guarded)
        return guarded.view.transpose(1, 2) if is_transposed else guarded.view

    def assert_intact(self) -> None:
        for guarded in self.outputs:
            guarded.assert_intact("an output")
        for buffer, count in self.rows:
            outside = torch.cat([buffer[:256], buffer[256 + count :]])
            assert outside.isnan().all(), "a kernel wrote beyond one of its rows of values"


@contextlib.contextmanager
def guarded_outputs() -> Iterator[None]:
    """Within the block the launchers' outputs hold NaN and are surrounded by it, which must stay intact."""
    guard = Guard()
    namespace = types.SimpleNamespace(empty=guard.empty, empty_like=lambda x: guard.empty(x.shape, dtype=x.dtype))
    namespace.float32 = torch.float32
    with contextlib.ExitStack() as patches:
        for module in (triton_forward, triton_backward, triton_bias_gradient):
            patches.enter_context(mock.patch.object(module, "torch", namespace))
        for module in (triton_forward, triton_backward):
            patches.enter_context(mock.patch.object(module, "empty_laid_out_like", guard.empty_laid_out_like))
        yield
    assert guard.outputs and guard.rows, "the launchers take their outputs from elsewhere"
    guard.assert_intact()


def surrounded(tensor: torch.Tensor | None) -> torch.Tensor | None:
    """The tensor in a sea of NaN (mask: of True), its dimensions in the same order in memory."""
    if tensor is None or tensor.dtype == torch.int64 or tensor.dim() == 1:
        return tensor
    if tensor.dim() == 4 and tensor.stride(1) < tensor.stride(2) and tensor.shape[1] > 1:
        return poison.surround(tensor.transpose(1, 2)).view.transpose(1, 2)
    return poison.surround(tensor).view


def run(case: AttentionCase, kernels: Any = None, **changed: torch.Tensor | None) -> dict[str, torch.Tensor]:
    """Forward and every gradient of a backend by its launchers, inputs and outputs as ``case`` has them.

    ``kernels`` is a module with both of them, or None for Triton's.

    A bias that is the same for all keys has a gradient of zero by cancellation, so that its sum over keys shows only
    how the saved out was rounded. There backward gets out in fp32; flash_attention has a formula without that sum.
    """
    x: dict[str, Any] = {**case.inputs(), **changed}
    call = case.call(x)
    forward, backward = (triton_forward, triton_backward) if kernels is None else (kernels, kernels)
    out, lse = forward.forward(x["q"], x["k"], x["v"], call)
    saved = out
    if x["bias"] is not None and x["bias"].shape[3] == 1:
        wide = call.replace(bias=x["bias"].double())
        saved = reference.forward(*(x[name].double() for name in "qkv"), wide)[0].float()
    dq, dk, dv, dbias, dsinks = backward.backward(
        x["do"], x["q"], x["k"], x["v"], saved, lse, x["dlse"], call, bias_grad=x["bias"] is not None
    )
    result = {"out": out, "lse": lse, "dq": dq, "dk": dk, "dv": dv}
    if dbias is not None:
        result["dbias"] = dbias
    if dsinks is not None:
        result["dsinks"] = dsinks
    return result


def compare(case: AttentionCase, result: dict[str, torch.Tensor], **changed: torch.Tensor | None) -> None:
    """Assert that every result of ``case`` is within the error budget."""
    x: dict[str, Any] = {**case.inputs(), **changed}
    case.check(result, case.expected(x))


def run_and_compare(case: AttentionCase) -> None:
    """:func:`run` and :func:`compare` with inputs and outputs in seas of NaN."""
    with guarded_outputs():
        result = run(case, **{name: surrounded(tensor) for name, tensor in case.inputs().items()})
    compare(case, result)


# One feature each, on sizes that no tile divides.
FEATURES = {
    "plain": AttentionCase(Sq=17, Sk=113),
    "batches_and_heads": AttentionCase(B=2, H=3, Hkv=3, Sq=17, Sk=17),
    "gqa": AttentionCase(H=4, Hkv=2, Sq=17, Sk=17),
    "mqa": AttentionCase(H=3, Hkv=1, Sq=17, Sk=17),
    "odd_head_dims": AttentionCase(D=20, Dv=40, Sq=17, Sk=17),
    "large_head_dims": AttentionCase(H=1, Hkv=1, D=192, Dv=129, Sq=17, Sk=17),
    "causal_top_left": AttentionCase(Sq=113, Sk=203, causal=True),
    "causal_bottom_right": AttentionCase(Sq=17, Sk=203, causal=True, align="bottom_right"),
    "window": AttentionCase(Sq=113, Sk=113, window=(9, 3)),
    "window_left": AttentionCase(Sq=113, Sk=113, window=(70, None)),
    "device_origin": AttentionCase(
        Sq=17,
        Sk=113,
        causal=True,
        window=(30, None),
        origin=(0, -20, 0, 0),
        device_origin=(2**40 + 21, 2**40, 3, 5),
    ),
    "mask": AttentionCase(Sq=17, Sk=113, mask="bhmn"),
    "mask_over_keys": AttentionCase(B=2, Sq=17, Sk=113, mask="bn"),
    "mask_over_queries": AttentionCase(Sq=113, Sk=17, mask="m"),
    "mask_of_heads": AttentionCase(B=2, Sq=17, Sk=17, mask="bh"),
    "bias": AttentionCase(B=2, Sq=17, Sk=113, bias="bhmn"),
    "bias_summed_over_batches": AttentionCase(B=3, Sq=17, Sk=17, bias="hmn"),
    "bias_summed_over_heads": AttentionCase(H=4, Hkv=2, Sq=17, Sk=17, bias="bmn"),
    "bias_over_keys": AttentionCase(B=2, Sq=17, Sk=113, bias="bn"),
    "bias_over_queries": AttentionCase(B=2, Sq=113, Sk=17, bias="hm"),
    "bias_of_heads": AttentionCase(B=2, Sq=17, Sk=17, bias="h"),
    "bias_in_fp32": AttentionCase(Sq=17, Sk=17, bias="mn", bias_dtype="fp32"),
    "dlse": AttentionCase(Sq=17, Sk=113, dlse=True),
    "negative_scale": AttentionCase(Sq=17, Sk=17, scale=-0.3),
    "zero_scale": AttentionCase(Sq=17, Sk=17, scale=0.0),
    "heads_inside_positions": AttentionCase(B=2, H=4, Hkv=2, Sq=17, Sk=17, layout="bshd"),
    "softcap": AttentionCase(Sq=17, Sk=113, softcap=1.5),
    "softcap_that_bites": AttentionCase(Sq=17, Sk=113, softcap=4.0, q_size=4.0, k_size=3.0),
    "alibi": AttentionCase(H=3, Hkv=1, Sq=17, Sk=113, alibi="h", origin=(96, 0, 0, 0)),
    "alibi_of_batches": AttentionCase(B=2, Sq=17, Sk=17, alibi="bh", origin=(0, 0, 3, 0)),
    "score_mod": AttentionCase(B=2, Sq=17, Sk=113, mod=True, origin=(96, 0, 3, 2)),
    "three_mods": AttentionCase(
        Sq=17, Sk=40, softcap=2.0, alibi="h", mod=True, causal=True, device_origin=(1000, 977, 3, 5)
    ),
    "mods_and_bias": AttentionCase(Sq=17, Sk=40, softcap=2.0, alibi="h", mask="mn", bias="n", dlse=True),
    "sinks": AttentionCase(B=2, H=4, Hkv=2, Sq=17, Sk=40, sinks=True),
    "sinks_and_dlse": AttentionCase(
        B=2, Sq=17, Sk=40, sinks=True, dlse=True, causal=True, origin=(0, 5, 0, 0), bias="hm"
    ),
    "dropout": AttentionCase(B=2, H=4, Hkv=2, Sq=17, Sk=113, dropout=0.2),
    "dropout_of_half": AttentionCase(Sq=40, Sk=17, dropout=0.5, dlse=True, bias="mn", device_origin=(7, 2, 3, 5)),
    "everything": AttentionCase(
        B=2,
        H=4,
        Hkv=2,
        Sq=33,
        Sk=40,
        causal=True,
        window=(25, None),
        align="bottom_right",
        mask="mn",
        bias="hmn",
        dlse=True,
        softcap=3.0,
        alibi="h",
        mod=True,
        sinks=True,
        dropout=0.15,
    ),
    "huge_logits": AttentionCase(Sq=17, Sk=113, q_size=5.0, k_size=3.0, causal=True, origin=(90, 0, 0, 0)),
}

# Every option of a call with the values that tests give it; the first is the plain one.
OPTIONS: dict[str, tuple[Any, ...]] = {
    "dtype": ("fp32", "bf16", "fp16"),
    "B": (1, 2),
    "heads": ((2, 2), (4, 2), (3, 1)),
    "sizes": ((17, 17), (1, 40), (33, 17), (17, 50)),
    "dims": ((16, 16), (24, 16), (16, 40)),
    "window": ((None, None), (None, 0), (9, 0), (5, 4)),
    "align": ("top_left", "bottom_right", "device"),
    "mask": (None, "mn", "n", "bh", "bhmn"),
    "bias": (None, "mn", "n", "hm", "bhmn", ""),
    "dlse": (False, True),
    "softcap": (None, 3.0),
    "alibi": (None, "h", "bh"),
    "mod": (False, True),
    "sinks": (False, True),
    "dropout": (0.0, 0.2),
    "scale": (None, -0.3),
    "layout": ("bhsd", "bshd"),
}


def pairwise(seed: int = 0, tries: int = 40) -> list[dict[str, Any]]:
    """Calls in which every two values of two options meet: of some random ones always the one that brings most."""
    draw = random.Random(seed)
    names = list(OPTIONS)
    missing = {
        ((a, i), (b, j))
        for a, b in itertools.combinations(names, 2)
        for i in range(len(OPTIONS[a]))
        for j in range(len(OPTIONS[b]))
    }
    found = []
    while missing:
        # Start from a pair that is missing, so that each call brings at least one.
        start = dict(min(missing))

        def made(start: dict[str, int] = start) -> dict[str, int]:
            return {name: start.get(name, draw.randrange(len(OPTIONS[name]))) for name in names}

        best = max((made() for _ in range(tries)), key=lambda c: len(missing & _pairs(c)))
        missing -= _pairs(best)
        found.append({name: OPTIONS[name][best[name]] for name in names})
    return found


def _pairs(choice: dict[str, int]) -> set[Any]:
    return set(itertools.combinations(choice.items(), 2))


def case_of(options: dict[str, Any]) -> AttentionCase:
    """The call with these values of :data:`OPTIONS`."""
    (H, Hkv), (Sq, Sk), (D, Dv) = options["heads"], options["sizes"], options["dims"]
    same = ("dtype", "B", "mask", "bias", "dlse", "softcap", "alibi", "mod", "sinks", "dropout", "scale", "layout")
    return AttentionCase(
        **{name: options[name] for name in same},
        H=H,
        Hkv=Hkv,
        Sq=Sq,
        Sk=Sk,
        D=D,
        Dv=Dv,
        window=None if options["window"] == (None, None) else options["window"],
        align="bottom_right" if options["align"] == "bottom_right" else None,
        device_origin=(2**33 + 5, 2**33 + 2, 3, 5) if options["align"] == "device" else None,
    )


def combinations(count: int, seed: int) -> list[AttentionCase]:
    """Calls that draw every feature at random, the same ones at every run."""
    draw = random.Random(seed)
    dims = ["mn", "n", "m", "", "bhmn", "hmn", "bn", "hm", "bm", "b", "h"]
    cases = []
    for _ in range(count):
        Hkv = draw.choice([1, 1, 2])
        Sq, Sk = draw.choice([1, 17, 17, 113]), draw.choice([1, 17, 17, 113, 203])
        window = draw.choice([(None, None), (None, 0), (None, 0), (20, 0), (5, 11), (70, None)])
        cases.append(
            AttentionCase(
                dtype=draw.choice(list(DTYPES)),
                B=draw.choice([1, 2]),
                H=Hkv * draw.choice([1, 2]),
                Hkv=Hkv,
                Sq=Sq,
                Sk=Sk,
                D=draw.choice([16, 33, 64, 80]),
                Dv=draw.choice([16, 48, 64]),
                window=None if window == (None, None) else window,
                origin=(draw.choice([0, Sk - Sq, 40]), 0, 0, 0),
                device_origin=draw.choice([None, None, (1000, 997, 3, 5)]),
                mask=draw.choice([None, None, *dims]),
                bias=draw.choice([None, None, *dims]),
                dlse=draw.choice([False, True]),
                layout=draw.choice(["bhsd", "bshd"]),
            )
        )
    return cases


def without_a_key(why: str, **options: Any) -> tuple[AttentionCase, dict[str, torch.Tensor], slice]:
    """Return a call of 40 queries some of which see no key, its mask, bias and dlse, and which queries these are.

    Args:
        why: what hides every key from them: ``mask``, ``bias`` or ``window``.
        options: of the case.
    """
    case = AttentionCase(H=2, Hkv=1, Sq=40, Sk=35, mask="mn", bias="mn", dlse=True, **options)
    x = case.inputs()
    mask, bias, dlse = x["mask"], x["bias"], x["dlse"]
    assert mask is not None and bias is not None and dlse is not None
    mask |= torch.rand(mask.shape, generator=torch.Generator().manual_seed(0)) < 0.9
    if why == "mask":
        mask[:, :, 5:20] = False
        empty = slice(5, 20)
    elif why == "bias":
        mask[:] = True
        bias[:, :, 33:] = -math.inf
        empty = slice(33, 40)
    else:
        mask[:] = True
        case = replace(case, causal=True, origin=(0, 10, 0, 0))
        empty = slice(0, 10)
    return case, {"mask": mask, "bias": bias, "dlse": dlse}, empty
