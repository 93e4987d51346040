"""Layer: one process, no GPU, nothing launched. The linear layer's tile table, its predicate and its choices."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch

from fusemesh.kernels.matmul.gpu import linear as triton_matmul
from fusemesh.kernels.matmul.gpu import tiles
from fusemesh.kernels.matmul.gpu.tiles import Tile
from fusemesh.kernels.runtime import launch
from fusemesh.kernels.runtime.launch import INTERPRETER, TARGETS, dot_precision

SHAPES = [(0, 64, 64), (1, 4096, 4096), (33, 1, 1), (512, 512, 512), (8192, 4096, 4096), (8192, 4097, 1), (64, 0, 9)]


def test_every_shipped_tile_is_valid_on_every_target() -> None:
    shipped = list(tiles.shipped(tuple(TARGETS)))
    # 3 ops in 5 sizes, wgrad in 3: 13; times forms, dtypes, targets.
    assert len(shipped) == 13 * 3 * 3 * len(TARGETS)
    for op, target, dtype, form, size, tile in shipped:
        assert tiles.is_valid(tile, op, target, dtype, form), (op, target.name, dtype, form, size, tile)


def test_every_choice_is_shipped() -> None:
    shipped = {(op, target, dtype, form, tile) for op, target, dtype, form, _, tile in tiles.shipped(tuple(TARGETS))}
    chosen = set()
    for op, target, dtype, form, shape, is_aligned in itertools.product(
        tiles.OPS, TARGETS.values(), tiles.DTYPES, tiles.FORMS, SHAPES, (True, False)
    ):
        chosen.add((op, target, dtype, form, tiles.choose(op, target, dtype, shape, form, is_aligned)))
    assert chosen == shipped, "the shapes reach every size, and nothing else"


@pytest.mark.parametrize(
    "change",
    [
        {"rows": 8},
        {"cols": 96},
        {"depth": 0},
        {"num_warps": 3},
        {"num_stages": 0},
        {"group": 0},
        {"num_warps": 2},  # 256 accumulators a thread
        {"depth": 512},  # 288 KiB
        {"num_stages": 8},
    ],
    ids=str,
)
def test_predicate_refuses(change: dict[str, int]) -> None:
    tile = Tile(128, 128, 64, 8)
    arguments = ("forward", TARGETS["sm_90"], torch.bfloat16, "plain")
    assert tiles.is_valid(tile, *arguments)
    assert not tiles.is_valid(replace(tile, **change), *arguments)


def test_predicate_knows_target_dtype_and_form() -> None:
    tile = Tile(128, 128, 64, 8)
    assert not tiles.is_valid(tile, "forward", TARGETS["sm_86"], torch.float32, "plain")
    assert not tiles.is_valid(tile, "forward", TARGETS["sm_90"], torch.bfloat16, "gated")
    assert tiles.is_valid(tile, "dgrad", TARGETS["sm_90"], torch.bfloat16, "gated")
    assert not tiles.is_valid(tile, "dgrad", TARGETS["gfx942"], torch.bfloat16, "gated")


def test_dot_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda, hip = TARGETS["sm_80"], TARGETS["gfx942"]
    assert dot_precision(cuda, torch.float32) == "tf32x3"
    assert dot_precision(hip, torch.float32) == dot_precision(INTERPRETER, torch.float32) == "ieee"
    before = torch.backends.cuda.matmul.fp32_precision
    try:
        torch.backends.cuda.matmul.fp32_precision = "tf32"
        assert dot_precision(cuda, torch.float32) == "tf32"
        assert dot_precision(hip, torch.float32) == dot_precision(INTERPRETER, torch.float32) == "ieee"
    finally:
        torch.backends.cuda.matmul.fp32_precision = before


def record(function: Any) -> list[tuple[Any, tuple[int, ...], dict[str, Any]]]:
    launches = []

    def hook(kernel: Any, grid: tuple[int, ...], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        launches.append((kernel, grid, {**dict(zip(kernel.arg_names, args, strict=False)), **kwargs}))

    with launch.assume_target(TARGETS["sm_90"]), launch.intercept(hook):
        function()
    return launches


def test_launches_take_the_tile_of_their_target_and_form() -> None:
    # 4096 x 4096 without memory: nothing runs.
    x, w, dy, slope = (torch.empty(4096, 4096, dtype=torch.bfloat16, device="meta") for _ in range(4))

    def everything() -> None:
        triton_matmul.forward(x, w, None, w, activation="silu", save_slope=True, save_slope_up=True)
        triton_matmul.backward(dy, x, w, w, slope, slope, x_grad=True, w_grad=True, bias_grad=True, w_up_grad=True)

    launches = record(everything)
    assert len(launches) == 3
    for (_, grid, arguments), op in zip(launches, tiles.OPS, strict=True):
        tile = tiles.get(op, TARGETS["sm_90"], torch.bfloat16, "gated", "large")
        assert grid == (4096 // tile.rows * (4096 // tile.cols),)
        assert arguments.items() >= tile.launch_arguments(op).items()
        assert arguments["PRECISION"] == "ieee"


def test_number_of_tokens_is_never_specialised() -> None:
    kernels = [getattr(triton_matmul, f"linear_{op}_kernel") for op in tiles.OPS]
    for kernel in kernels:
        assert [p.name for p in kernel.params if p.do_not_specialize] == ["M"]
        assert not next(p for p in kernel.params if p.name == "M").is_constexpr


# What is odd, of (M, N, K) and of how x and w lie in memory; the ops that it costs wide reads or writes.
LAYOUTS: dict[str, tuple[dict[str, Any], set[str]]] = {
    "nothing": ({}, set()),
    "tokens": ({"M": 4095}, set()),
    "a vocabulary": ({"N": 50257}, {"forward", "dgrad", "wgrad"}),
    "a multiple of 8": ({"N": 4104}, {"forward", "dgrad", "wgrad"}),
    "in features": ({"K": 4095}, {"forward", "dgrad", "wgrad"}),
    "strides of x": ({"x": lambda x: x.new_empty(8192, 4099)[:, :4096]}, {"forward", "wgrad"}),
    "padded strides of x": ({"x": lambda x: x.new_empty(8192, 4112)[:, :4096]}, set()),
    "where x begins": ({"x": lambda x: x.new_empty(8192, 4112)[:, 1:4097]}, {"forward", "wgrad"}),
    "columns of w": ({"w": lambda w: w.new_empty(w.shape[1], w.shape[0]).t()}, set()),
    "strides of w": ({"w": lambda w: w.new_empty(w.shape[0], 4097)[:, :4096]}, {"forward", "dgrad"}),
}


@pytest.mark.parametrize("odd", LAYOUTS)
def test_rows_that_are_moved_element_by_element_have_tiles_of_their_own(odd: str) -> None:
    changes, unaligned = LAYOUTS[odd]
    M, N, K = (changes.get(name, size) for name, size in {"M": 8192, "N": 4096, "K": 4096}.items())
    x, w, dy = (torch.empty(shape, dtype=torch.bfloat16, device="meta") for shape in ((M, K), (N, K), (M, N)))
    x, w = changes.get("x", lambda x: x)(x), changes.get("w", lambda w: w)(w)

    def everything() -> None:
        triton_matmul.forward(x, w)
        triton_matmul.backward(dy, x, w, None, None, None, x_grad=True, w_grad=True, bias_grad=True, w_up_grad=False)

    for (_, _, arguments), op in zip(record(everything), tiles.OPS, strict=True):
        size = "unaligned" if op in unaligned else "large"
        tile = tiles.get(op, TARGETS["sm_90"], torch.bfloat16, "plain", size)
        assert arguments.items() >= tile.launch_arguments(op).items(), (op, size)
