"""DecodeCase: one call of flash_attention_decode, from which tests, benchmarks and the tuner build the same inputs.

Slots that a call must not read hold NaN: those without a key, those before cache_starts, pages of no sequence. Entries
of the table beyond a sequence's pages are no pages at all.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch

from ...attention.decode.api import flash_attention_decode
from ...testing import budget
from . import common
from .common import ALL_DTYPES, Inputs, Tensors

_SHAPE = ("dtype", "H", "Hkv", "Sq", "D", "Dv", "capacity", "lens")
Answer = tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True)
class DecodeCase:
    """One call. Dims of mask and bias are written as a subset of "bhmn", the dimensions in which they are not 1."""

    dtype: str = "fp32"
    H: int = 2
    Hkv: int = 2
    Sq: int = 1
    D: int = 16
    Dv: int = 16
    capacity: int = 70
    lens: tuple[int, ...] = (70, 33)  # keys before the append; its length is B
    starts: tuple[int, ...] | None = None
    added: int = 0
    page: int | None = None
    latent: bool = False  # the values are the first Dv columns of the keys
    causal: bool = False
    window: tuple[int | None, int | None] | None = None
    mask: str | None = None
    bias: str | None = None
    softcap: float | None = None
    alibi: str | None = None  # "h" or "bh"
    sinks: bool = False
    sinks_dtype: str = "fp32"
    scale: float | None = None  # default: 1 / sqrt(D)
    q_size: float = 1.0
    layout: str = "bhsd"  # or "bshd": positions outside heads in memory
    indices: torch.dtype = torch.int32
    op = "decode"
    result = "out"
    upstream = "do"  # of no case: there is no backward
    directions = ("forward",)
    counted = ("attention_decode",)

    def __str__(self) -> str:
        return self.name

    @property
    def name(self) -> str:
        """The dtype, the shape, and every feature."""
        same = len(set(self.lens)) == 1 and self.lens[0] == self.capacity
        lengths = f"S{self.capacity}" if same else f"S{','.join(map(str, self.lens))} of {self.capacity}"
        shape = [self.dtype, f"B{len(self.lens)}", common.heads_name(self.H, self.Hkv), f"Sq{self.Sq}", lengths]
        shape.append(common.dims_name(self.D, self.Dv))
        return " ".join(shape + common.features_name(self, _SHAPE))

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype of q and the caches."""
        return ALL_DTYPES[self.dtype]

    @property
    def lengths(self) -> list[int]:
        """Keys of each sequence, new ones included."""
        return [length + self.added for length in self.lens]

    def flops(self, direction: str = "forward") -> float:
        """Return 2 * H * Sq * (D + Dv) for each key of each sequence."""
        return 2.0 * self.H * self.Sq * sum(self.lengths) * (self.D + self.Dv)

    def bytes_moved(self, direction: str = "forward") -> float:
        """Return the fewest bytes: q and the keys that there are read once, out written once."""
        columns = self.D if self.latent else self.D + self.Dv
        elements = self.Hkv * sum(self.lengths) * columns + len(self.lens) * self.H * self.Sq * (self.D + self.Dv)
        return float(elements * self.torch_dtype.itemsize)

    def inputs(self, device: torch.device | str = "cpu", seed: int = 4321) -> Inputs:
        """Return every tensor of the call; the same at every call with one ``seed``."""
        return self.arranged(self.tensors(device, seed))

    def tensors(self, device: torch.device | str = "cpu", seed: int = 4321) -> Inputs:
        """Return q, the sequences' keys and values in order, and the tensors of the features."""
        generator = torch.Generator(device).manual_seed(seed)
        B = len(self.lens)

        def new(*shape: int, size: float = 1.0, dtype: torch.dtype = self.torch_dtype) -> torch.Tensor:
            values = torch.randn(*shape, generator=generator, device=device, dtype=torch.float64)
            return (size * values).to(dtype)

        sizes = (B, self.H, self.Sq, self.capacity)
        keys = new(B, self.Hkv, self.capacity, self.D)
        x: Inputs = {
            "q": new(B, self.H, self.Sq, self.D, size=self.q_size),
            "keys": keys,
            "values": keys[..., : self.Dv] if self.latent else new(B, self.Hkv, self.capacity, self.Dv),
            "sinks": new(self.H, dtype=ALL_DTYPES[self.sinks_dtype]) if self.sinks else None,
            "mask": None,
            "bias": None,
            "alibi_slopes": None,
        }
        if self.mask is not None:
            shape = common.broadcast_shape(self.mask, sizes)
            x["mask"] = torch.rand(shape, generator=generator, device=device) > 0.3
        if self.bias is not None:
            x["bias"] = new(*common.broadcast_shape(self.bias, sizes))
        if self.alibi is not None:
            x["alibi_slopes"] = new(*([B, self.H] if self.alibi == "bh" else [self.H]), dtype=torch.float32).abs() / 4
        return x

    def arranged(self, x: Inputs) -> Inputs:
        """Return ``x`` with the caches that hold its keys and values, their table, the lengths, and the new rows."""
        B, device = len(self.lens), x["q"].device
        table = None
        if self.page is not None:
            pages = -(-self.capacity // self.page)
            assert pages * self.page == self.capacity, "the capacity is whole pages"
            order = torch.randperm(B * pages + 3, generator=torch.Generator().manual_seed(7))
            table = order[: B * pages].view(B, pages).to(device, self.indices)
        found: Inputs = {"k_cache": self.cache(x["keys"], table), "v_cache": None, "k_new": None, "v_new": None}
        if not self.latent:
            found["v_cache"] = self.cache(x["values"], table)
        if self.added:
            for name, rows in (("k_new", "keys"), ("v_new", "values")):
                if found[f"{name[0]}_cache"] is not None:
                    parts = [x[rows][b, :, n : n + self.added] for b, n in enumerate(self.lens)]
                    found[name] = torch.stack(parts)
        if table is not None and self.page is not None:
            for b, length in enumerate(self.lengths):
                table[b, -(-length // self.page) :] = 2**31 - 1 if b % 2 else -5
        found["block_table"] = table
        found["cache_lens"] = torch.tensor(self.lens, dtype=self.indices, device=device)
        starts = None if self.starts is None else torch.tensor(self.starts, dtype=self.indices, device=device)
        return {**x, **found, "cache_starts": starts}

    def cache(self, rows: torch.Tensor, table: torch.Tensor | None) -> torch.Tensor:
        """Return a cache with ``rows`` [B, Hkv, capacity, ...] from each sequence's start to its length, else NaN."""
        filled = torch.full_like(rows, math.nan)
        for b, length in enumerate(self.lens):
            start = 0 if self.starts is None else self.starts[b]
            filled[b, :, start:length] = rows[b, :, start:length]
        if table is not None and self.page is not None:
            pages = filled.unflatten(2, (-1, self.page)).transpose(1, 2).flatten(0, 1)
            filled = rows.new_full((table.numel() + 3, *pages.shape[1:]), math.nan)
            filled[table.flatten().long()] = pages
        return filled.transpose(1, 2).contiguous().transpose(1, 2) if self.layout == "bshd" else filled

    def slot(self, x: Inputs, b: int, position: int) -> tuple[int, int]:
        """Return the first and the third index of a position of sequence ``b`` in the caches."""
        if self.page is None:
            return b, position
        return int(x["block_table"][b, position // self.page]), position % self.page

    def appended(self, x: Inputs) -> Tensors:
        """Return the caches as the call leaves them."""
        caches = {name: x[name].clone() for name in ("k_cache", "v_cache") if x[name] is not None}
        for name, rows in (("k_cache", "keys"), ("v_cache", "values")):
            for b, length in enumerate(self.lens):
                for position in range(length, length + self.added) if name in caches else ():
                    i, j = self.slot(x, b, position)
                    caches[name][i, :, j] = x[rows][b, :, position]
        return caches

    def leaves(self, x: Inputs) -> tuple[str, ...]:
        """Return the names of the inputs that have a gradient: none."""
        return ()

    def run(self, x: Inputs, backend: str, *, return_lse: bool = False) -> Any:
        """Return what the public function returns; it appends to the caches of ``x``."""
        positional = self.causal or self.window is not None or self.alibi is not None
        names = ("cache_lens", "block_table", "cache_starts", "k_new", "v_new", "mask", "bias", "alibi_slopes", "sinks")
        return flash_attention_decode(
            x["q"],
            x["k_cache"],
            x["v_cache"],
            **{name: x[name] for name in names},
            v_dim=self.Dv if self.latent else None,
            causal=self.causal,
            align="bottom_right" if positional else None,
            window=self.window,
            softcap=self.softcap,
            scale=self.scale,
            return_lse=return_lse,
            backend=backend,
        )

    def compute(self, x: Inputs, backend: str) -> Tensors:
        """Return out, lse and the caches as the call leaves them; those of ``x`` stay as they are."""
        caches = {name: x[name].clone() for name in ("k_cache", "v_cache") if x[name] is not None}
        out, lse = self.run({**x, **caches}, backend, return_lse=True)
        return {"out": out, "lse": lse, **caches}

    def exact(self, x: Inputs, dtype: torch.dtype, sequences: list[int] | None = None) -> Answer:
        """Return out and lse in ``dtype``, one query of one head at a time, by its sequence's keys alone.

        ``sequences`` are those to compute, by default all of them; the others stay 0 and -inf.
        """
        B = len(self.lens)
        out = torch.zeros(B, self.H, self.Sq, self.Dv, dtype=dtype, device=x["q"].device)
        lse = torch.full((B, self.H, self.Sq), -math.inf, dtype=dtype, device=x["q"].device)
        for b in range(B) if sequences is None else sequences:
            keys = slice(0 if self.starts is None else self.starts[b], self.lengths[b])
            for h in range(self.H):
                k, v = (x[name][b, h // (self.H // self.Hkv), keys].to(dtype) for name in ("keys", "values"))
                for i in range(self.Sq):
                    s, seen = self._scores(x, k, keys, (b, h, i))
                    if seen.any():
                        s = s[seen]
                        sink = s.new_tensor(-math.inf) if x["sinks"] is None else x["sinks"][h].to(dtype)
                        out[b, h, i] = torch.cat([s, sink[None]]).softmax(0)[:-1] @ v[seen]
                        lse[b, h, i] = torch.logsumexp(s, 0)
        return out, lse

    def _scores(self, x: Inputs, k: torch.Tensor, keys: slice, at: tuple[int, int, int]) -> Answer:
        """Return the scores of one query of one head, in the dtype of ``k``, and which keys it sees."""
        b, h, i = at
        position = self.lengths[b] - self.Sq + i
        slots = torch.arange(keys.start, keys.stop, device=k.device)
        s = (self.D**-0.5 if self.scale is None else self.scale) * (k @ x["q"][b, h, i].to(k.dtype))
        if self.softcap is not None:
            s = self.softcap * torch.tanh(s / self.softcap)
        if x["alibi_slopes"] is not None:
            slope = x["alibi_slopes"].expand(len(self.lens), self.H)[b, h].to(k.dtype)
            s = s - slope * (position - slots).abs().to(k.dtype)
        full = (len(self.lens), self.H, self.Sq, self.capacity)
        if x["bias"] is not None:
            s = s + x["bias"].expand(full)[b, h, i, keys].to(k.dtype)
        seen = torch.ones_like(slots, dtype=torch.bool)
        if x["mask"] is not None:
            seen &= x["mask"].expand(full)[b, h, i, keys]
        left, right = self.window or (None, None)
        right = 0 if self.causal else right
        if left is not None:
            seen &= slots >= position - left
        if right is not None:
            seen &= slots <= position + right
        return s, seen

    def expected(self, x: Inputs, direction: str = "forward") -> dict[str, Any]:
        """Return out and lse, each (exact, eager), and the caches after the append."""
        return self._expected(x, None)

    def expected_at_ends(self, x: Inputs, direction: str = "forward") -> dict[str, Any]:
        """Return what :meth:`expected` does, for the first and the last sequence alone."""
        return self._expected(x, sorted({0, len(self.lens) - 1}))

    def _expected(self, x: Inputs, sequences: list[int] | None) -> dict[str, Any]:
        # The lse is fp32 whatever the inputs are.
        wanted = [self.exact(x, dtype, sequences) for dtype in (torch.float64, self.torch_dtype, torch.float32)]
        out, lse = (wanted[0][0], wanted[1][0]), (wanted[0][1], wanted[2][1])
        return {"out": out, "lse": lse, "sequences": sequences, **self.appended(x)}

    def check(self, outputs: dict[str, Any], want: Any) -> list[budget.Budget]:
        """Return how far ``outputs`` are off what :meth:`expected` returned.

        Raises:
            AssertionError: one is outside the error budget, or a cache is not what the append should leave.
        """
        measured = []
        for name, value in outputs.items():
            if name in ("out", "lse"):
                exact, eager = want[name]
                rows = slice(None) if want["sequences"] is None else want["sequences"]
                measured.append(budget.check(name, value[rows], exact[rows], eager[rows]))
            else:
                same = (value == want[name]) | (value.isnan() & want[name].isnan())
                assert same.all(), f"{name}: {int((~same).sum())} elements are not what the append should leave"
        return measured

    def eager(self, want: dict[str, Any]) -> Tensors:
        """Return eager PyTorch's values in the shapes of the results, and the caches."""
        caches: Tensors = {name: want[name] for name in want if name in ("k_cache", "v_cache")}
        return {"out": want["out"][1], "lse": want["lse"][1], **caches}
