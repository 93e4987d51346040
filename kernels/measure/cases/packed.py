"""PackedCase: one call of flash_attention_varlen, from which tests and benchmarks build the same inputs.

Rows of padding before the first sequence and after the last hold NaN, and so does a bias where no sequence reaches.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import Any

import torch

from ...attention.call import score_mods
from ...attention.call.options import Call
from ...attention.call.spec import AttentionSpec
from ...attention.varlen.api import flash_attention_varlen
from ...testing import attention as expectations
from ...testing import budget
from . import common
from .common import ALL_DTYPES, DIRECTIONS, Inputs, Tensors

_SHAPE = ("dtype", "lens_q", "lens_k", "H", "Hkv", "D", "Dv", "dlse", "seed")
GAP = 3  # rows of padding at either end


@dataclass(frozen=True)
class PackedCase:
    """One call. Dims of mask and bias are written as a subset of "bhmn", the dimensions in which they are not 1."""

    dtype: str = "fp32"
    lens_q: tuple[int, ...] = (17, 0, 1, 40, 3)
    lens_k: tuple[int, ...] = (23, 5, 9, 40, 0)
    H: int = 4
    Hkv: int = 2
    D: int = 16
    Dv: int = 24
    causal: bool = False
    align: str | None = None
    window: tuple[int | None, int | None] | None = None
    mask: str | None = None
    bias: str | None = None
    dlse: bool = True
    softcap: float | None = None
    alibi: str | None = None  # dims of the slopes, "h" or "bh"
    mod: bool = False  # the user's mod of kernels/testing/table_mod.py
    sinks: bool = False
    dropout: float = 0.0
    seed: int = 2**40 + 7
    op = "varlen"
    result = "out"
    directions = DIRECTIONS
    counted = ("attention_varlen_forward", "attention_varlen_backward")

    def __str__(self) -> str:
        return self.name

    @property
    def name(self) -> str:
        """The dtype, the shape, and every feature."""
        lengths = f"Sq{','.join(map(str, self.lens_q))} S{','.join(map(str, self.lens_k))}"
        shape = [self.dtype, lengths, common.heads_name(self.H, self.Hkv), common.dims_name(self.D, self.Dv)]
        return " ".join(shape + common.features_name(self, _SHAPE))

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype of q, k and v."""
        return ALL_DTYPES[self.dtype]

    @property
    def most(self) -> tuple[int, int]:
        """The longest sequence of queries, and of keys."""
        return max(self.lens_q), max(self.lens_k)

    @property
    def starts(self) -> tuple[list[int], list[int]]:
        """The row at which each sequence starts, and last the row after all of them, of queries and of keys."""
        starts_q, starts_k = (list(itertools.accumulate(lens, initial=GAP)) for lens in (self.lens_q, self.lens_k))
        return starts_q, starts_k

    def inputs(
        self, device: torch.device | str = "cpu", seed: int = 1234, index_dtype: torch.dtype = torch.int32
    ) -> Inputs:
        """Return q, k, v, do, cu_q, cu_k and the tensors of the features; the same at every call with one ``seed``."""
        generator = torch.Generator(device).manual_seed(seed)
        (*_, end_q), (*_, end_k) = self.starts
        B, rows_q, rows_k = len(self.lens_q), end_q + GAP, end_k + GAP
        sizes = (B, self.H, *self.most)

        def new(*shape: int) -> torch.Tensor:
            return torch.randn(shape, generator=generator, device=device).to(self.torch_dtype)

        x: Inputs = {
            "q": new(rows_q, self.H, self.D),
            "k": new(rows_k, self.Hkv, self.D),
            "v": new(rows_k, self.Hkv, self.Dv),
            "do": new(rows_q, self.H, self.Dv),
        }
        for value in x.values():
            value[:GAP] = value[-GAP:] = math.nan
        dlse = torch.randn(self.H, rows_q, generator=generator, device=device)
        dlse[:, :GAP] = dlse[:, -GAP:] = math.nan
        x["dlse"] = dlse.to(torch.promote_types(self.torch_dtype, torch.float32)) if self.dlse else None
        x["bias"] = None if self.bias is None else self._bias(new(*common.broadcast_shape(self.bias, sizes)))
        x["sinks"] = new(self.H) if self.sinks else None
        x |= {"mask": None, "slopes": None, "table": None, "seed": None}
        if self.mask is not None:
            shape = common.broadcast_shape(self.mask, sizes)
            x["mask"] = torch.rand(shape, generator=generator, device=device) > 0.3
        if self.alibi is not None:
            of_heads = (B, self.H) if "b" in self.alibi else (self.H,)
            x["slopes"] = torch.rand(of_heads, generator=generator, device=device) / 8
        if self.mod:
            from ...testing.table_mod import TABLE

            x["table"] = torch.randn(TABLE, generator=generator, device=device)
        if self.dropout:
            x["seed"] = torch.tensor([self.seed], device=device)
        for name, starts in zip(("cu_q", "cu_k"), self.starts, strict=True):
            x[name] = torch.tensor(starts, dtype=index_dtype, device=device)
        return x

    def _bias(self, bias: torch.Tensor) -> torch.Tensor:
        if self.bias == "bhmn":
            for b, (sq, sk) in enumerate(zip(self.lens_q, self.lens_k, strict=True)):
                bias[b, :, sq:] = math.nan
                bias[b, :, :, sk:] = math.nan
        return bias

    def leaves(self, x: Inputs) -> tuple[str, ...]:
        """Return the names of the inputs that have a gradient."""
        return tuple(name for name in ("q", "k", "v", "bias", "sinks") if x[name] is not None)

    def run(self, x: Inputs, backend: str, *, return_lse: bool = False) -> Any:
        """Return what the public function returns."""
        return flash_attention_varlen(
            x["q"],
            x["k"],
            x["v"],
            x["cu_q"],
            x["cu_k"],
            max(self.lens_q),
            max(self.lens_k),
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
            return_lse=return_lse,
            backend=backend,
        )

    def compute(self, x: Inputs, backend: str) -> Tensors:
        """Return out, lse and every gradient, through the public function."""
        leaves = self.leaves(x)
        tape = {**x, **{name: x[name].detach().requires_grad_() for name in leaves}}
        out, lse = self.run(tape, backend, return_lse=True)
        outputs, upstream = ([out, lse], [x["do"], x["dlse"]]) if self.dlse else ([out], [x["do"]])
        gradients = torch.autograd.grad(outputs, [tape[name] for name in leaves], upstream)
        named = {f"d{name}": gradient for name, gradient in zip(leaves, gradients, strict=True)}
        return {"out": out.detach(), "lse": lse.detach(), **named}

    def sequence(self, x: Inputs, b: int) -> Inputs:
        """Return the tensors of sequence ``b`` as a call of [1, heads, length, ...] has them, results included."""
        starts_q, starts_k = self.starts
        rows_q, rows_k = slice(starts_q[b], starts_q[b + 1]), slice(starts_k[b], starts_k[b + 1])
        where = {name: rows_q for name in ("q", "do", "out", "dq")}
        where |= {name: rows_k for name in ("k", "v", "dk", "dv")}
        part: Inputs = {name: x[name][rows].transpose(0, 1)[None] for name, rows in where.items() if name in x}
        for name in ("lse", "dlse"):
            if x.get(name) is not None:
                part[name] = x[name][None, :, rows_q]
        for name in ("mask", "bias"):
            if x.get(name) is not None:
                part[name] = self.of_sequence(x[name], b)
        if x.get("slopes") is not None:
            part["slopes"] = x["slopes"][b] if x["slopes"].dim() == 2 else x["slopes"]
        return part

    def of_sequence(self, x: torch.Tensor, b: int) -> torch.Tensor:
        """Return the part of a mask or bias that belongs to the scores of sequence ``b``."""
        x = x[b : b + 1] if x.shape[0] > 1 else x
        x = x[:, :, : self.lens_q[b]] if x.shape[2] > 1 else x
        return x[..., : self.lens_k[b]] if x.shape[3] > 1 else x

    def ahead(self, b: int) -> int:
        """Return the position of the first query of sequence ``b``, its first key standing at 0."""
        return self.lens_k[b] - self.lens_q[b] if self.align == "bottom_right" else 0

    def expected(self, x: Inputs, direction: str = "backward") -> list[expectations.Expected]:
        """Return, for each sequence, the right results by fp64 and eager PyTorch's error."""
        left, right = self.window or (None, None)
        wanted = []
        for b in range(len(self.lens_q)):
            part = self.sequence(x, b)
            mods = [] if self.softcap is None else [score_mods.softcap(self.softcap)]
            if "slopes" in part:
                mods.append(score_mods.alibi(part.pop("slopes"), part["q"]))
            if x["table"] is not None:
                mods.append(common.table_mod(x["table"]))
            spec = AttentionSpec(
                self.D**-0.5,
                left,
                0 if self.causal else right,
                self.ahead(b),
                origin_batch=b,
                dropout_p=self.dropout,
                **common.numbers_of(mods),
            )
            tensors = {name: part.pop(name) for name in ("mask", "bias") if name in part}
            call = Call(spec, aux=common.aux_of(mods), sinks=x["sinks"], seed=x["seed"], **tensors)
            wanted.append(expectations.expected(**part, call=call))
        return wanted

    def packed(self, want: list[expectations.Expected]) -> expectations.Expected:
        """Return the sequences' right results side by side, [1, heads, rows, ...], gradients that they share summed."""
        packed: list[Tensors] = []
        for kind in ("exact", "eager", "absolute"):
            values: Tensors = {}
            for name in getattr(want[0], kind):
                of_name = [getattr(part, kind)[name] for part in want]
                if name == "dbias":
                    assert self.bias is not None
                    shape = common.broadcast_shape(self.bias, (len(self.lens_q), self.H, *self.most))
                    values[name] = of_name[0].new_zeros(shape)
                    for b, part in enumerate(of_name):
                        self.of_sequence(values[name], b).add_(part)
                elif name == "dsinks":
                    values[name] = torch.stack(of_name).sum(0)
                else:
                    values[name] = torch.cat(of_name, 2)
            packed.append(values)
        return expectations.Expected(*packed)

    def eager(self, want: list[expectations.Expected]) -> Tensors:
        """Return eager PyTorch's values in the shapes of the results."""
        found = {}
        for name, value in self.packed(want).eager.items():
            if name == "lse":
                found[name] = torch.nn.functional.pad(value[0], (GAP, GAP), value=-math.inf)
            elif name in ("dbias", "dsinks"):
                found[name] = value
            else:
                found[name] = torch.nn.functional.pad(value[0].transpose(0, 1), (0, 0, 0, 0, GAP, GAP))
        return found

    def check(self, outputs: dict[str, Any], want: Any) -> list[budget.Budget]:
        """Return how far ``outputs`` are off what :meth:`expected` returned, all sequences together.

        Raises:
            AssertionError: one is outside the error budget, or the padding is not 0 (of the lse: -inf).
        """
        inside: Tensors = {}
        for name, value in outputs.items():
            if name in ("dbias", "dsinks"):
                inside[name] = value
                continue
            rows = value.transpose(0, 1) if name == "lse" else value
            padding = torch.cat([rows[:GAP], rows[-GAP:]])
            fill = -math.inf if name == "lse" else 0
            assert (padding == fill).all(), f"{name}: the padding is not {fill}"
            inside[name] = rows[GAP:-GAP].transpose(0, 1)[None]
        measured = expectations.check(inside, self.packed(want))
        return measured + self._check_sequences(outputs, want)

    def _check_sequences(self, outputs: Tensors, want: list[expectations.Expected]) -> list[budget.Budget]:
        """Check each sequence by itself, which the others' errors cannot excuse."""
        measured = []
        for b, expected in enumerate(want):
            rows = {name: value for name, value in outputs.items() if name not in ("dbias", "dsinks")}
            # An empty sequence has nothing to measure in its queries or keys.
            present = {name: value for name, value in self.sequence(rows, b).items() if value.numel()}
            try:
                measured += expectations.check(present, expected)
            except AssertionError as error:
                raise AssertionError(f"sequence {b}: {error}") from error
        return measured
