"""Layer: one process, no GPU, nothing launched. The attention kernels' tile table, its predicate and its choices."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from fusemesh.kernels import aot
from fusemesh.kernels.attention.gpu import tiles
from fusemesh.kernels.attention.gpu.device.loads import ROW_PADDING
from fusemesh.kernels.attention.gpu.tiles import RowTile, Tile
from fusemesh.kernels.runtime.launch import INTERPRETER, TARGETS, Target
from fusemesh.kernels.runtime.launches import attention_launches

BLOCKS = (16, 32, 64, 128, 256)
# GPUs that are no entry's own: other members of the families, and one with Turing's 64 KiB.
OTHERS = {
    **{name: TARGETS[name] for name in ("sm_86", "sm_89", "sm_120")},
    "sm_75": Target("cuda", 75, 65536),
    "sm_103": Target("cuda", 103, 232448),
    "gfx90a": Target("hip", "gfx90a", 65536),
}
CHOICES: dict[str, Callable[..., Tile]] = {
    "forward": tiles.choose_forward,
    "dkdv": tiles.choose_dkdv,
    "dq": tiles.choose_dq,
    "dbias": lambda *args: tiles.choose_dbias(*args[:4]),
}


def test_every_entry_is_valid_on_the_gpu_it_is_for() -> None:
    shipped = list(tiles.shipped())
    # Three ops with and without tiles of a mask or bias, and dbias; times targets, dtypes, classes of head dimension.
    assert len(shipped) == 7 * 4 * 3 * 3
    for op, target, dtype, d, has_tiles, tile in shipped:
        case = (op, target.name, dtype, d, has_tiles, tile)
        assert tiles.is_valid(tile, op, target, dtype, d, d, has_tiles), case
        assert tile == CHOICES[op](target, dtype, d, d, None, "mn" if has_tiles else None), case


@pytest.mark.parametrize("name", [*TARGETS, *OTHERS])
def test_every_choice_is_valid(name: str) -> None:
    target = {**TARGETS, **OTHERS}[name]
    for op, dtype, d, dv, dims in itertools.product(tiles.OPS, tiles.DTYPES, BLOCKS, BLOCKS, ("mn", None)):
        if name == "sm_75" and dtype == torch.float32 and max(d, dv) > 128:
            continue  # 64 KiB do not hold the smallest tile's operands
        tile = CHOICES[op](target, dtype, d, dv, dims, None)
        assert tile == CHOICES[op](target, dtype, d, dv, None, dims)
        assert tiles.is_valid(tile, op, target, dtype, d, dv, dims == "mn"), (op, dtype, d, dv, dims, tile)


def test_a_small_gpu_gets_the_largest_tile_that_fits() -> None:
    large, small, tiny = TARGETS["sm_80"], TARGETS["sm_86"], OTHERS["sm_75"]
    assert tiles.choose_forward(large, torch.bfloat16, 64, 64) == Tile(128, 128, 8, 3)
    assert tiles.choose_forward(small, torch.bfloat16, 64, 64) == Tile(128, 64, 8, 3)
    # What fits is left alone.
    assert tiles.choose_dkdv(small, torch.bfloat16, 64, 64) == tiles.choose_dkdv(large, torch.bfloat16, 64, 64)
    for choose, dtype, d in itertools.product(CHOICES.values(), tiles.DTYPES, BLOCKS):
        entry = choose(large, dtype, d, d)
        for target in (small, tiny):
            tile = choose(target, dtype, d, d)
            assert tile.block_m <= entry.block_m and tile.block_n <= entry.block_n
            assert tile.num_stages <= entry.num_stages and tile.num_warps <= entry.num_warps


def test_nothing_fits() -> None:
    """The smallest tile is the answer where none is valid, so that the error is the launch's, and says how much."""
    target = Target("cuda", 80, 1024)
    assert tiles.choose_forward(target, torch.float32, 256, 256) == Tile(16, 16, 4, 1)


@pytest.mark.parametrize(
    "change",
    [
        {"block_m": 8},
        {"block_n": 96},
        {"num_warps": 3},
        {"num_stages": 0},
        {"num_warps": 2},  # 256 accumulators a thread
        {"block_n": 256},
        {"num_stages": 6},  # 257 KiB
    ],
    ids=str,
)
def test_predicate_refuses(change: dict[str, int]) -> None:
    tile = Tile(128, 64, 8, 3)
    arguments = ("forward", TARGETS["sm_90"], torch.bfloat16, 128, 128, False)
    assert tiles.is_valid(tile, *arguments)
    assert not tiles.is_valid(replace(tile, **change), *arguments)


def test_predicate_knows_op_target_and_what_is_read() -> None:
    tile, dtype = Tile(128, 128, 8, 2), torch.bfloat16
    assert tiles.is_valid(tile, "forward", TARGETS["sm_90"], dtype, 128, 128, has_tiles=False)
    assert not tiles.is_valid(tile, "forward", TARGETS["sm_90"], dtype, 128, 128, has_tiles=True)
    assert not tiles.is_valid(tile, "forward", TARGETS["sm_86"], dtype, 128, 128, has_tiles=False)
    assert not tiles.is_valid(tile, "forward", TARGETS["sm_90"], torch.float32, 128, 128, has_tiles=False)
    assert not tiles.is_valid(tile, "dkdv", TARGETS["sm_90"], dtype, 128, 128, has_tiles=False)
    # Rows of the values per query are padded to this.
    longest = Tile(2 * ROW_PADDING.value, 16, 8, 1)
    assert tiles.is_valid(longest, "forward", TARGETS["sm_90"], dtype, 64, 64, has_tiles=False)
    assert not tiles.is_valid(longest, "dq", TARGETS["sm_90"], dtype, 64, 64, has_tiles=False)
    # dk and dv take 512 columns of tensor memory on their own.
    keys = Tile(32, 64, 8, 2)
    assert tiles.is_valid(keys, "dkdv", TARGETS["sm_90"], dtype, 256, 256, has_tiles=False)
    assert not tiles.is_valid(keys, "dkdv", TARGETS["sm_100"], dtype, 256, 256, has_tiles=False)
    assert tiles.is_valid(keys, "dkdv", TARGETS["sm_100"], dtype, 256, 128, has_tiles=False)


@pytest.mark.parametrize("target", [*TARGETS.values(), *OTHERS.values(), INTERPRETER], ids=lambda target: target.name)
def test_delta(target: Target) -> None:
    for block_dv in BLOCKS:
        tile = tiles.choose_delta(target, block_dv)
        assert tile.block_m >= 16 and ROW_PADDING.value % tile.block_m == 0
        assert target == INTERPRETER or tile.block_m * block_dv <= 32 * 32 * tile.num_warps
    assert RowTile(32, 4).launch_arguments() == {"BLOCK_M": 32, "num_warps": 4, "enable_fp_fusion": False}


def test_force() -> None:
    tile = Tile(16, 64, num_warps=4, num_stages=1)
    arguments = (TARGETS["sm_90"], torch.bfloat16, 64, 64)
    before = [choose(*arguments) for choose in CHOICES.values()]
    with pytest.raises(ZeroDivisionError), tiles.force(tile):
        inner = Tile(32, 32, num_warps=4, num_stages=1)
        with tiles.force(inner):
            assert all(choose(*arguments) == inner for choose in CHOICES.values())
        found = []
        thread = threading.Thread(target=lambda: found.extend(choose(*arguments) for choose in CHOICES.values()))
        thread.start()
        thread.join()
        assert found == [tile] * 4
        raise ZeroDivisionError
    assert [choose(*arguments) for choose in CHOICES.values()] == before


@pytest.mark.parametrize(
    ("mask", "bias", "has_tiles"), [(False, None, False), (False, "K", False), (True, None, True), (False, "HQK", True)]
)
def test_launches_take_the_tile_of_their_call(mask: bool, bias: str | None, has_tiles: bool) -> None:
    target, dtype = TARGETS["sm_90"], torch.bfloat16
    launches = aot.record_launches(attention_launches(dtype, 128, 64, mask=mask, bias=bias), target)
    found = {launch.kernel.__name__: launch for launch in launches}
    ops = tiles.OPS if bias == "HQK" else tiles.OPS[:3]
    names = ("delta", *ops, *(("mask_tiles",) if mask else ()))
    assert set(found) == {f"attention_{name}_kernel" for name in names}
    for op in ops:
        want = tiles.get(op, target, dtype, 128, 64, has_tiles).launch_arguments()
        assert found[f"attention_{op}_kernel"].kwargs.items() >= want.items(), op


def test_a_mask_over_keys_alone_keeps_the_large_tile() -> None:
    arguments = (TARGETS["sm_90"], torch.bfloat16, 128, 128)
    assert tiles.choose_forward(*arguments, "n", "m") == tiles.choose_forward(*arguments)
    assert tiles.choose_forward(*arguments, "n", "mn") != tiles.choose_forward(*arguments)
