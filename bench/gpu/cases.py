"""What a GPU must get right before a kernel counts as proven: the feature matrix of attention and the linear layer.

Each case goes through the public function with backend="triton", forward and gradients, over memory poisoned with NaN,
and is measured by the error budget of fusemesh.kernels.testing. bench/on_gpu.py and tests/gpu run the same table.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch

import fusemesh
from fusemesh import peers
from fusemesh.kernels import backends
from fusemesh.kernels.attention.call import score_mods
from fusemesh.kernels.attention.call.options import Call
from fusemesh.kernels.attention.call.spec import AttentionSpec
from fusemesh.kernels.runtime.launch import TARGETS, any_device, assume_target, intercept
from fusemesh.kernels.testing import attention as attention_testing
from fusemesh.kernels.testing import budget, poison

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
DTYPES = {"bf16": BF16, "fp16": FP16, "fp32": FP32}
REPEATS = 50

Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Attention:
    """One attention call. ``mask`` and ``bias`` name the dims, out of BHQK, in which they are not of size 1."""

    dtype: str = "bf16"
    sq: int = 203
    sk: int = 203
    d: int = 64
    dv: int | None = None
    batch: int = 2
    heads: int = 4
    kv_heads: int = 2
    causal: bool = False
    align: str | None = None
    window: tuple[int | None, int | None] | None = None
    mask: str | None = None
    bias: str | None = None
    storage: str = "bhsd"  # order of dimensions in memory; "padded": strides larger than the shape asks for
    dlse: bool = False
    softcap: float | None = None
    alibi: str | None = None  # the dims, out of BH, in which the slopes differ
    mod: bool = False  # the score mod of table_mod.py
    sinks: bool = False
    dropout: float = 0.0
    origin: tuple[int, int, int, int] | None = None  # of q, k, head and batch
    device_origin: bool = False  # the same as tensors on the device
    repeats: int = 0
    op = "attention"
    counted = ("attention_forward", "attention_backward")

    @property
    def name(self) -> str:
        """Every field that is not the default."""
        return differences(self)

    def tiny(self) -> Attention:
        """The same features on a shape small enough for any machine."""
        return dataclasses.replace(self, sq=min(self.sq, 19), sk=min(self.sk, 23 if self.sk != self.sq else 19))

    def inputs(self, device: torch.device | str, seed: int) -> Tensors:
        """q, k, v, do, and bias, mask, dlse, slopes, table, sinks and seed where the case has them."""
        generator = torch.Generator(device).manual_seed(seed)
        dtype, dv = DTYPES[self.dtype], self.d if self.dv is None else self.dv
        kv = (self.batch, self.kv_heads, self.sk)
        shapes: dict[str, tuple[int, ...]] = {
            "q": (self.batch, self.heads, self.sq, self.d),
            "k": (*kv, self.d),
            "v": (*kv, dv),
            "do": (self.batch, self.heads, self.sq, dv),
        }
        if self.bias is not None:
            shapes["bias"] = self._broadcast(self.bias)
        values = {n: torch.randn(s, generator=generator, device=device).to(dtype) for n, s in shapes.items()}
        for name in ("q", "k", "v", "do"):
            values[name] = self._store(values[name])
        if self.mask is not None:
            shape = self._broadcast(self.mask)
            values["mask"] = torch.rand(shape, generator=generator, device=device) < 0.7
            values["mask"][..., shape[2] // 2, :] = "Q" not in self.mask  # one query that sees no key
        if self.dlse:
            values["dlse"] = torch.randn(shapes["q"][:3], generator=generator, device=device)
        if self.alibi is not None:
            slopes = (self.batch, self.heads) if "B" in self.alibi else (self.heads,)
            values["slopes"] = torch.rand(slopes, generator=generator, device=device) / 8
        if self.mod:
            values["table"] = torch.randn(61, generator=generator, device=device)
        if self.sinks:
            values["sinks"] = torch.randn(self.heads, generator=generator, device=device).to(dtype)
        if self.dropout:
            values["seed"] = torch.tensor([2**40 + 7 + seed], device=device)
        return values

    def _broadcast(self, dims: str) -> tuple[int, ...]:
        sizes = zip("BHQK", (self.batch, self.heads, self.sq, self.sk), strict=True)
        return tuple(size if letter in dims else 1 for letter, size in sizes)

    def _store(self, x: torch.Tensor) -> torch.Tensor:
        if self.storage == "bshd":
            return x.transpose(1, 2).contiguous().transpose(1, 2)
        if self.storage == "padded":
            return torch.nn.functional.pad(x, (0, 8, 1, 2))[:, :, 1:-2, : x.shape[3]]
        return x

    def expected(self, x: Tensors) -> attention_testing.Expected:
        """The fp64 reference, and eager PyTorch's error."""
        left, right = (None, None) if self.window is None else self.window
        mods = self._mods(x)
        origin = self.origin or (self.sk - self.sq if self.align == "bottom_right" else 0, 0, 0, 0)
        spec = AttentionSpec(
            self.d**-0.5,
            left,
            0 if self.causal else right,
            *origin,
            mods=tuple(bound.mod.name for bound in mods),
            params=tuple(number for bound in mods for number in bound.params),
            dropout_p=self.dropout,
        )
        aux = tuple(tensor for bound in mods for tensor in bound.aux)
        call = Call(spec, aux=aux, **{name: x.get(name) for name in ("mask", "bias", "sinks", "seed")})
        return attention_testing.expected(x["q"], x["k"], x["v"], call, do=x.get("do"), dlse=x.get("dlse"))

    def _mods(self, x: Tensors) -> list[score_mods.BoundScoreMod]:
        """The score mods in the order in which they apply."""
        bound = [] if self.softcap is None else [score_mods.softcap(self.softcap)]
        if self.alibi is not None:
            bound.append(score_mods.alibi(x["slopes"], x["q"]))
        return bound + ([self._table_mod(x)] if self.mod else [])

    @staticmethod
    def _table_mod(x: Tensors) -> score_mods.BoundScoreMod:
        # Only cases with the mod need Triton's language.
        from bench.gpu.table_mod import TABLE_MOD

        return TABLE_MOD(x["table"], weight=0.25)

    def _origin(self, device: torch.device) -> fusemesh.Origin | None:
        if self.origin is None or not self.device_origin:
            return None if self.origin is None else fusemesh.Origin(*self.origin)
        return fusemesh.Origin(*torch.tensor(self.origin, device=device).unbind())

    def compute(self, x: Tensors) -> Tensors:
        """Forward and every gradient, through the public function."""
        leaves = {name: x[name].detach().requires_grad_() for name in ("q", "k", "v", "bias", "sinks") if name in x}
        out, lse = fusemesh.flash_attention(
            leaves["q"],
            leaves["k"],
            leaves["v"],
            causal=self.causal,
            align=self.align,
            window=self.window,
            mask=x.get("mask"),
            bias=leaves.get("bias"),
            alibi_slopes=x.get("slopes"),
            softcap=self.softcap,
            score_mod=self._table_mod(x) if self.mod else None,
            sinks=leaves.get("sinks"),
            dropout_p=self.dropout,
            seed=x.get("seed"),
            origin=self._origin(x["q"].device),
            return_lse=True,
            backend="triton",
        )
        upstream = [x["do"], *([x["dlse"]] if self.dlse else [])]
        gradients = torch.autograd.grad([out, lse][: len(upstream)], list(leaves.values()), upstream)
        named = {f"d{name}": gradient for name, gradient in zip(leaves, gradients, strict=True)}
        return {"out": out.detach(), "lse": lse.detach(), **named}

    def stand_in(self, want: Any) -> Tensors:
        """Eager PyTorch's values, for a dry run."""
        return dict(want.eager)

    def check(self, outputs: Tensors, want: Any) -> list[budget.Budget]:
        """What was measured; AssertionError where ``outputs`` is outside the budget."""
        return attention_testing.check(outputs, want)


@dataclass(frozen=True)
class Linear:
    """One linear layer, M x K by N x K."""

    dtype: str = "bf16"
    m: int = 203
    n: int = 113
    k: int = 217
    activation: str | None = None
    gated: bool = False
    has_bias: bool = True
    storage: str = "rows"  # "columns": x and the weights with their first dimension contiguous
    repeats: int = 0
    op = "linear"
    counted = ("linear_forward", "linear_backward")

    @property
    def name(self) -> str:
        """Every field that is not the default."""
        return differences(self)

    def tiny(self) -> Linear:
        """The same features on a shape small enough for any machine."""
        return dataclasses.replace(self, m=min(self.m, 19), n=min(self.n, 17), k=min(self.k, 23))

    @property
    def _case(self) -> peers.LinearCase:
        dtype = DTYPES[self.dtype]
        return peers.LinearCase(self.m, self.k, self.n, self.activation, self.gated, dtype, self.has_bias)

    def inputs(self, device: torch.device | str, seed: int) -> Tensors:
        """x, w, dy, and bias and w_up where the case has them."""
        values = self._case.inputs(device, seed)
        if self.storage == "columns":
            return {n: x.t().contiguous().t() if x.dim() == 2 else x for n, x in values.items()}
        return values

    def expected(self, x: Tensors) -> dict[str, tuple[Tensors, Tensors]]:
        """The fp64 reference, and eager PyTorch's error."""
        return {direction: self._case.expected(x, direction) for direction in peers.DIRECTIONS}

    def compute(self, x: Tensors) -> Tensors:
        """Forward and every gradient, through the public function, on one tape."""
        names = [name for name in x if name != "dy"]
        tape = {name: x[name].detach().requires_grad_() for name in names}
        y = self._case.ours("triton").forward(tape)
        gradients = torch.autograd.grad(y, [tape[name] for name in names], x["dy"])
        return {"y": y.detach(), **{f"d{name}": g for name, g in zip(names, gradients, strict=True)}}

    def stand_in(self, want: Any) -> Tensors:
        """Eager PyTorch's values, for a dry run."""
        return {**want["forward"][1], **want["backward"][1]}

    def check(self, outputs: Tensors, want: Any) -> list[budget.Budget]:
        """What was measured; AssertionError where ``outputs`` is outside the budget."""
        forward = {"y": outputs["y"]}
        backward = {name: value for name, value in outputs.items() if name != "y"}
        return self._case.check(forward, want["forward"]) + self._case.check(backward, want["backward"])


class Case(Protocol):
    """What can be verified: the classes above, and those of gpu_decode.py and gpu_varlen.py."""

    op: str
    counted: tuple[str, ...]  # the ops that a call runs, once each
    repeats: int

    @property
    def name(self) -> str: ...
    def tiny(self) -> Case: ...
    def inputs(self, device: torch.device | str, seed: int) -> Tensors: ...
    def expected(self, x: Tensors) -> Any: ...
    def compute(self, x: Tensors) -> Tensors: ...
    def stand_in(self, want: Any) -> Tensors: ...
    def check(self, outputs: Tensors, want: Any) -> list[budget.Budget]: ...


def differences(case: Any) -> str:
    """A case's name: its dtype, and every field that is not the default."""
    shown = [case.dtype]
    for field in dataclasses.fields(case):
        value = getattr(case, field.name)
        if field.name != "dtype" and value != field.default:
            shown.append(field.name if value is True else f"{field.name}={value}".replace(" ", ""))
    return " ".join(shown)


def verify(case: Case, device: torch.device | str, *, seed: int = 0) -> list[budget.Budget]:
    """Run one case on ``device`` and measure it.

    Raises:
        AssertionError: outside the budget, bits that differ between repeats, or a backend that was not the one meant.
    """
    x = case.inputs(device, seed)
    want = case.expected(x)
    before = backends.call_counts()
    with poison.poisoned_empty():
        outputs = case.compute(x)
    for op in case.counted:
        calls = backends.call_counts().get((op, "triton"), 0) - before.get((op, "triton"), 0)
        if calls != 1:
            raise AssertionError(f"{op}: expected 1 call of the triton backend, counted {calls}")
    measured = case.check(outputs, want)
    for repeat in range(1, case.repeats):
        again = case.compute(x)
        differing = [name for name in outputs if not torch.equal(again[name], outputs[name])]
        if differing:
            raise AssertionError(f"repeat {repeat} differs in the bits of {', '.join(differing)}")
    return measured


@contextlib.contextmanager
def recorded() -> Iterator[list[str]]:
    """Within the block the triton backend takes CPU tensors, and launches are recorded by name and not started."""
    names: list[str] = []

    def hook(kernel: Callable[..., None], grid: object, args: object, kwargs: object) -> None:
        names.append(kernel.__name__)

    with any_device(), assume_target(TARGETS["sm_90"]), intercept(hook):
        yield names


# Each alone, in every dtype.
FEATURES: tuple[dict[str, Any], ...] = (
    {"softcap": 3.0},
    {"alibi": "H"},
    {"mod": True},
    {"sinks": True, "dlse": True},
    {"dropout": 0.2},
    {"origin": (40, 11, 3, 5), "mod": True, "dropout": 0.2},
)

# Features meet each other, odd sizes, head dims that are no power of two, D != Dv, and every kind of mask and bias.
COMBINATIONS: tuple[Attention, ...] = (
    Attention("fp32", softcap=3.0, alibi="BH", mod=True, sinks=True, dropout=0.2, bias="HQK", mask="BK", dlse=True),
    Attention(softcap=30.0, window=(64, 0), d=256, sinks=True),
    Attention(softcap=3.0, alibi="H", d=192, dv=128, heads=8, kv_heads=2, causal=True, repeats=REPEATS),
    Attention(alibi="BH", dropout=0.1, d=80, storage="bshd", sq=113, sk=203, align="bottom_right"),
    Attention(mod=True, mask="BHQK", d=40, dv=72, origin=(17, 5, 1, 2), window=(50, 9)),
    Attention("fp32", sinks=True, mask="BHQK", d=96, dv=32, dlse=True, kv_heads=1),
    Attention("fp16", dropout=0.5, bias="BHQK", d=160, causal=True, sinks=True),
    Attention("fp32", dropout=0.2, origin=(1000, 900, 3, 5), device_origin=True, window=(200, 0), softcap=5.0),
    Attention(alibi="H", mod=True, origin=(2**31 + 9, 2**31, 0, 0), causal=True, sq=129, sk=65, sinks=True),
    Attention("fp16", softcap=3.0, mod=True, bias="K", mask="QK", d=24, dv=200, storage="padded"),
    Attention("fp32", alibi="BH", bias="HQK", sinks=True, sq=1, sk=203, align="bottom_right", causal=True),
    Attention(dropout=0.1, sinks=True, window=(20, 3), sq=301, sk=97, align="bottom_right", dlse=True),
    Attention("fp32", mod=True, dropout=0.3, d=256, origin=(7, 0, 0, 1), device_origin=True, causal=True),
    Attention(softcap=30.0, d=128, sq=2048, sk=2048, batch=1, window=(511, 0), heads=8, kv_heads=4),
    Attention(sinks=True, d=64, sq=4096, sk=4096, batch=1, window=(127, 0), heads=4, kv_heads=1),
)

# The most telling come first: a stage whose time runs out leaves out the end.
ATTENTION: tuple[Attention, ...] = (
    Attention(d=128, sq=1024, sk=1024, causal=True, repeats=REPEATS),
    Attention(d=128, sq=1024, sk=1024),
    Attention("fp32", bias="HQK", mask="BK", causal=True, dlse=True, repeats=REPEATS),
    Attention("fp16", d=64, bias="BHQK", window=(40, 17)),
    Attention(d=128, softcap=20.0, alibi="H", sinks=True, dropout=0.1, causal=True, repeats=REPEATS),
    *(Attention(t, causal=True, **feature) for feature in FEATURES for t in DTYPES),
    *COMBINATIONS,
    *(Attention(t, d=128, causal=True) for t in ("fp32", "fp16")),
    *(
        Attention("bf16", d=d, dv=dv, causal=c)
        for d, dv in ((64, None), (256, None), (192, 128))
        for c in (False, True)
    ),
    *(Attention("fp32", d=d, dv=dv) for d, dv in ((64, None), (128, None), (256, None), (192, 128), (16, 16))),
    Attention(d=256, sq=777, sk=777, causal=True, heads=2, kv_heads=2, repeats=REPEATS),
    *(Attention(sq=sq, sk=sk) for sq, sk in ((1, 1), (1, 113), (17, 203), (113, 17), (64, 64), (128, 256))),
    *(
        Attention(sq=sq, sk=sk, causal=True, align=align)
        for sq, sk in ((203, 113), (113, 203), (1, 203))
        for align in ("top_left", "bottom_right")
    ),
    *(Attention(window=window) for window in ((32, 0), (None, 5), (7, None), (0, 0))),
    Attention("fp32", sq=301, sk=97, window=(20, 3), align="bottom_right", dlse=True),
    *(Attention(heads=8, kv_heads=kv, causal=True) for kv in (1, 2, 8)),
    *(Attention(mask=dims) for dims in ("BK", "QK", "BHQK")),
    *(Attention(bias=dims) for dims in ("HQK", "K", "BQ", "H", "BHQK")),
    Attention("fp32", bias="HQK", sq=129, sk=65),
    Attention(mask="BHQK", bias="HQK", causal=True, window=(64, 0), dlse=True),
    *(Attention(storage=storage, causal=True) for storage in ("bshd", "padded")),
    Attention("fp32", storage="bshd", dlse=True),
    *(Attention("bf16", d=d, dv=dv) for d, dv in ((16, None), (40, 72), (80, None), (96, 32), (160, None))),
    Attention(d=128, sq=4096, sk=4096, batch=1, causal=True),
    Attention(d=128, sq=8192, sk=8192, batch=1, heads=2, kv_heads=1),
    *(Attention("fp16", d=d, dv=dv, causal=True) for d, dv in ((16, None), (64, None), (256, None), (80, 48))),
)

LINEAR: tuple[Linear, ...] = (
    Linear(m=2048, n=2048, k=1024, activation="silu", gated=True, repeats=REPEATS),
    Linear(m=1024, n=4096, k=1024, activation="gelu"),
    Linear("fp32", m=512, n=1024, k=768, activation="gelu_tanh", repeats=REPEATS),
    *(Linear(t, activation=a) for t in DTYPES for a in (None, "gelu", "gelu_tanh", "silu", "relu2")),
    *(Linear(t, activation=a, gated=True) for t in DTYPES for a in ("silu", "gelu")),
    *(Linear(t, m=m, n=n, k=k) for t in DTYPES for m, n, k in ((1, 1, 1), (17, 203, 1), (1, 113, 203), (4096, 16, 16))),
    *(Linear(t, has_bias=False, activation=a) for t in DTYPES for a in (None, "relu2")),
    *(Linear(t, storage="columns", activation="silu", gated=True) for t in DTYPES),
)
