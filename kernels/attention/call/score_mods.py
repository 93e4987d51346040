"""Score mods: functions of a score and its position, which run inside every backend. Torch only.

    s = scale * q k^T;   s = mod(s, b, h, i_q, i_k);   + bias; mask; softmax

A mod is registered once under a name, because a torch custom op takes no callables; a call then passes
``score_mod=mod(*aux, **params)``. Softcap and ALiBi are mods like any other, and are registered here.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from .errors import or_transpose, short, wrong
from .scalars import as_number

_MODS: dict[str, ScoreMod] = {}


@dataclass(frozen=True)
class ScoreMod:
    """One function of a score, for every backend.

    Args:
        name: under which the ops know it.
        forward: ``triton.jit`` function ``(b_s, i_b, i_h, i_q, i_k, aux, numbers) -> b_s``: a block of scores [.., ..],
            positions in the whole (int32; i_b and i_h scalars, i_q and i_k blocks that broadcast against b_s), a tuple
            of pointers and a tuple of fp32 numbers. None: the mod runs on the reference backend alone.
        backward: ``triton.jit`` function ``(b_ds, b_s, i_b, i_h, i_q, i_k, aux, numbers) -> b_ds``: the gradient of
            what forward took (``b_s``), from the gradient of what it returned. None: no gradient on fused backends.
        torch_forward: the same in plain PyTorch, ``(s, i_b, i_h, i_q, i_k, *aux, **params) -> s`` with s
            [B, H, Sq, Sk] and int64 positions [B,1,1,1], [1,H,1,1], [1,1,Sq,1], [1,1,1,Sk]; differentiable. Its
            keyword-only arguments name the params and give ``numbers`` their order.
        num_aux: how many tensors a call passes. Contiguous; a position reaches its element by the mod's own arithmetic.
        num_params: how many float params.
        aux_grad: whether aux tensors have gradients. Only the reference backend computes them; where False, an aux
            tensor that requires a gradient is refused.

    Positions are those in the whole (``origin``), so that a shard computes what the whole would, and aux tensors are
    the whole's.
    """

    name: str
    forward: Any
    backward: Any
    torch_forward: Callable[..., torch.Tensor]
    num_aux: int = 0
    num_params: int = 0
    aux_grad: bool = False
    # ALiBi's slopes are those of the heads that were passed, not of the whole.
    local_heads: bool = field(default=False, kw_only=True)

    @property
    def param_names(self) -> tuple[str, ...]:
        """The keyword-only arguments of ``torch_forward``, in their order."""
        parameters = inspect.signature(self.torch_forward).parameters.values()
        return tuple(p.name for p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY)

    def __call__(self, *aux: torch.Tensor, **params: float) -> BoundScoreMod:
        """The mod with its tensors and numbers, for one call of attention.

        Raises:
            ValueError: another number of tensors or other params than the mod declares.
        """
        if len(aux) != self.num_aux or any(not isinstance(x, torch.Tensor) for x in aux):
            received = tuple(type(x).__name__ for x in aux)
            raise ValueError(
                f"score_mod {self.name!r}: expected {self.num_aux} tensors, received {received}; pass them in order"
            )
        names = self.param_names
        if set(params) != set(names):
            raise ValueError(
                f"score_mod {self.name!r}: expected the params {names}, received {tuple(params)}; pass each by name"
            )
        return BoundScoreMod(self, aux, tuple(self._number(name, params[name]) for name in names))

    def _number(self, name: str, value: Any) -> float:
        number = as_number(value)
        if number is None:
            raise wrong(f"score_mod {self.name!r}, {name}", "a number", short(value), "params are numbers")
        return number


@dataclass(frozen=True)
class BoundScoreMod:
    """A mod with what one call passes to it."""

    mod: ScoreMod
    aux: tuple[torch.Tensor, ...]
    params: tuple[float, ...]


def register_score_mod(mod: ScoreMod) -> ScoreMod:
    """Make ``mod`` known under its name; returns it.

    Raises:
        ValueError: the name is taken by another mod, or the numbers of tensors and params do not fit torch_forward.
    """
    if not isinstance(mod, ScoreMod):
        raise ValueError(f"mod: expected a fusemesh.ScoreMod, received {type(mod).__name__}; construct one")
    known = _MODS.get(mod.name)
    if known is not None and known != mod:
        raise ValueError(f"name: expected a name that is free, received {mod.name!r}, which another mod has; rename it")
    if len(mod.param_names) != mod.num_params:
        raise ValueError(
            f"num_params: expected {len(mod.param_names)}, the number of keyword-only arguments of torch_forward "
            f"{mod.param_names}, received {mod.num_params}; let the two agree"
        )
    _MODS[mod.name] = mod
    return mod


def get(name: str) -> ScoreMod:
    """The mod registered under ``name``."""
    if name not in _MODS:
        raise ValueError(f"score_mod: expected one of {tuple(_MODS)}, received {name!r}; register it in this process")
    return _MODS[name]


def split(
    names: tuple[str, ...], aux: tuple[Any, ...], params: tuple[float, ...]
) -> list[tuple[ScoreMod, tuple[Any, ...], tuple[float, ...]]]:
    """The flat tensors and numbers of a call by mod, in order."""
    parts = []
    for name in names:
        mod = get(name)
        parts.append((mod, aux[: mod.num_aux], params[: mod.num_params]))
        aux, params = aux[mod.num_aux :], params[mod.num_params :]
    assert not aux and not params
    return parts


def _softcap(s: torch.Tensor, i_b: Any, i_h: Any, i_q: Any, i_k: Any, *, cap: float) -> torch.Tensor:
    return cap * torch.tanh(s / cap)


def _alibi(
    s: torch.Tensor, i_b: Any, i_h: Any, i_q: Any, i_k: Any, slopes: torch.Tensor, *, heads: float
) -> torch.Tensor:
    distance = (i_q - i_k).abs().to(s.dtype)
    return s - slopes.to(s.dtype)[:, :, None, None] * distance


# The jit functions of built-in mods are in a file that needs Triton; their names stand for them until they are needed.
SOFTCAP = register_score_mod(ScoreMod("softcap", "softcap", "softcap_backward", _softcap, num_params=1))
ALIBI = register_score_mod(ScoreMod("alibi", "alibi", "alibi_backward", _alibi, 1, 1, local_heads=True))


def softcap(cap: float) -> BoundScoreMod:
    """s = cap * tanh(s / cap) (Gemma 2, arXiv:2408.00118)."""
    return SOFTCAP(cap=checked_softcap(cap))


def checked_softcap(cap: Any) -> float:
    """Return the bound of the scores."""
    number = as_number(cap)
    if number is None or not 0 < number < math.inf:
        raise wrong("softcap", "a finite number above 0 or None", short(cap), "None switches it off")
    return number


def alibi(slopes: Any, q: torch.Tensor) -> BoundScoreMod:
    """s = s - slope * |position of the query - position of the key| (Press et al., arXiv:2108.12409).

    Args:
        slopes: [H] or [B, H], any float dtype, no gradient.
        q: [B, H, Sq, D], the queries of the call.
    """
    batch, heads = q.shape[:2]

    def wrong_slopes(received: str) -> ValueError:
        # Written out only for the error: where sizes are symbols, torch.compile makes constants of those in a string.
        expected = f"a float tensor [H] = [{heads}] or [B, H] = [{batch}, {heads}] on {q.device}"
        fits = isinstance(slopes, torch.Tensor) and slopes.shape[-1:] == q.shape[2:3] != q.shape[1:2]
        return wrong("alibi_slopes", expected, received, or_transpose("one slope for each query head", fits))

    if not isinstance(slopes, torch.Tensor):
        raise wrong_slopes(type(slopes).__name__)
    if not slopes.dtype.is_floating_point or slopes.device != q.device:
        raise wrong_slopes(f"{slopes.dtype} on {slopes.device}")
    # Not ``in``, which compares symbols as objects.
    if tuple(slopes.shape) != (heads,) and tuple(slopes.shape) != (batch, heads):
        raise wrong_slopes(f"shape {tuple(slopes.shape)}")
    if slopes.requires_grad:
        raise ValueError(
            "alibi_slopes: expected a tensor without gradient, received requires_grad=True; detach it, or pass the "
            "whole term as bias, which has a gradient"
        )
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    # The number of heads is where one batch's slopes end; the plain formula does not need it.
    return ALIBI(slopes.to(dtype).expand(batch, heads).contiguous(), heads=float(heads))
