"""The head's product with the cross entropy on Triton: launchers of loss_kernels.py.

Predicted, not measured: bytes of memory moved for each logit in 16 bits. Forward: none; h and the weight are read about
once for each group of tiles that share the L2 cache, and 8 bytes are written for each row and part of the columns.
Backward: 6, dz being written once and read by two products. Chunks by PyTorch's operations (chunked.py) move about 52
in the backward: 4 for logits in fp32, 8 for each of four operations in place, 12 for rounding dz to 16 bits twice, 4
for the products.
"""

from __future__ import annotations

import torch
import triton

from ...matmul.gpu import linear
from ...matmul.gpu.tiles import Tile
from ...runtime.launch import dot_precision, launch, target_of
from ..chunked import Gradients, Head, Sums, columns_of_a_chunk, finite_shift
from . import tiles
from .loss_kernels import vocab_loss_dz_kernel, vocab_loss_forward_kernel


def tile_of(op: str, h: torch.Tensor, head: Head) -> Tile:
    """Return the tile that the kernel of ``op`` takes: ``forward`` or ``dz``."""
    is_aligned = linear._is_aligned((h.shape[1],), h.contiguous(), head.weight)
    return tiles.choose(op, target_of(h.device), h.dtype, tiles.form(head.softcap is not None, is_aligned))


def forward(
    h: torch.Tensor, head: Head, local: torch.Tensor, *, tile: Tile | None = None, num_tiles: int | None = None
) -> Sums:
    """Return what :func:`chunked.forward` returns.

    Args:
        tile: replaces the one that :func:`tile_of` would take.
        num_tiles: of columns, that a program goes through, in place of :func:`tiles.tiles_of_a_program`.
    """
    h, weight = h.contiguous(), head.weight
    (N, E), V = h.shape, len(weight)
    own = h.new_zeros(N, dtype=torch.float32)
    if N == 0 or V == 0:
        return Sums(torch.full_like(own, float("-inf")), torch.zeros_like(own), own)
    tile = tile or tile_of("forward", h, head)
    num_tiles = num_tiles or tiles.tiles_of_a_program(tile, N, V)
    parts = triton.cdiv(triton.cdiv(V, tile.cols), num_tiles)
    # [parts, N]
    largest = h.new_empty((parts, N), dtype=torch.float32)
    total = torch.empty_like(largest)
    launch(
        vocab_loss_forward_kernel,
        (triton.cdiv(N, tile.rows) * parts,),
        h,
        weight,
        None if head.bias is None else head.bias.contiguous(),
        local.contiguous(),
        largest,
        total,
        own,
        weight.stride(),
        N,
        V,
        E,
        num_tiles,
        head.scale,
        head.softcap,
        PRECISION=dot_precision(target_of(h.device), h.dtype),
        **tiles.launch_arguments(tile),
    )
    of_all = largest.amax(0)
    return Sums(of_all, (total * torch.exp(largest - finite_shift(of_all))).sum(0), own)


def backward(
    rows: torch.Tensor,
    h: torch.Tensor,
    head: Head,
    local: torch.Tensor,
    wanted: tuple[bool, bool, bool],
    *,
    tile: Tile | None = None,
    width: int | None = None,
) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
    """Return what :func:`chunked.backward` returns.

    Args:
        tile: replaces the one that :func:`tile_of` would take.
        width: of a chunk in columns, a multiple of 64.
    """
    h, weight = h.contiguous(), head.weight
    gradients = Gradients(h, head, wanted)
    (N, E), V = h.shape, len(weight)
    tile = tile or tile_of("dz", h, head)
    # Rows of dz start on multiples of 128 bytes, whatever V is.
    width = width or min(columns_of_a_chunk(N, h.dtype.itemsize), -(-max(V, 1) // 64) * 64)
    dz = h.new_empty((N, width))
    sums = None
    if gradients.dbias is not None:
        sums = h.new_empty((triton.cdiv(N, tile.rows), width), dtype=torch.float32)
    for start in range(0, V, width):
        columns = slice(start, min(start + width, V))
        size = columns.stop - start
        launch(
            vocab_loss_dz_kernel,
            (triton.cdiv(N, tile.rows) * triton.cdiv(size, tile.cols),),
            h,
            weight,
            None if head.bias is None else head.bias.contiguous(),
            local.contiguous(),
            rows.contiguous(),
            dz,
            sums,
            weight.stride(),
            width,
            N,
            V,
            E,
            start,
            head.scale,
            head.softcap,
            PRECISION=dot_precision(target_of(h.device), h.dtype),
            **tiles.launch_arguments(tile),
        )
        gradients.add(columns, dz[:, :size], None if sums is None else sums[:, :size].sum(0))
    return gradients.found()
