"""AttentionCase: one call of flash_attention, from which tests, benchmarks and the tuner build the same inputs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from ...attention.call import score_mods
from ...attention.call.options import Call
from ...attention.call.spec import AttentionSpec, Origin, out_dtype
from ...attention.dense.api import flash_attention
from ...testing import attention as expectations
from ...testing import budget
from . import common
from .common import ALL_DTYPES, DIRECTIONS, Inputs, Tensors

_SHAPE = ("dtype", "B", "H", "Hkv", "Sq", "Sk", "D", "Dv")


@dataclass(frozen=True)
class Part:
    """Some of a call's batches and heads, and the right results for them."""

    batch: slice
    heads: slice
    kv_heads: slice
    want: expectations.Expected


@dataclass(frozen=True)
class AttentionCase:
    """One call. Dims of mask and bias are written as a subset of "bhmn", the dimensions in which they are not 1.

    FLOPs follow the convention of the published attention benchmarks: forward 2 * B * H * Sq * Sk * (D + Dv), half of
    it when causal, backward 2.5 times the forward, whatever a kernel recomputes.
    """

    dtype: str = "fp32"  # fp8: the forward alone
    B: int = 1
    H: int = 2
    Hkv: int = 2
    Sq: int = 17
    Sk: int = 113
    D: int = 16
    Dv: int = 16
    causal: bool = False
    window: tuple[int | None, int | None] | None = None
    align: str | None = None  # "bottom_right": the last query stands at the last key
    origin: tuple[int, int, int, int] = (0, 0, 0, 0)  # of q, k, head and batch
    device_origin: tuple[int, int, int, int] | None = None  # added to it, and lies on the device
    mask: str | None = None
    empty_row: bool = False  # the mask hides every key from the query in the middle
    bias: str | None = None
    bias_dtype: str | None = None  # default: that of q
    dlse: bool = False
    scale: float | None = None  # default: 1 / sqrt(D)
    q_size: float = 1.0
    k_size: float = 1.0
    layout: str = "bhsd"  # "bshd": positions outside heads in memory; "padded": larger strides than the shape asks for
    softcap: float | None = None
    alibi: str | None = None  # dims of the slopes, "h" or "bh"
    mod: bool = False  # the user's mod of kernels/testing/table_mod.py
    sinks: bool = False
    dropout: float = 0.0
    descale: str | None = None  # factors of fp8: "tensor", or "head" for one of each batch and key head
    op = "attention"
    result = "out"
    upstream = "do"

    def __str__(self) -> str:
        return self.name

    @property
    def name(self) -> str:
        """The dtype, the shape, and every feature."""
        lengths = f"S{self.Sk}" if self.Sq == self.Sk else f"Sq{self.Sq} S{self.Sk}"
        shape = [self.dtype, f"B{self.B}", common.heads_name(self.H, self.Hkv), lengths]
        shape.append(common.dims_name(self.D, self.Dv))
        return " ".join(shape + common.features_name(self, _SHAPE))

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype of q, k and v."""
        return ALL_DTYPES[self.dtype]

    @property
    def directions(self) -> tuple[str, ...]:
        """Those of ``forward`` and ``backward`` that the case has."""
        return DIRECTIONS[:1] if self.dtype == "fp8" else DIRECTIONS

    @property
    def counted(self) -> tuple[str, ...]:
        """The ops that :meth:`compute` runs, once each."""
        return tuple(f"attention_{direction}" for direction in self.directions)

    def flops(self, direction: str) -> float:
        """Return the floating-point operations of one call, by the convention of this class."""
        forward = 2 * self.B * self.H * self.Sq * self.Sk * (self.D + self.Dv) * (0.5 if self.causal else 1.0)
        return forward if direction == "forward" else 2.5 * forward

    def bytes_moved(self, direction: str) -> float:
        """Return the fewest bytes: each input read once, each output written once (the LSE left out)."""
        queries, keys = self.B * self.H * self.Sq, self.B * self.Hkv * self.Sk
        size, out = self.torch_dtype.itemsize, out_dtype(self.torch_dtype).itemsize
        forward = (queries * self.D + keys * (self.D + self.Dv)) * size + queries * self.Dv * out
        return forward if direction == "forward" else 2 * forward

    def inputs(self, device: torch.device | str = "cpu", seed: int = 1234) -> Inputs:
        """Return q, k, v, do, and the tensors of the features, None where the case has not got one.

        The same at every call with one ``seed``.
        """
        generator = torch.Generator(device).manual_seed(seed)
        # Of bf16 where q is fp8.
        wide = out_dtype(self.torch_dtype)
        large = 4.0 if self.descale is not None else 1.0  # so that the range of fp8 is used

        def new(*shape: int, size: float = 1.0, dtype: torch.dtype = self.torch_dtype) -> torch.Tensor:
            return (size * torch.randn(*shape, generator=generator, device=device)).to(dtype)

        def heads(heads: int, positions: int, dim: int, size: float = 1.0) -> torch.Tensor:
            if self.layout == "bshd":
                return new(self.B, positions, heads, dim, size=size).transpose(1, 2)
            x = new(self.B, heads, positions, dim, size=size)
            return torch.nn.functional.pad(x, (0, 8, 1, 2))[:, :, 1:-2, :dim] if self.layout == "padded" else x

        sizes = (self.B, self.H, self.Sq, self.Sk)
        mask = bias = None
        if self.mask is not None:
            mask = torch.rand(common.broadcast_shape(self.mask, sizes), generator=generator, device=device) > 0.3
            if self.empty_row:
                mask[:, :, mask.shape[2] // 2] = False
        if self.bias is not None:
            bias_dtype = wide if self.bias_dtype is None else ALL_DTYPES[self.bias_dtype]
            bias = new(*common.broadcast_shape(self.bias, sizes), dtype=bias_dtype)
        x: Inputs = {
            "q": heads(self.H, self.Sq, self.D, self.q_size * large),
            "k": heads(self.Hkv, self.Sk, self.D, self.k_size * large),
            "v": heads(self.Hkv, self.Sk, self.Dv, large),
            "do": heads(self.H, self.Sq, self.Dv),
            "dlse": new(self.B, self.H, self.Sq, dtype=torch.float32) if self.dlse else None,
            "mask": mask,
            "bias": bias,
            "origin": None if self.device_origin is None else torch.tensor(self.device_origin, device=device),
            "sinks": new(self.H, dtype=wide) if self.sinks else None,
            "seed": torch.tensor([2**40 + 7], device=device) if self.dropout else None,
        }
        if self.descale is not None:
            factors = (self.B, self.Hkv) if self.descale == "head" else (1,)
            # Powers of two, so that bf16 holds the products exactly.
            for name, power in (("q", -2), ("k", -1), ("v", 1)):
                drawn = torch.randint(-1, 2, factors, generator=generator, device=device)
                x[f"descale_{name}"] = torch.exp2((drawn + power).float())
        return {**x, **self._mod_tensors(device)}

    def _mod_tensors(self, device: torch.device | str) -> Inputs:
        generator = torch.Generator(device).manual_seed(99)
        x: Inputs = {"slopes": None, "table": None}
        if self.alibi is not None:
            shape = (self.B, self.H) if "b" in self.alibi else (self.H,)
            x["slopes"] = torch.rand(shape, generator=generator, device=device) / 8
        if self.mod:
            from ...testing.table_mod import TABLE

            x["table"] = torch.randn(TABLE, generator=generator, device=device)
        return x

    def mods(self, x: Inputs) -> list[score_mods.BoundScoreMod]:
        """Return the score mods bound to their tensors in ``x``, in the order in which they apply."""
        bound = [] if self.softcap is None else [score_mods.softcap(self.softcap)]
        if x["slopes"] is not None:
            bound.append(score_mods.alibi(x["slopes"], x["slopes"].new_empty(self.B, self.H, 1, 1)))
        if x["table"] is not None:
            bound.append(common.table_mod(x["table"]))
        return bound

    @property
    def spec(self) -> AttentionSpec:
        """The numbers of the call, as backends take them."""
        left, right = self.window or (None, None)
        origin_q, origin_k, origin_head, origin_batch = self.origin
        return AttentionSpec(
            self.D**-0.5 if self.scale is None else self.scale,
            left,
            0 if self.causal else right,
            origin_q + (self.Sk - self.Sq if self.align == "bottom_right" else 0),
            origin_k,
            origin_head,
            origin_batch,
            dropout_p=self.dropout,
            **common.numbers_of(self.mods(self._mod_tensors("cpu"))),
        )

    def call(self, x: Inputs) -> Call:
        """Return the call as a backend's functions take it."""
        tensors = {name: x[name] for name in ("mask", "bias", "origin", "sinks", "seed")}
        return Call(self.spec, aux=common.aux_of(self.mods(x)), **tensors)

    def leaves(self, x: Inputs) -> tuple[str, ...]:
        """Return the names of the inputs that have a gradient."""
        return tuple(name for name in ("q", "k", "v", "bias", "sinks") if x.get(name) is not None)

    def run(self, x: Inputs, backend: str, *, return_lse: bool = False) -> Any:
        """Return what the public function returns."""
        descale = None if self.descale is None else tuple(x[f"descale_{name}"] for name in "qkv")
        return flash_attention(
            x["q"],
            x["k"],
            x["v"],
            causal=self.causal,
            align=self.align,
            window=self.window,
            mask=x["mask"],
            bias=x["bias"],
            alibi_slopes=x["slopes"],
            softcap=self.softcap,
            score_mod=None if x["table"] is None else common.table_mod(x["table"]),
            sinks=x["sinks"],
            dropout_p=self.dropout,
            seed=x["seed"],
            scale=self.scale,
            origin=self._origin(x),
            descale=descale,
            return_lse=return_lse,
            backend=backend,
        )

    def _origin(self, x: Inputs) -> Origin | None:
        if x["origin"] is not None:
            return Origin(*(x["origin"] + torch.tensor(self.origin, device=x["origin"].device)).unbind())
        return Origin(*self.origin) if any(self.origin) else None

    def compute(self, x: Inputs, backend: str) -> Tensors:
        """Return out, lse and every gradient, through the public function."""
        leaves = self.leaves(x) if "backward" in self.directions else ()
        tape = {**x, **{name: x[name].detach().requires_grad_() for name in leaves}}
        out, lse = self.run(tape, backend, return_lse=True)
        results = {"out": out.detach(), "lse": lse.detach()}
        if leaves:
            outputs, upstream = ([out, lse], [x["do"], x["dlse"]]) if self.dlse else ([out], [x["do"]])
            gradients = torch.autograd.grad(outputs, [tape[name] for name in leaves], upstream)
            results |= {f"d{name}": gradient for name, gradient in zip(leaves, gradients, strict=True)}
        return results

    def expected(self, x: Inputs, direction: str = "backward") -> list[Part]:
        """Return the right results by fp64, and eager PyTorch's error."""
        everything = slice(None)
        tensors: dict[str, Any] = {name: self._wide(x, name) for name in "qkv"}
        if direction in self.directions and direction == "backward":
            tensors |= {"do": x["do"], "dlse": x["dlse"]}
        return [Part(everything, everything, everything, expectations.expected(**tensors, call=self.call(x)))]

    def _wide(self, x: Inputs, name: str) -> torch.Tensor:
        """One of q, k and v as it is, or if it is of fp8 in bf16, which holds it exactly, multiplied by its factor."""
        tensor = x[name]
        assert tensor is not None
        if self.dtype != "fp8":
            return tensor
        factor = x.get(f"descale_{name}")
        if factor is None:
            return tensor.to(out_dtype(tensor.dtype))
        if factor.dim() == 2:
            factor = factor.repeat_interleave(tensor.shape[1] // self.Hkv, 1)[:, :, None, None]
        return (tensor.float() * factor).to(out_dtype(tensor.dtype))

    def expected_at_ends(self, x: Inputs, direction: str) -> list[Part]:
        """Return the right results of the first and the last key head (with GQA of the last alone).

        One query head at a time, for shapes of which the scores of all heads would not fit into memory. The case has no
        feature but ``causal``, ``window``, a mask and a bias of all scores.
        """
        assert not common.features_name(self, (*_SHAPE, "causal", "window", "align", "mask", "bias")), self
        assert self.bias in (None, "bhmn"), self
        groups = self.H // self.Hkv
        ends = [(0, 0), (self.B - 1, self.Hkv - 1)]
        parts = []
        for b, h in dict.fromkeys(ends if groups == 1 else ends[1:]):
            batch, kv_head, heads = slice(b, b + 1), slice(h, h + 1), range(h * groups, (h + 1) * groups)
            wanted = []
            for i in heads:
                one: dict[str, Any] = {name: self._wide(x, name)[batch, kv_head] for name in ("k", "v")}
                one |= {"q": self._wide(x, "q")[batch, i : i + 1]}
                if direction == "backward":
                    one["do"] = x["do"][batch, i : i + 1]
                bias = None if x["bias"] is None else x["bias"][batch, i : i + 1]
                mask = None if x["mask"] is None else x["mask"].expand(self.B, self.H, -1, -1)[batch, i : i + 1]
                wanted.append(expectations.expected(**one, call=Call(self.spec, mask=mask, bias=bias)))
            want = _join_heads(wanted, out_dtype(self.torch_dtype))
            parts.append(Part(batch, slice(heads.start, heads.stop), kv_head, want))
        return parts

    def check(self, outputs: dict[str, Any], want: Any) -> list[budget.Budget]:
        """Return how far ``outputs`` are off what :meth:`expected` returned.

        Raises:
            AssertionError: some of them are outside the error budget.
        """
        measured = []
        for part in want:
            here = {}
            for name, value in outputs.items():
                if name == "dsinks":
                    here[name] = value[part.heads]
                else:
                    here[name] = value[part.batch, part.kv_heads if name in ("dk", "dv") else part.heads]
            measured += expectations.check(here, part.want)
        return measured

    def eager(self, want: list[Part]) -> Tensors:
        """Return eager PyTorch's values in the shapes of the results."""
        (part,) = want
        return dict(part.want.eager)


def self_attention(
    dtype: str, B: int, H: int, Hkv: int, S: int, D: int, causal: bool, **features: Any
) -> AttentionCase:
    """Return the case of as many queries as keys, with one head dimension."""
    return AttentionCase(dtype, B, H, Hkv, S, S, D, D, causal, **features)


def _join_heads(parts: list[expectations.Expected], dtype: torch.dtype) -> expectations.Expected:
    """Query heads of one key head: out, lse, dq and dbias side by side, dk and dv summed."""

    def join(field: str, cast: torch.dtype | None) -> Tensors:
        joined = {}
        for name in getattr(parts[0], field):
            values = [getattr(part, field)[name] for part in parts]
            if name in ("dk", "dv"):
                total = torch.stack([value.double() for value in values]).sum(0)
                joined[name] = total if cast is None else total.to(cast)
            else:
                joined[name] = torch.cat(values, 1)
        return joined

    return expectations.Expected(join("exact", None), join("eager", dtype), join("absolute", None))
