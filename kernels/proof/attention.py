"""Trials of attention's kernels, of batches and packed: small calls of the same specialisation as a given one."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from ..attention.call import score_mods
from ..attention.call.options import Call
from ..attention.call.packed import Packed
from ..attention.call.spec import FP8, AttentionSpec
from ..attention.gpu import mask_tiles, tiles
from ..attention.gpu.inputs import describe_call
from ..attention.gpu.mode import scores_of
from ..testing import budget
from . import small
from .trial import Results, Trial, Wanted, Wrong, compare
from .wanted import expected

WRITTEN = {
    "attention_forward_kernel": ("out", "lse", "out and its rest"),
    "attention_dkdv_kernel": ("dk", "dv"),
    "attention_dq_kernel": ("dq",),
    "attention_dbias_kernel": ("dbias",),
    "attention_delta_kernel": ("dsinks",),
}
COARSE = 1.125  # what the trials' out is multiplied by where it comes with a rest
GAP = 3  # rows of packed tensors that belong to no sequence, at each end


@dataclass(frozen=True)
class Real:
    """The call that is to be proven, as its op received it; packed tensors are [total, heads, D]."""

    module: Any  # of backend triton
    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    call: Call
    saved: tuple[Any, ...] | None = None  # do, out, lse, and as far as they are given dlse and out's rest
    bias_grad: bool = False
    keep_rest: bool = False

    @property
    def packed(self) -> Packed | None:
        """Where packed sequences lie."""
        return self.call.packed

    @property
    def sizes(self) -> tuple[int, int, int, int, int]:
        """B, H, Hkv, and the longest Sq and Sk."""
        if self.packed is None:
            return self.q.shape[0], self.q.shape[1], self.k.shape[1], self.q.shape[2], self.k.shape[2]
        return self.packed.batch, self.q.shape[1], self.k.shape[1], self.packed.max_q, self.packed.max_k

    @property
    def has_user_mods(self) -> bool:
        """:func:`has_user_mods` of the call."""
        return has_user_mods(self.call)

    def compute(self) -> Any:
        """Return what the op returns, computed by Triton's kernels."""
        if self.saved is None:
            return self.module.forward(self.q, self.k, self.v, self.call, keep_rest=self.keep_rest)
        do, out, lse, dlse, rest = self.saved
        tensors = (do, self.q, self.k, self.v, out, lse, dlse)
        return self.module.backward(*tensors, self.call, bias_grad=self.bias_grad, out_rest=rest)

    @property
    def sums_bias(self) -> bool:
        """Return whether the gradient of a bias has a pass of its own."""
        bias = self.call.bias
        return self.bias_grad and bias is not None and bias.shape[2] > 1 and bias.shape[3] > 1


@dataclass(frozen=True)
class Lengths:
    """Sizes of a small call: of each sequence its queries and keys (of a batch all the same), and the tile's."""

    q: tuple[int, ...]
    k: tuple[int, ...]
    H: int
    Hkv: int
    block_m: int
    block_n: int
    has_empty_rows: bool  # whether the first queries stand before all keys

    @property
    def most(self) -> tuple[int, int]:
        """The longest of both."""
        return max(self.q), max(self.k)

    @property
    def shift(self) -> int:
        """The first query's position: the last one stands at the last key, or the first ones before all keys."""
        shift = self.most[1] - self.most[0]
        return min(shift, 0) - 5 if self.has_empty_rows else shift


def trials(real: Real, exactly: bool) -> Iterator[Trial]:
    """Yield small calls with the kernels of ``real``.

    Args:
        exactly: sizes keep their factors of 2, as they must where strides that launchers make are no multiples of 16.
    """
    D, Dv = real.q.shape[-1], real.v.shape[-1]
    if not exactly and (D % small.ALIGNMENT or Dv % small.ALIGNMENT or real.sums_bias):
        return
    for seed, lengths in enumerate(_lengths(real, exactly)):
        if real.call.mask is not None:
            yield from _mask_trials(real, lengths)
        yield _trial(real, lengths, small.Maker(real.q.device, 20260 + seed))


def limit(real: Real) -> str:
    """Return the lengths of the call where they are shorter than those of a whole trial, and it may not be longer."""
    if not real.has_user_mods:
        return ""
    m, n = _blocks(real)
    Sq, Sk = real.sizes[3:]
    return "" if Sq >= _many_queries(real, m) and Sk >= 3 * n + 33 else f" {Sq} x {Sk}"


def _mask_trials(real: Real, lengths: Lengths) -> Iterator[Trial]:
    """Yield the reading of a mask for each pass, so that it is beyond suspicion, or not, when the passes are tried."""
    call = _small_call(real, lengths, small.Maker(real.q.device))
    mask = call.mask
    assert mask is not None
    for name, tile in _tiles(real).items():

        def run(tile: tiles.Tile = tile, along_keys: bool = name != "dkdv") -> Results:
            found = mask_tiles.shown_tiles(scores_of(call), tile.block_m, tile.block_n, along_keys=along_keys)
            return {"tiles": found.p_tiles}

        def check(found: Results, tile: tiles.Tile = tile, along_keys: bool = name != "dkdv") -> list[Wrong]:
            return _check_tiles(found["tiles"], mask, tile, along_keys)

        yield Trial(run, check, {"attention_mask_tiles_kernel": ("tiles",)})


def _check_tiles(found: torch.Tensor | None, mask: torch.Tensor, tile: tiles.Tile, along_keys: bool) -> list[Wrong]:
    """Return whether the lists of a mask's tiles, as mask_tiles.py describes them, are wrong."""
    assert found is not None
    block_m, block_n = (1 if mask.shape[i] == 1 else n for i, n in ((2, tile.block_m), (3, tile.block_n)))
    padding = (0, -mask.shape[3] % block_n, 0, -mask.shape[2] % block_m)
    whole = torch.nn.functional.pad(mask.to(torch.uint8), padding)
    seen = whole.unflatten(3, (-1, block_n)).unflatten(2, (-1, block_m)).amax((3, 5)) > 0
    rows = (seen if along_keys else seen.transpose(2, 3)).flatten(0, 2).tolist()
    half = found.shape[1] // 2
    for i, (row, actual) in enumerate(zip(rows, found.tolist(), strict=True)):
        shown = [t for t, is_seen in enumerate(row) if is_seen]
        before = list(itertools.accumulate(row, initial=0))
        if actual[: len(before)] != before or actual[half : half + len(shown)] != shown:
            return [Wrong("tiles", f"tiles: {len(shown)} elements in the list of block {i}, other ones were found")]
    return []


def _tiles(real: Real) -> dict[str, tiles.Tile]:
    """Return the tiles of the call's passes."""
    dense = (x.transpose(0, 1).unsqueeze(0) for x in (real.q, real.k, real.v))
    q, k, v = dense if real.packed is not None else (real.q, real.k, real.v)
    gpu = describe_call(q, k, v, real.call)
    size: tuple[Any, ...] = (gpu.target, q.dtype, gpu.mode.block_d, gpu.mode.block_dv)
    dims = gpu.mode.tile_dims
    if real.saved is None:
        return {"forward": tiles.choose_forward(*size, *dims, keep_rest=real.keep_rest)}
    found = {"dkdv": tiles.choose_dkdv(*size, *dims), "dq": tiles.choose_dq(*size, *dims)}
    return {**found, "dbias": tiles.choose_dbias(*size)} if real.sums_bias else found


def _blocks(real: Real) -> tuple[int, int]:
    """Return the largest blocks of queries and of keys of the call's kernels."""
    chosen = _tiles(real).values()
    return max(tile.block_m for tile in chosen), max(tile.block_n for tile in chosen)


def _many_queries(real: Real, block_m: int) -> int:
    """Return how many queries are several blocks; a backward goes over them in a loop, too."""
    return (1 if real.saved is None else 3) * block_m + 17


def _lengths(real: Real, exactly: bool) -> Iterator[Lengths]:
    """Yield the sizes of the trials: several tiles, ragged ends, and another number of steps of each loop."""
    B, H, Hkv, Sq, Sk = real.sizes
    m, n = _blocks(real)
    user = real.has_user_mods
    if user and real.packed is not None:
        # Read on the host, once: beyond the longest sequence a table may have ended.
        Sq, Sk = (int(cu.diff().max()) for cu in (real.packed.cu_q, real.packed.cu_k))
    h, kv = small.heads(H, Hkv, user, exactly)
    # The sums of a bias's gradient over batches are compiled for their number.
    batch = small.like(B, 2) if real.sums_bias and B % small.ALIGNMENT == 0 else min(B, 2)
    wanted = [(19, 3 * n + 33), (_many_queries(real, m), 2 * n + 17)]
    # The log-sum-exp of one query has strides of 1 that no other has.
    wanted += [(1, 2 * n + 17)] if Sq == 1 and real.packed is None else []
    for index, (sq, sk) in enumerate(wanted):
        if user:
            sq, sk = min(sq, Sq), min(sk, Sk)
        elif exactly and sq > 1:
            sq, sk = small.length_like(Sq, sq), small.length_like(Sk, sk)
        of_q, of_k = (sq,) * batch, (sk,) * batch
        if real.packed is not None and B > 1:
            of_q, of_k = (sq, 0, 1, m // 2 + 5), (sk, 9, min(sk, 65), m // 2 + 5)
            if index:
                # No keys at all, and fewer than queries.
                of_q, of_k = (sq, 5, *of_q[2:]), (sk, 0, of_k[2], m // 4 + 1)
            of_q, of_k = of_q[: min(B, 4)], of_k[: min(B, 4)]
            if user:
                of_q, of_k = tuple(min(x, sq) for x in of_q), tuple(min(x, sk) for x in of_k)
            of_q, of_k = (x + (0,) * (batch - len(x)) for x in (of_q, of_k))
        yield Lengths(of_q, of_k, h, kv, m, n, index == 1)


def _trial(real: Real, lengths: Lengths, maker: small.Maker) -> Trial:
    spec = real.call.spec
    D, Dv = real.q.shape[-1], real.v.shape[-1]
    # Scores of the size that attention is made for, whatever the scale.
    large = 4.0 if real.q.dtype == FP8 else 1.0
    q_size = min(1 / (abs(spec.scale) * D**0.5), 8.0) if spec.scale else 1.0
    call = _small_call(real, lengths, maker)
    rows_q, rows_k = _rows(real, lengths)
    q = maker.normal(real.q, _shape(real, lengths, rows_q, lengths.H, D), large * q_size)
    k = maker.normal(real.k, _shape(real, lengths, rows_k, lengths.Hkv, D), large)
    # Beside sinks v and do are mostly positive: the sinks' gradients, a number for each head, are then sums of one
    # sign. Of both signs they would come from the roundings of ``out`` alone, which eager's are no measure of.
    mean = 0.0 if call.sinks is None else 0.5
    v = maker.normal(real.v, _shape(real, lengths, rows_k, lengths.Hkv, Dv), large, mean)
    if real.saved is None:

        def forward() -> Results:
            names = ("out", "lse", "out_rest")
            return dict(zip(names, real.module.forward(q, k, v, call, keep_rest=real.keep_rest), strict=False))

        def check(found: Results) -> list[Wrong]:
            wanted = expected(q, k, v, call)
            wrong = compare(found, wanted)
            return wrong or (_check_rest(found, wanted["out"]) if real.keep_rest else [])

        return Trial(forward, check, WRITTEN)
    do = maker.normal(real.saved[0], _shape(real, lengths, rows_q, lengths.H, Dv), mean=mean)
    dlse = None
    if real.saved[3] is not None:
        of_rows = (lengths.H, rows_q) if real.packed is not None else (len(lengths.q), lengths.H, rows_q)
        dlse = maker.normal(real.saved[3], of_rows)
    wanted = expected(q, k, v, call, do, dlse, real.bias_grad)
    exact, rest = wanted["out"].exact, None
    out = maker.holding(real.saved[1], exact.to(do.dtype))
    if real.saved[4] is not None:
        # A rest as large as this is missed by every gradient that is computed without it.
        out = maker.holding(real.saved[1], (exact * COARSE).to(do.dtype))
        rest = maker.holding(real.saved[4], (exact - out.double()).to(do.dtype))
    lse = maker.holding(real.saved[2], wanted["lse"].exact.float())
    names = ("dq", "dk", "dv", "dbias", "dsinks")

    def backward() -> Results:
        tensors = (do, q, k, v, out, lse, dlse)
        found = real.module.backward(*tensors, call, bias_grad=real.bias_grad, out_rest=rest)
        return dict(zip(names, found[:5], strict=True))

    return Trial(
        backward,
        lambda found: compare(found, {x: wanted[x] for x in names if x in wanted}),
        WRITTEN,
        ("attention_delta_kernel",),
    )


def _check_rest(found: Results, wanted: Wanted) -> list[Wrong]:
    """Return whether out and its rest together are no nearer to the truth than out alone, by 10 % of its mean error.

    With probabilities rounded to 16 bits before they meet v, they are by 30 % or more.
    """
    out, rest = found["out"], found["out_rest"]
    name = WRITTEN["attention_forward_kernel"][2]
    if out is None or rest is None:
        return [Wrong(name, f"{name}: expected tensors, received None")]
    if rest.shape != out.shape or rest.dtype != out.dtype:
        return [Wrong(name, f"{name}: {tuple(rest.shape)}, {rest.dtype} is not laid out as out")]
    ratio = (1.0, 0.9)
    try:
        whole = out.float() + rest.float()
        measured = budget.measure(name, whole, wanted.exact, out.float(), ratio=ratio)
    except AssertionError as error:
        return [Wrong(name, str(error))]
    return [] if measured.passed else [Wrong(name, str(measured))]


def _rows(real: Real, lengths: Lengths) -> tuple[int, int]:
    """Return the rows of queries and of keys of a tensor."""
    if real.packed is None:
        return lengths.most
    rows = (2 * GAP + sum(of) for of in (lengths.q, lengths.k))
    # A tensor of one row would have no room for the padding.
    found = [small.length_like(x.shape[0], n) for x, n in zip((real.q, real.k), rows, strict=True)]
    return found[0], found[1]


def _shape(real: Real, lengths: Lengths, rows: int, heads: int, dim: int) -> tuple[int, ...]:
    return (rows, heads, dim) if real.packed is not None else (len(lengths.q), heads, rows, dim)


def _small_call(real: Real, lengths: Lengths, maker: small.Maker) -> Call:
    """Return the call's options with tensors of the small sizes."""
    call, device = real.call, real.q.device
    sizes = (len(lengths.q), lengths.H, *lengths.most)

    def of_scores(x: torch.Tensor) -> tuple[int, ...]:
        return tuple(1 if n == 1 else size for n, size in zip(x.shape, sizes, strict=True))

    mask = None
    if call.mask is not None:
        mask = maker.flags(call.mask, of_scores(call.mask))
        if mask.shape[2] > 1:
            mask[:, :, mask.shape[2] // 2] = False
        if mask.shape[3] > 1:
            # A tile that hides all of its keys, from the first block of queries or from all.
            mask[:, :, : lengths.block_m, lengths.block_n : 2 * lengths.block_n] = False
    spec, aux = small_mods(call, sizes[:2], maker)
    spec = _small_spec(real, spec, lengths)
    origin = call.origin
    if origin is not None and not real.has_user_mods:
        spec = dataclasses.replace(spec, origin_q=0, origin_k=0, origin_head=0, origin_batch=0)
        origin = maker.holding(origin, torch.tensor([5 + lengths.shift, 5, 1, 2], device=device))
    descale = None
    if call.descale is not None:
        # Powers of two, so that bf16 holds the products exactly.
        powers = torch.randint(-2, 2, (sizes[0], lengths.Hkv, 3), generator=maker.generator, device=device)
        descale = maker.contiguous(call.descale, torch.exp2(powers.float()))
    packed = None
    if call.packed is not None:
        starts = (tuple(itertools.accumulate(of, initial=GAP)) for of in (lengths.q, lengths.k))
        cu = [torch.tensor(x, device=device, dtype=call.packed.cu_q.dtype) for x in starts]
        cu_q, cu_k = maker.holding(call.packed.cu_q, cu[0]), maker.holding(call.packed.cu_k, cu[1].to(call.packed.cu_k))
        packed = Packed(cu_q, cu_k, *lengths.most, call.packed.is_bottom_right)
    return Call(
        spec,
        mask=mask,
        bias=None if call.bias is None else maker.normal(call.bias, of_scores(call.bias)),
        origin=origin,
        aux=aux,
        sinks=None if call.sinks is None else maker.normal(call.sinks, (lengths.H,)),
        seed=None if call.seed is None else maker.holding(call.seed, torch.full_like(call.seed, 2**40 + 7)),
        descale=descale,
        packed=packed,
    )


def has_user_mods(call: Call) -> bool:
    """Return whether a score mod may read tables of the caller, which have an end."""
    return any(not isinstance(score_mods.get(name).forward, str) for name in call.spec.mods)


def small_mods(
    call: Call, sizes: tuple[int, int], maker: small.Maker
) -> tuple[AttentionSpec, tuple[torch.Tensor, ...]]:
    """Return the numbers of the call for small sizes (B and H), and the tensors of its score mods; a user's as are."""
    aux: list[torch.Tensor] = []
    params: list[float] = []
    for mod, tensors, numbers in score_mods.split(call.spec.mods, call.aux, call.spec.params):
        if mod is score_mods.ALIBI:
            slopes = 0.1 * torch.randn(sizes, generator=maker.generator, device=maker.device)
            aux.append(maker.contiguous(tensors[0], slopes))
            params.append(float(sizes[1]))
        else:
            aux += [maker.copied(x) for x in tensors]
            params += numbers
    return dataclasses.replace(call.spec, params=tuple(params)), tuple(aux)


def _small_spec(real: Real, spec: AttentionSpec, lengths: Lengths) -> AttentionSpec:
    """Return windows that end within the small lengths, and positions; a user's mods keep those of the call."""
    if real.has_user_mods:
        return spec
    return dataclasses.replace(
        spec,
        window_left=None if spec.window_left is None else min(spec.window_left, lengths.block_n // 2 + 3),
        window_right=None if spec.window_right is None else min(spec.window_right, 7),
        origin_q=lengths.shift if real.packed is None else 0,
        origin_k=0,
        origin_head=1,
        origin_batch=2,
    )
