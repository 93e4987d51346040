"""Attention calls for the tests of kernels: one description of a call, its inputs, and its comparison with fp64."""

from __future__ import annotations

import contextlib
import itertools
import math
import random
import types
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
import triton
import triton.language as tl

from fusemesh.kernels.attention.call import score_mods
from fusemesh.kernels.attention.call.options import Call
from fusemesh.kernels.attention.call.spec import AttentionSpec
from fusemesh.kernels.attention.call.tensors import empty_laid_out_like
from fusemesh.kernels.attention.gpu import backward as triton_backward
from fusemesh.kernels.attention.gpu import bias_gradient as triton_bias_gradient
from fusemesh.kernels.attention.gpu import forward as triton_forward
from fusemesh.kernels.attention.reference import dense as reference
from fusemesh.kernels.testing import poison
from fusemesh.kernels.testing.attention import check, expected

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Case:
    """One call. Dims of mask and bias are written as a subset of "bhmn", the dimensions in which they are not 1."""

    dtype: str = "fp32"
    B: int = 1
    H: int = 2
    Hkv: int = 2
    Sq: int = 17
    Sk: int = 113
    D: int = 16
    Dv: int = 16
    window_left: int | None = None
    window_right: int | None = None
    origin_q: int = 0
    origin_k: int = 0
    origin: tuple[int, int] | None = None  # on the device
    mask: str | None = None
    bias: str | None = None
    bias_dtype: str | None = None  # default: that of q
    dlse: bool = False
    scale: float | None = None  # default: 1 / sqrt(D)
    q_size: float = 1.0
    k_size: float = 1.0
    layout: str = "bhsd"  # or "bshd": positions outside heads in memory
    softcap: float | None = None
    alibi: str | None = None  # dims of the slopes, "h" or "bh"
    mod: bool = False  # the mod of this file
    sinks: bool = False
    dropout: float = 0.0
    origin_head: int = 0
    origin_batch: int = 0

    def __str__(self) -> str:
        default = Case()
        changed = [
            f"{name}={getattr(self, name)}".replace(" ", "")
            for name in self.__dataclass_fields__
            if getattr(self, name) != getattr(default, name)
        ]
        return "-".join(changed) or "default"

    @property
    def spec(self) -> AttentionSpec:
        return AttentionSpec(
            scale=self.D**-0.5 if self.scale is None else self.scale,
            window_left=self.window_left,
            window_right=self.window_right,
            origin_q=self.origin_q,
            origin_k=self.origin_k,
            origin_head=self.origin_head,
            origin_batch=self.origin_batch,
            mods=tuple(part.mod.name for part in self.mods()),
            params=tuple(number for part in self.mods() for number in part.params),
            dropout_p=self.dropout,
        )

    def mods(self) -> list[score_mods.BoundScoreMod]:
        """The score mods of the call with their tensors, in the contract's order."""
        generator = torch.Generator().manual_seed(99)
        bound = []
        if self.softcap is not None:
            bound.append(score_mods.softcap(self.softcap))
        if self.alibi is not None:
            slopes = torch.rand((self.B, self.H) if "b" in self.alibi else (self.H,), generator=generator) / 8
            bound.append(score_mods.alibi(slopes, torch.empty(self.B, self.H, 1, 1)))
        if self.mod:
            bound.append(TABLE_MOD(torch.randn(TABLE, generator=generator), weight=0.25))
        return bound

    def inputs(self) -> dict[str, torch.Tensor | None]:
        """q, k, v, do, dlse, mask, bias, origin; the same at every call."""
        generator = torch.Generator().manual_seed(1234)
        dtype = DTYPES[self.dtype]

        def new(*shape: int, size: float = 1.0) -> torch.Tensor:
            return (size * torch.randn(*shape, generator=generator)).to(dtype)

        def heads(heads: int, positions: int, dim: int, size: float = 1.0) -> torch.Tensor:
            if self.layout == "bshd":
                return new(self.B, positions, heads, dim, size=size).transpose(1, 2)
            return new(self.B, heads, positions, dim, size=size)

        def shape(dims: str) -> tuple[int, ...]:
            whole = {"b": self.B, "h": self.H, "m": self.Sq, "n": self.Sk}
            return tuple(size if name in dims else 1 for name, size in whole.items())

        mask = bias = None
        if self.mask is not None:
            mask = torch.rand(shape(self.mask), generator=generator) > 0.3
        if self.bias is not None:
            bias = torch.randn(shape(self.bias), generator=generator).to(DTYPES[self.bias_dtype or self.dtype])
        return {
            "q": heads(self.H, self.Sq, self.D, self.q_size),
            "k": heads(self.Hkv, self.Sk, self.D, self.k_size),
            "v": heads(self.Hkv, self.Sk, self.Dv),
            "do": heads(self.H, self.Sq, self.Dv),
            "dlse": torch.randn(self.B, self.H, self.Sq, generator=generator) if self.dlse else None,
            "mask": mask,
            "bias": bias,
            "origin": None if self.origin is None else torch.tensor([*self.origin, 3, 5]),
            "sinks": torch.randn(self.H, generator=generator).to(dtype) if self.sinks else None,
            "seed": torch.tensor([2**40 + 7]) if self.dropout else None,
        }

    def call(self, x: dict[str, Any]) -> Call:
        """The call that a backend's functions take, of :meth:`inputs`."""
        names = ("mask", "bias", "origin", "sinks", "seed")
        aux = tuple(tensor for part in self.mods() for tensor in part.aux)
        return Call(self.spec, aux=aux, **{name: x[name] for name in names})


# A user's mod: it reads a table by position, depends on the head and the batch, and has a slope that is not 1.
TABLE = 97


@triton.jit
def _table_mod(b_s, i_b, i_h, i_q, i_k, aux, numbers):
    b_index = (((i_q - i_k) % 97) + 97) % 97
    return b_s + numbers[0] * tl.load(aux[0] + b_index) * (1.0 + 0.1 * (i_h + 2 * i_b)) * b_s


@triton.jit
def _table_mod_backward(b_ds, b_s, i_b, i_h, i_q, i_k, aux, numbers):
    b_index = (((i_q - i_k) % 97) + 97) % 97
    return b_ds * (1.0 + numbers[0] * tl.load(aux[0] + b_index) * (1.0 + 0.1 * (i_h + 2 * i_b)))


def _table_mod_torch(
    s: torch.Tensor,
    i_b: torch.Tensor,
    i_h: torch.Tensor,
    i_q: torch.Tensor,
    i_k: torch.Tensor,
    table: torch.Tensor,
    *,
    weight: float,
) -> torch.Tensor:
    return s + weight * table.to(s.dtype)[(i_q - i_k) % TABLE] * (1.0 + 0.1 * (i_h + 2 * i_b)) * s


TABLE_MOD = score_mods.register_score_mod(
    score_mods.ScoreMod("table of the tests", _table_mod, _table_mod_backward, _table_mod_torch, 1, 1)
)


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
        """That of spec.py, with NaN on either side in every dimension."""
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


def run(case: Case, kernels: Any = None, **changed: torch.Tensor | None) -> dict[str, torch.Tensor]:
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


def compare(case: Case, result: dict[str, torch.Tensor], **changed: torch.Tensor | None) -> None:
    """Assert that every result of ``case`` is within the error budget."""
    x: dict[str, Any] = {**case.inputs(), **changed}
    names = ("q", "k", "v", "do", "dlse")
    check(result, expected(**{name: x[name] for name in names}, call=case.call(x)))


def run_and_compare(case: Case) -> None:
    """:func:`run` and :func:`compare` with inputs and outputs in seas of NaN."""
    with guarded_outputs():
        result = run(case, **{name: surrounded(tensor) for name, tensor in case.inputs().items()})
    compare(case, result)


# One feature each, on sizes that no tile divides.
FEATURES = {
    "plain": Case(Sq=17, Sk=113),
    "batches_and_heads": Case(B=2, H=3, Hkv=3, Sq=17, Sk=17),
    "gqa": Case(H=4, Hkv=2, Sq=17, Sk=17),
    "mqa": Case(H=3, Hkv=1, Sq=17, Sk=17),
    "odd_head_dims": Case(D=20, Dv=40, Sq=17, Sk=17),
    "large_head_dims": Case(H=1, Hkv=1, D=192, Dv=129, Sq=17, Sk=17),
    "causal_top_left": Case(Sq=113, Sk=203, window_right=0),
    "causal_bottom_right": Case(Sq=17, Sk=203, window_right=0, origin_q=186),
    "window": Case(Sq=113, Sk=113, window_left=9, window_right=3),
    "window_left": Case(Sq=113, Sk=113, window_left=70),
    "device_origin": Case(Sq=17, Sk=113, window_right=0, window_left=30, origin_k=-20, origin=(2**40 + 21, 2**40)),
    "mask": Case(Sq=17, Sk=113, mask="bhmn"),
    "mask_over_keys": Case(B=2, Sq=17, Sk=113, mask="bn"),
    "mask_over_queries": Case(Sq=113, Sk=17, mask="m"),
    "mask_of_heads": Case(B=2, Sq=17, Sk=17, mask="bh"),
    "bias": Case(B=2, Sq=17, Sk=113, bias="bhmn"),
    "bias_summed_over_batches": Case(B=3, Sq=17, Sk=17, bias="hmn"),
    "bias_summed_over_heads": Case(H=4, Hkv=2, Sq=17, Sk=17, bias="bmn"),
    "bias_over_keys": Case(B=2, Sq=17, Sk=113, bias="bn"),
    "bias_over_queries": Case(B=2, Sq=113, Sk=17, bias="hm"),
    "bias_of_heads": Case(B=2, Sq=17, Sk=17, bias="h"),
    "bias_in_fp32": Case(Sq=17, Sk=17, bias="mn", bias_dtype="fp32"),
    "dlse": Case(Sq=17, Sk=113, dlse=True),
    "negative_scale": Case(Sq=17, Sk=17, scale=-0.3),
    "zero_scale": Case(Sq=17, Sk=17, scale=0.0),
    "heads_inside_positions": Case(B=2, H=4, Hkv=2, Sq=17, Sk=17, layout="bshd"),
    "softcap": Case(Sq=17, Sk=113, softcap=1.5),
    "softcap_that_bites": Case(Sq=17, Sk=113, softcap=4.0, q_size=4.0, k_size=3.0),
    "alibi": Case(H=3, Hkv=1, Sq=17, Sk=113, alibi="h", origin_q=96),
    "alibi_of_batches": Case(B=2, Sq=17, Sk=17, alibi="bh", origin_head=3),
    "score_mod": Case(B=2, Sq=17, Sk=113, mod=True, origin_q=96, origin_head=3, origin_batch=2),
    "three_mods": Case(Sq=17, Sk=40, softcap=2.0, alibi="h", mod=True, window_right=0, origin=(1000, 977)),
    "mods_and_bias": Case(Sq=17, Sk=40, softcap=2.0, alibi="h", mask="mn", bias="n", dlse=True),
    "sinks": Case(B=2, H=4, Hkv=2, Sq=17, Sk=40, sinks=True),
    "sinks_and_dlse": Case(B=2, Sq=17, Sk=40, sinks=True, dlse=True, window_right=0, origin_k=5, bias="hm"),
    "dropout": Case(B=2, H=4, Hkv=2, Sq=17, Sk=113, dropout=0.2),
    "dropout_of_half": Case(Sq=40, Sk=17, dropout=0.5, dlse=True, bias="mn", origin=(7, 2)),
    "everything": Case(
        B=2,
        H=4,
        Hkv=2,
        Sq=33,
        Sk=40,
        window_left=25,
        window_right=0,
        origin_q=7,
        mask="mn",
        bias="hmn",
        dlse=True,
        softcap=3.0,
        alibi="h",
        mod=True,
        sinks=True,
        dropout=0.15,
    ),
    "huge_logits": Case(Sq=17, Sk=113, q_size=5.0, k_size=3.0, window_right=0, origin_q=90),
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


def case_of(options: dict[str, Any]) -> Case:
    """The call with these values of :data:`OPTIONS`."""
    (H, Hkv), (Sq, Sk), (D, Dv) = options["heads"], options["sizes"], options["dims"]
    left, right = options["window"]
    same = ("dtype", "B", "mask", "bias", "dlse", "softcap", "alibi", "mod", "sinks", "dropout", "scale", "layout")
    return Case(
        **{name: options[name] for name in same},
        H=H,
        Hkv=Hkv,
        Sq=Sq,
        Sk=Sk,
        D=D,
        Dv=Dv,
        window_left=left,
        window_right=right,
        origin_q=Sk - Sq if options["align"] == "bottom_right" else 0,
        origin=(2**33 + 5, 2**33 + 2) if options["align"] == "device" else None,
    )


def combinations(count: int, seed: int) -> list[Case]:
    """Calls that draw every feature at random, the same ones at every run."""
    draw = random.Random(seed)
    dims = ["mn", "n", "m", "", "bhmn", "hmn", "bn", "hm", "bm", "b", "h"]
    cases = []
    for _ in range(count):
        Hkv = draw.choice([1, 1, 2])
        Sq, Sk = draw.choice([1, 17, 17, 113]), draw.choice([1, 17, 17, 113, 203])
        left, right = draw.choice([(None, None), (None, 0), (None, 0), (20, 0), (5, 11), (70, None)])
        cases.append(
            Case(
                dtype=draw.choice(list(DTYPES)),
                B=draw.choice([1, 2]),
                H=Hkv * draw.choice([1, 2]),
                Hkv=Hkv,
                Sq=Sq,
                Sk=Sk,
                D=draw.choice([16, 33, 64, 80]),
                Dv=draw.choice([16, 48, 64]),
                window_left=left,
                window_right=right,
                origin_q=draw.choice([0, Sk - Sq, 40]),
                origin=draw.choice([None, None, (1000, 997)]),
                mask=draw.choice([None, None, *dims]),
                bias=draw.choice([None, None, *dims]),
                dlse=draw.choice([False, True]),
                layout=draw.choice(["bhsd", "bshd"]),
            )
        )
    return cases
