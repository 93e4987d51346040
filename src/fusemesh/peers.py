"""What a benchmark runs: cases with their shapes, FLOPs and right answers, and the contenders that run them.

FLOPs follow the convention of the published attention benchmarks: forward 4 * B * H * Sq * Sk * D (with Dv apart from
D: 2 * (D + Dv)), half of it when causal, backward 2.5 times the forward, whatever a kernel recomputes. A linear layer
counts 2 * M * N * K for each of its products.

A result is checked before it is timed: against an fp64 reference, by the budget of
:mod:`fusemesh.kernels.testing.budget`.
"""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional as F

import fusemesh
from fusemesh.kernels import backends
from fusemesh.kernels.attention.call.options import Call
from fusemesh.kernels.attention.call.spec import FP8, AttentionSpec, out_dtype
from fusemesh.kernels.matmul import reference as linear_reference
from fusemesh.kernels.testing import attention as attention_testing
from fusemesh.kernels.testing import budget

from . import benchmark

Tensors = dict[str, torch.Tensor]
DIRECTIONS = ("forward", "backward")
OURS = ("reference", "torch", "cpu", "triton")
PEERS = ("sdpa", "sdpa flash", "sdpa cudnn", "sdpa efficient", "flex", "flash-attn", "F.linear")
_SHORT = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16", FP8: "fp8"}


@dataclass(frozen=True)
class Contender:
    """Someone who computes a case's forward. ``ours`` tells FuseMesh's backends from PyTorch's own ops."""

    name: str
    ours: bool
    forward: Callable[[Tensors], torch.Tensor]
    differentiable: bool = True


@dataclass(frozen=True)
class AttentionCase:
    """Self-attention: q [batch, heads, length, head_dim], k and v with kv_heads; ``bias`` is one for every score."""

    batch: int
    heads: int
    kv_heads: int
    length: int
    head_dim: int
    causal: bool
    dtype: torch.dtype  # fp8: the forward alone
    bias: bool = False
    op = "attention"

    @property
    def directions(self) -> tuple[str, ...]:
        """Those of :data:`DIRECTIONS` that the case has."""
        return DIRECTIONS[:1] if self.dtype == FP8 else DIRECTIONS

    @property
    def name(self) -> str:
        heads = f"H{self.heads}" if self.heads == self.kv_heads else f"H{self.heads}/{self.kv_heads}"
        kind = "causal" if self.causal else "full"
        kind += " bias" if self.bias else ""
        return f"B{self.batch} {heads} S{self.length} D{self.head_dim} {kind} {_SHORT[self.dtype]}"

    def flops(self, direction: str) -> float:
        """FLOPs of one call, by the convention of this module."""
        forward = 4 * self.batch * self.heads * self.length**2 * self.head_dim * (0.5 if self.causal else 1.0)
        return forward if direction == "forward" else 2.5 * forward

    def bytes_moved(self, direction: str) -> float:
        """Fewest bytes: each input read once, each output written once (the LSE left out)."""
        elements = self.batch * self.heads * self.length * self.head_dim
        q, out = elements * self.dtype.itemsize, elements * out_dtype(self.dtype).itemsize
        kv = 2 * q * self.kv_heads // self.heads
        return q + out + kv if direction == "forward" else 4 * q + 2 * kv

    def inputs(self, device: torch.device | str, seed: int = 0) -> Tensors:
        """Random q, k, v and do, and bias where the case has it."""
        q = (self.batch, self.heads, self.length, self.head_dim)
        kv = (self.batch, self.kv_heads, self.length, self.head_dim)
        shapes: dict[str, tuple[int, ...]] = {"q": q, "k": kv, "v": kv, "do": q}
        if self.bias:
            shapes["bias"] = (*q[:3], self.length)
        return _random(shapes, self.dtype, device, seed)

    def outputs(self, contender: Contender, inputs: Tensors, direction: str) -> Tensors:
        """What a contender computes: out, or dq, dk, dv and dbias."""
        return _outputs(contender, inputs, direction, ("q", "k", "v", *(["bias"] if self.bias else [])), "out")

    def expected(self, inputs: Tensors, direction: str) -> list[tuple[tuple[int, int], attention_testing.Expected]]:
        """The right answer for the first and the last key head (with GQA the last alone, which has several queries).

        One query head at a time, because the matrices of scores of all of them would not fit.
        """
        groups = self.heads // self.kv_heads
        spec = AttentionSpec(scale=self.head_dim**-0.5, window_right=0 if self.causal else None)
        wanted = []
        ends = [(0, 0), (self.batch - 1, self.kv_heads - 1)]
        for b, h in dict.fromkeys(ends if groups == 1 else ends[1:]):
            parts = []
            for i in range(h * groups, (h + 1) * groups):
                one = {n: x[b : b + 1, (h if n in ("k", "v") else i) :][:, :1] for n, x in inputs.items()}
                # Which holds every number of fp8.
                one = {n: x.to(out_dtype(x.dtype)) for n, x in one.items()}
                do = one["do"] if direction == "backward" else None
                qkv, bias = (one["q"], one["k"], one["v"]), one.get("bias")
                parts.append(attention_testing.expected(*qkv, Call(spec, bias=bias), do=do))
            wanted.append(((b, h), _join_heads(parts, out_dtype(self.dtype))))
        return wanted

    def check(self, outputs: Tensors, expected: Any) -> list[budget.Budget]:
        """What was measured; AssertionError where ``outputs`` is outside the budget."""
        groups = self.heads // self.kv_heads
        measured = []
        for (b, h), want in expected:
            query = slice(h * groups, (h + 1) * groups)
            heads = {"out": query, "dq": query, "dbias": query, "dk": slice(h, h + 1), "dv": slice(h, h + 1)}
            measured += attention_testing.check({n: x[b : b + 1, heads[n]] for n, x in outputs.items()}, want)
        return measured

    def contenders(self, device: torch.device | str) -> list[Contender]:
        """FuseMesh's backends that run on ``device``, PyTorch's own attention ops there, and flash-attn if there."""
        ours = []
        for backend in ("triton",) if torch.device(device).type == "cuda" else ("reference", "torch", "cpu"):
            if backends.why_unavailable(backend, device) is None:
                ours.append(self.ours(backend))
        return [*ours, *self._peers(torch.device(device))]

    def ours(self, backend: str) -> Contender:
        """FuseMesh's backend of this name, through the public function."""

        def forward(x: Tensors) -> torch.Tensor:
            options: dict[str, Any] = {"causal": self.causal, "bias": x.get("bias"), "backend": backend}
            out = fusemesh.flash_attention(x["q"], x["k"], x["v"], **options)
            assert isinstance(out, torch.Tensor)
            return out

        return Contender(backend, True, forward, differentiable=backend != "cpu")

    def _peers(self, device: torch.device) -> list[Contender]:
        if self.dtype == FP8 or self.bias:  # which none of them takes, or takes with a gradient
            return []
        if device.type != "cuda":
            return [Contender("sdpa", False, self._sdpa(None))]
        from torch.nn.attention import SDPBackend

        return [
            Contender("sdpa flash", False, self._sdpa(SDPBackend.FLASH_ATTENTION)),
            Contender("sdpa cudnn", False, self._sdpa(SDPBackend.CUDNN_ATTENTION)),
            Contender("sdpa efficient", False, self._sdpa(SDPBackend.EFFICIENT_ATTENTION)),
            Contender("flex", False, self._flex()),
            *([Contender("flash-attn", False, self._flash_attn)] if _has_flash_attn() else []),
        ]

    def _sdpa(self, choice: Any) -> Callable[[Tensors], torch.Tensor]:
        from torch.nn.attention import SDPBackend, sdpa_kernel

        groups = self.heads // self.kv_heads

        def forward(x: Tensors) -> torch.Tensor:
            k, v, gqa = x["k"], x["v"], groups > 1
            if gqa and choice == SDPBackend.EFFICIENT_ATTENTION:
                # It knows no GQA: repeating the heads is what its user pays, so it is timed.
                k, v, gqa = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1), False
            with contextlib.nullcontext() if choice is None else sdpa_kernel(choice):
                return F.scaled_dot_product_attention(x["q"], k, v, is_causal=self.causal, enable_gqa=gqa)

        return forward

    def _flash_attn(self, x: Tensors) -> torch.Tensor:
        from flash_attn import flash_attn_func

        # Its heads stand after positions; the transposed views cost nothing.
        out = flash_attn_func(*(x[name].transpose(1, 2) for name in "qkv"), causal=self.causal)
        assert isinstance(out, torch.Tensor)
        return out.transpose(1, 2)

    def _flex(self) -> Callable[[Tensors], torch.Tensor]:
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention

        compiled: list[Any] = []

        def forward(x: Tensors) -> torch.Tensor:
            if not compiled:
                mask = None
                if self.causal:
                    mask = create_block_mask(
                        lambda b, h, i_q, i_k: i_q >= i_k, None, None, self.length, self.length, device=x["q"].device
                    )
                compiled.extend((torch.compile(flex_attention, dynamic=False), mask))
            gqa = self.heads != self.kv_heads
            return compiled[0](x["q"], x["k"], x["v"], block_mask=compiled[1], enable_gqa=gqa)

        return forward


@dataclass(frozen=True)
class LinearCase:
    """A linear layer: x [rows, in_features], w [out_features, in_features], with bias and activation, or gated."""

    rows: int
    in_features: int
    out_features: int
    activation: str | None
    gated: bool
    dtype: torch.dtype
    has_bias: bool = True
    op = "linear"
    directions = DIRECTIONS

    @property
    def name(self) -> str:
        kind = " ".join(["gated"] * self.gated + [self.activation or "plain"] + ["no bias"] * (not self.has_bias))
        return f"M{self.rows} K{self.in_features} N{self.out_features} {kind} {_SHORT[self.dtype]}"

    def flops(self, direction: str) -> float:
        """2 M N K for each product: one forward (gated two), twice as many backward."""
        forward = 2 * self.rows * self.in_features * self.out_features * (2 if self.gated else 1)
        return forward if direction == "forward" else 2 * forward

    def bytes_moved(self, direction: str) -> float:
        """Fewest bytes: x, weights and y once each; backward dy, x and weights read, dx and their gradients written."""
        x, y = self.rows * self.in_features, self.rows * self.out_features
        w = self.in_features * self.out_features * (2 if self.gated else 1)
        return (x + w + y if direction == "forward" else 2 * x + 2 * w + y) * self.dtype.itemsize

    def inputs(self, device: torch.device | str, seed: int = 0) -> Tensors:
        """Random x, w, bias, w_up where gated, and dy; weights of variance 1 / K, so that y is of x's size."""
        w = (self.out_features, self.in_features)
        shapes: dict[str, tuple[int, ...]] = {"x": (self.rows, self.in_features), "w": w}
        if self.has_bias:
            shapes["bias"] = w[:1]
        if self.gated:
            shapes["w_up"] = w
        values = _random({**shapes, "dy": (self.rows, self.out_features)}, self.dtype, device, seed)
        return {n: x * self.in_features**-0.5 if n in ("w", "w_up") else x for n, x in values.items()}

    def outputs(self, contender: Contender, inputs: Tensors, direction: str) -> Tensors:
        """What a contender computes: y, or dx, dw, dbias and dw_up."""
        leaves = tuple(name for name in inputs if name != "dy")
        return _outputs(contender, inputs, direction, leaves, "y")

    def expected(self, inputs: Tensors, direction: str) -> tuple[Tensors, Tensors]:
        """(exact in fp64, eager in the tested dtype)."""
        exact = Contender("exact", False, self._reference)
        doubled = {name: x.double() for name, x in inputs.items()}
        eager = Contender("eager", False, self._eager)
        return self.outputs(exact, doubled, direction), self.outputs(eager, inputs, direction)

    def check(self, outputs: Tensors, expected: Any) -> list[budget.Budget]:
        """What was measured; AssertionError where ``outputs`` is outside the budget."""
        exact, eager = expected
        return [budget.check(name, value, exact[name], eager[name]) for name, value in outputs.items()]

    def contenders(self, device: torch.device | str) -> list[Contender]:
        """FuseMesh's backends that run on ``device``, and F.linear with PyTorch's activation."""
        names = ("triton",) if torch.device(device).type == "cuda" else ("reference", "torch")
        return [*(self.ours(name) for name in names), Contender("F.linear", False, self._eager)]

    def ours(self, backend: str) -> Contender:
        """FuseMesh's backend of this name, through the public function."""

        def forward(x: Tensors) -> torch.Tensor:
            return fusemesh.fused_linear(
                x["x"], x["w"], x.get("bias"), activation=self.activation, w_up=x.get("w_up"), backend=backend
            )

        return Contender(backend, True, forward)

    def _reference(self, x: Tensors) -> torch.Tensor:
        return linear_reference.linear(x["x"], x["w"], x.get("bias"), activation=self.activation, w_up=x.get("w_up"))

    def _eager(self, x: Tensors) -> torch.Tensor:
        act: dict[str | None, Callable[[torch.Tensor], torch.Tensor]] = {
            None: lambda z: z,
            "gelu": F.gelu,
            "gelu_tanh": lambda z: F.gelu(z, approximate="tanh"),
            "silu": F.silu,
            "relu2": lambda z: F.relu(z).square(),
        }
        y = act[self.activation](F.linear(x["x"], x["w"], x.get("bias")))
        return y * F.linear(x["x"], x["w_up"]) if self.gated else y


Case = AttentionCase | LinearCase


def _has_flash_attn() -> bool:
    """Whether the package of that name loads here; a wheel built for another torch does not."""
    try:
        return hasattr(importlib.import_module("flash_attn"), "flash_attn_func")
    except ImportError:
        return False


def _random(shapes: dict[str, tuple[int, ...]], dtype: torch.dtype, device: torch.device | str, seed: int) -> Tensors:
    generator = torch.Generator(device).manual_seed(seed)
    return {n: torch.randn(s, generator=generator, device=device).to(dtype) for n, s in shapes.items()}


def _outputs(contender: Contender, inputs: Tensors, direction: str, leaves: tuple[str, ...], result: str) -> Tensors:
    if direction == "forward":
        with torch.no_grad():
            return {result: contender.forward(inputs)}
    return dict(zip((f"d{name}" for name in leaves), backward_call(contender, inputs, leaves)(), strict=True))


def backward_call(
    contender: Contender, inputs: Tensors, leaves: tuple[str, ...]
) -> Callable[[], tuple[torch.Tensor, ...]]:
    """A call that runs the backward alone, any number of times: the forward has run and its tape is kept."""
    tape = {name: x.detach().requires_grad_() if name in leaves else x for name, x in inputs.items()}
    result = contender.forward(tape)
    upstream = inputs["do" if "do" in inputs else "dy"]
    wanted = [tape[name] for name in leaves]
    return lambda: torch.autograd.grad(result, wanted, upstream, retain_graph=True)


def timed_call(case: Case, contender: Contender, inputs: Tensors, direction: str) -> Callable[[], Any]:
    """The call that is timed: the forward without a tape, or the backward alone."""
    if direction == "backward":
        leaves = tuple(name for name in inputs if name not in ("do", "dy"))
        return backward_call(contender, inputs, leaves)

    def forward() -> torch.Tensor:
        with torch.no_grad():
            return contender.forward(inputs)

    return forward


def _join_heads(parts: list[attention_testing.Expected], dtype: torch.dtype) -> attention_testing.Expected:
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

    return attention_testing.Expected(join("exact", None), join("eager", dtype), join("absolute", None))


def compare(
    case: Case,
    direction: str,
    device: torch.device | str,
    roofline: benchmark.Roofline,
    contenders: list[Contender] | None = None,
    **timing: Any,
) -> list[dict[str, Any]]:
    """Check, then time, every contender on one case; one row each (:func:`fusemesh.benchmark.row`).

    A contender whose result is outside the budget, or who raises, gets a row that says so and holds no time.

    Args:
        contenders: those to run, by default all that can.
        timing: passed to :func:`fusemesh.benchmark.time_call`.
    """
    inputs = case.inputs(device)
    expected = case.expected(inputs, direction)
    rows = []
    for contender in case.contenders(device) if contenders is None else contenders:
        if direction == "backward" and not contender.differentiable:
            continue
        where = (case.op, direction, case.name, contender.name)
        try:
            case.check(case.outputs(contender, inputs, direction), expected)
            taken = benchmark.time_call(timed_call(case, contender, inputs, direction), device, **timing)
        except AssertionError as error:
            rows.append(benchmark.refused(*where, f"WRONG: {error}"))
        except Exception as error:
            rows.append(benchmark.refused(*where, f"did not run: {type(error).__name__}: {error}"))
        else:
            flops, moved = case.flops(direction), case.bytes_moved(direction)
            rows.append(benchmark.row(*where, taken, flops, moved, roofline, "ok"))
    return rows
