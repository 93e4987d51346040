"""The linear layer on Triton: launchers of linear_kernels.py, on tensors of any leading dimensions and strides."""

from __future__ import annotations

import math

import torch
import triton

from ...runtime.launch import Target, dot_precision, launch, target_of
from . import tiles
from .linear_kernels import linear_dgrad_kernel, linear_forward_kernel, linear_wgrad_kernel


def _rows(tensor: torch.Tensor) -> torch.Tensor:
    """[..., C] as [M, C]: a view where the strides of the leading dimensions allow it, else a copy."""
    return tensor.reshape(math.prod(tensor.shape[:-1]), tensor.shape[-1])


def _strides(tensor: torch.Tensor | None) -> tuple[int, int]:
    return (0, 0) if tensor is None else (tensor.stride(0), tensor.stride(1))


def _is_aligned(row_lengths: tuple[int, ...], *tensors: torch.Tensor | None) -> bool:
    """Return whether rows of tensors, and of contiguous results of these lengths, can be moved 16 bytes at a time."""
    known = all(length % tiles.ALIGNMENT == 0 for length in row_lengths)
    for x in tensors:
        if x is not None and known:
            known = all(stride == 1 or stride % tiles.ALIGNMENT == 0 for stride in x.stride())
            known = known and x.storage_offset() * x.itemsize % 16 == 0
    return known


def forward(
    x: torch.Tensor,
    w: torch.Tensor,
    bias: torch.Tensor | None = None,
    w_up: torch.Tensor | None = None,
    *,
    activation: str | None = None,
    save_slope: bool = False,
    save_slope_up: bool = False,
    slope_dtype: torch.dtype | None = None,
    tile: tiles.Tile | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(y, slope, slope_up): y [..., N], and of the same shape the slopes asked for; the others of shape [0].

    ``slope_dtype`` is slope's, by default that of x; ``tile`` replaces the one that :func:`tiles.choose` would take.
    Shapes and dtypes have been checked by the caller.
    """
    N, K = w.shape
    x_rows = _rows(x)
    M = x_rows.shape[0]
    shape = (*x.shape[:-1], N)
    y = x.new_empty(shape)
    slope = x.new_empty(shape if save_slope else (0,), dtype=slope_dtype)
    slope_up = x.new_empty(shape if save_slope_up else (0,))
    target = target_of(x.device)
    form = tiles.form(activation is not None, w_up is not None)
    aligned = _is_aligned((N,), x_rows, w, w_up)
    tile = tile or tiles.choose("forward", target, x.dtype, (M, N, K), form, aligned)
    launch(
        linear_forward_kernel,
        (triton.cdiv(M, tile.rows) * triton.cdiv(N, tile.cols),),
        x_rows,
        w,
        None if bias is None else bias.contiguous(),
        w_up,
        y,
        slope if save_slope else None,
        slope_up if save_slope_up else None,
        _strides(x_rows),
        _strides(w),
        _strides(w_up),
        M,
        N,
        K,
        ACTIVATION=activation,
        PRECISION=dot_precision(target, x.dtype),
        **tile.launch_arguments("forward"),
    )
    return y, slope, slope_up


def backward(
    dy: torch.Tensor,
    x: torch.Tensor | None,
    w: torch.Tensor | None,
    w_up: torch.Tensor | None,
    slope: torch.Tensor | None,
    slope_up: torch.Tensor | None,
    *,
    x_grad: bool,
    w_grad: bool,
    bias_grad: bool,
    w_up_grad: bool,
    dgrad_tile: tiles.Tile | None = None,
    wgrad_tile: tiles.Tile | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """(dx, dw, dbias, dw_up), those not asked for of shape [0], by at most two launches.

    Needs dy [..., N]; with an activation slope (except for dw_up alone); for dx the weights, gated also slope_up; for
    dw and dw_up x [..., K], for dw_up slope_up.
    """
    dx = dw = dbias = dw_up = None
    if x_grad:
        assert w is not None
        dx = _dgrad(dy, w, w_up, slope, slope_up, dgrad_tile)
    if w_grad or bias_grad or w_up_grad:
        x = x if w_grad or w_up_grad else None
        dw, dbias, dw_up = _wgrad(dy, x, slope, slope_up, w_grad, bias_grad, w_up_grad, wgrad_tile)
    # An op's outputs must not share memory, so that each absent one is an empty tensor of its own.
    dx, dw, dbias, dw_up = (dy.new_empty(0) if g is None else g for g in (dx, dw, dbias, dw_up))
    return dx, dw, dbias, dw_up


def _dgrad(
    dy: torch.Tensor,
    w: torch.Tensor,
    w_up: torch.Tensor | None,
    slope: torch.Tensor | None,
    slope_up: torch.Tensor | None,
    tile: tiles.Tile | None,
) -> torch.Tensor:
    N, K = w.shape
    dy_rows = _rows(dy)
    slope = None if slope is None else _rows(slope)
    slope_up = None if slope_up is None or w_up is None else _rows(slope_up)
    M = dy_rows.shape[0]
    dx = dy.new_empty((*dy.shape[:-1], K))
    target = target_of(dy.device)
    form = tiles.form(slope is not None, w_up is not None)
    aligned = _is_aligned((K,), dy_rows, slope, slope_up, w, w_up)
    tile = tile or tiles.choose("dgrad", target, dy.dtype, (M, N, K), form, aligned)
    launch(
        linear_dgrad_kernel,
        (triton.cdiv(M, tile.rows) * triton.cdiv(K, tile.cols),),
        dy_rows,
        slope,
        slope_up,
        w,
        w_up,
        dx,
        _strides(dy_rows),
        _strides(slope),
        _strides(slope_up),
        _strides(w),
        _strides(w_up),
        M,
        N,
        K,
        PRECISION=dot_precision(target, dy.dtype),
        WAITS=_waits(target, slope is not None or slope_up is not None),
        **tile.launch_arguments("dgrad"),
    )
    return dx


def _wgrad(
    dy: torch.Tensor,
    x: torch.Tensor | None,
    slope: torch.Tensor | None,
    slope_up: torch.Tensor | None,
    w_grad: bool,
    bias_grad: bool,
    w_up_grad: bool,
    tile: tiles.Tile | None,
) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
    dy_rows = _rows(dy)
    x_rows = None if x is None else _rows(x)
    slope = None if slope is None or not (w_grad or bias_grad) else _rows(slope)
    slope_up = None if slope_up is None or not w_up_grad else _rows(slope_up)
    M, N = dy_rows.shape
    K = 0 if x is None else x.shape[-1]
    dw = dy.new_empty((N, K)) if w_grad else None
    dw_up = dy.new_empty((N, K)) if w_up_grad else None
    dbias = dy.new_empty(N) if bias_grad else None
    target = target_of(dy.device)
    form = tiles.form(slope is not None or slope_up is not None, w_grad and w_up_grad)
    aligned = _is_aligned((K,), dy_rows, slope, slope_up, x_rows)
    tile = tile or tiles.choose("wgrad", target, dy.dtype, (M, N, K), form, aligned)
    # With K = 0, or for the bias alone, one column of programs remains: it sums the bias gradient.
    launch(
        linear_wgrad_kernel,
        (triton.cdiv(N, tile.rows) * max(triton.cdiv(K, tile.cols), 1),),
        dy_rows,
        slope,
        slope_up,
        x_rows,
        dw,
        dw_up,
        dbias,
        _strides(dy_rows),
        _strides(slope),
        _strides(slope_up),
        _strides(x_rows),
        M,
        N,
        K,
        PRECISION=dot_precision(target, dy.dtype),
        # dy that is summed for the bias, too, has no buffer to spare for a product that still reads it.
        WAITS=_waits(target, slope is not None or slope_up is not None or bias_grad),
        **tile.launch_arguments("wgrad"),
    )
    return dw, dbias, dw_up


def _waits(target: Target, needed: bool) -> bool:
    """Return whether a kernel must wait for its product in every round: only Hopper's products run on beside it."""
    return needed and target.vendor == "cuda" and int(target.arch) // 10 == 9
