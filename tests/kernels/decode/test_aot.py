"""Layer: kernels, ahead of time. The kernels of decode in every shipped tile, as machine code for absent GPUs."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from fusemesh.kernels import aot
from fusemesh.kernels.attention.call.options import Call
from fusemesh.kernels.attention.call.spec import AttentionSpec
from fusemesh.kernels.attention.decode.spec import DecodeCall
from fusemesh.kernels.attention.gpu import decode as triton_decode
from fusemesh.kernels.attention.gpu import decode_tiles as decode_tiles
from fusemesh.kernels.attention.gpu.tiles import Tile
from fusemesh.kernels.runtime.launch import TARGETS, any_device

pytestmark = pytest.mark.aot

# Matrix instructions of each target. wgmma and tcgen05 multiply 64 rows or more; fewer are mma.sync's everywhere.
UNITS = {"sm_80": "HMMA", "sm_90": "HGMMA", "sm_100": "UTCHMMA", "gfx942": "v_mfma"}
# Head dim -> D, Dv and whether the values are columns of the keys.
HEAD_DIMS = {64: (64, 64, False), 128: (128, 128, False), 256: (256, 256, False), 576: (576, 512, True)}
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def call_of(
    dtype: torch.dtype, head_dim: int, rows: int, *, full: bool = False, S: int = 8192, page: int = 64
) -> DecodeCall:
    """A call of ``rows`` query rows a key head; full: pages, four queries, and every feature."""
    d, dv, latent = HEAD_DIMS[head_dim]
    B, Hkv, Sq = 2, 2, 4 if full else 1
    H = Hkv * rows // Sq

    def new(*shape: int, dtype: torch.dtype = dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype)

    indices = new(B, dtype=torch.int32)
    plain = DecodeCall(
        q=new(B, H, Sq, d),
        k_cache=new(2 * S // page, Hkv, page, d) if full else new(B, Hkv, S, d),
        v_cache=None if latent else new(2 * S // page, Hkv, page, dv) if full else new(B, Hkv, S, dv),
        cache_lens=indices,
        block_table=new(B, S // page, dtype=torch.int32) if full else None,
        cache_starts=None,
        k_new=new(B, Hkv, Sq, d),
        v_new=None if latent else new(B, Hkv, Sq, dv),
        v_dim=dv,
        call=Call(AttentionSpec(d**-0.5, window_right=0)),
    )
    if not full:
        return plain
    return replace(
        plain,
        cache_starts=indices,
        call=Call(
            AttentionSpec(d**-0.5, 100, 0, mods=("softcap", "alibi"), params=(30.0, float(H))),
            mask=new(B, 1, 1, S, dtype=torch.bool),
            bias=new(B, H, Sq, S),
            sinks=new(H, dtype=torch.float32),
            aux=(new(B, H, dtype=torch.float32),),
        ),
    )


def launches(*calls: DecodeCall) -> Callable[[], None]:
    def run() -> None:
        for call in calls:
            with any_device():
                triton_decode.decode(call)

    return run


def spills_allowed(dtype: torch.dtype, head_dim: int) -> int:
    """Bytes that a thread may spill inside the loop over keys.

    16-bit: a few addresses. fp32 is multiplied as three tf32 products (NVIDIA), whose halves of q the compiler keeps in
    registers for all of the loop: 2 * 576 of them a row are too many for any tile.
    """
    if dtype != torch.float32 or head_dim == 64:
        return 64
    return {128: 200, 256: 400, 576: 20000}[head_dim]


def check(target: str, dtype: torch.dtype, head_dim: int, rows: int) -> None:
    d, dv, latent = HEAD_DIMS[head_dim]
    calls = [call_of(dtype, head_dim, rows, full=full) for full in (False, True)]
    reports = aot.compile_launches(launches(*calls), target)
    tile = decode_tiles.choose(TARGETS[target], dtype, d, dv, latent, rows, 4, 8192).tile
    assert {report.kernel for report in reports} == {
        "decode_append_kernel",
        "decode_split_kernel",
        "decode_combine_kernel",
    }
    for report in reports:
        assert report.fits and not report.atomics, report
        if report.kernel != "decode_split_kernel":
            # For sm_100 ptxas keeps an address in memory behind Triton 3.9.
            most = 8 if target == "sm_100" else 0
            assert report.loop_spills == 0 and report.spill_stores + report.spill_loads <= most, report
            continue
        assert report.shared_memory <= decode_tiles.shared_memory(tile, TARGETS[target], dtype, d, dv, latent), report
        units = UNITS[target] if target == "gfx942" or tile.block_m >= 64 else "HMMA"
        assert report.tensor_core and all(name.startswith(units) for name in report.tensor_core), report
        assert report.loop_spills <= spills_allowed(dtype, head_dim), report


@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100", "gfx942"])
def test_decode_tiles(target: str) -> None:
    check(target, torch.bfloat16, 128, 16)


def test_latent_tiles() -> None:
    check("sm_90", torch.bfloat16, 576, 16)


@pytest.mark.slow
@pytest.mark.parametrize("rows", decode_tiles.ROWS)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100", "gfx942"])
def test_every_decode_tile(target: str, dtype: torch.dtype, head_dim: int, rows: int) -> None:
    check(target, dtype, head_dim, rows)


def test_the_keys_of_latent_attention_are_loaded_once() -> None:
    """One split's K tile serves both products: the loop copies half of what it would with values of their own."""
    latent = call_of(torch.bfloat16, 576, 16)
    separate = replace(
        latent, v_cache=torch.empty(2, 2, 8192, 512, dtype=torch.bfloat16), v_new=latent.k_new[..., :512]
    )
    with decode_tiles.force(tile=Tile(16, 32, 8, 2), splits=4):
        once, twice = (
            next(r for r in aot.compile_launches(launches(call), "sm_90") if r.kernel == "decode_split_kernel")
            for call in (latent, separate)
        )
    # [32, 512] of bf16 more
    assert twice.shared_memory - once.shared_memory == 32 * 512 * 2


def test_pages_are_copied_as_far_ahead_as_contiguous_keys() -> None:
    contiguous = call_of(torch.bfloat16, 128, 16)
    pages = torch.empty(256, 2, 64, 128, dtype=torch.bfloat16)
    table = torch.empty(2, 128, dtype=torch.int32)
    paged = replace(contiguous, k_cache=pages, v_cache=pages, block_table=table)
    with decode_tiles.force(tile=Tile(16, 64, 4, 3), splits=4):
        a, b = (
            next(r for r in aot.compile_launches(launches(call), "sm_90") if r.kernel == "decode_split_kernel")
            for call in (contiguous, paged)
        )
    assert a.shared_memory == b.shared_memory > 2 * 64 * 256 * 2


def test_nothing_is_compiled_again_for_other_lengths() -> None:
    """Queries, new keys, windows and capacities change from call to call; the machine code does not."""
    first = call_of(torch.bfloat16, 128, 16, full=True)
    reports = aot.compile_launches(launches(first), "sm_90")
    other = replace(
        call_of(torch.bfloat16, 128, 16, full=True, S=16384),
        call=replace(first.call, spec=replace(first.call.spec, window_left=333)),
        k_new=torch.empty(2, 2, 16, 128, dtype=torch.bfloat16),
        v_new=torch.empty(2, 2, 16, 128, dtype=torch.bfloat16),
    )
    with decode_tiles.force(splits=14):
        again = aot.compile_launches(launches(first, other), "sm_90")
    assert len(reports) == len(again) == 3
    assert [report.launches for report in again] == [4, 2, 2]


@pytest.mark.parametrize("target", ["sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120", "gfx942"])
def test_every_choice_is_valid(target: str) -> None:
    """On every target and at every head dim some tile is meant to work; fp32 keys of 576 need more than 99 KiB."""
    head_dims = [(16, 16, False), (80, 48, False), (320, 300, False), (576, 512, False), *HEAD_DIMS.values()]
    for dtype, (d, dv, latent), rows in itertools.product(DTYPES, head_dims, (1, 16, 17, 64, 1000)):
        plan = decode_tiles.choose(TARGETS[target], dtype, d, dv, latent, rows, 8, 4096)
        valid = decode_tiles.is_valid(plan.tile, TARGETS[target], dtype, d, dv, latent)
        fits = d < 576 or dtype != torch.float32 or target in ("sm_80", "sm_90", "sm_100", "gfx942")
        assert valid == fits, (target, dtype, d, dv, latent, rows, plan)


def test_what_no_tile_fits_is_refused() -> None:
    with pytest.raises(ValueError, match=r"q: expected head dims whose tiles fit .* sm_86 .*, received D 576, Dv 512"):
        aot.compile_launches(launches(call_of(torch.float32, 576, 16)), "sm_86")


def test_split_counts() -> None:
    """Enough programs for the GPU, none where the grid is large already or the cache is short."""
    tile, target = Tile(16, 64, 4, 3), TARGETS["sm_90"]
    assert decode_tiles.splits_of(target, tile, 8, 8, 131072) == 2 * 132 // 8
    assert decode_tiles.splits_of(target, tile, 8, 8, 1024) == 4
    assert decode_tiles.splits_of(target, tile, 8, 512, 131072) == 1
    assert decode_tiles.splits_of(target, tile, 8, 8, 10) == 1
    assert decode_tiles.splits_of(target, tile, 40, 8, 131072) == 2 * 132 // 24
