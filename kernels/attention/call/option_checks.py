"""Checks of what a call may add to plain attention: score mods, sinks, dropout, fp8's factors; no contents."""

from __future__ import annotations

import math
from typing import Any

import torch

from . import score_mods
from .errors import or_transpose, short, wrong
from .options import Options
from .scalars import as_integer, as_number
from .score_mods import BoundScoreMod
from .spec import FP8, out_dtype

FP32_MAX, FP64_MAX = torch.finfo(torch.float32).max, torch.finfo(torch.float64).max


def check_seed(dropout_p: Any, seed: Any) -> None:
    """Raise where forward and backward are two calls and would each draw a seed of its own."""
    share = as_number(dropout_p)
    if share is not None and 0 < share < 1 and seed is None:
        remedy = "pass the same seed to attention_forward and attention_backward"
        raise wrong("seed", "an int or an int64 tensor, because dropout_p is given", None, remedy)


def checked_dropout(p: Any, name: str = "dropout_p", *, takes_all: bool = False) -> float:
    """Return the share of elements that dropout drops; 1 is refused unless the signature ``takes_all``."""
    share = as_number(p)
    if share is None or not 0 <= share <= 1 or (share == 1 and not takes_all):
        expected = "a number in [0, 1]" if takes_all else "a number in [0, 1)"
        raise wrong(name, expected, short(p), "0.0 switches dropout off")
    return share


def without_keys(q: torch.Tensor) -> torch.Tensor:
    """Return the mask that hides every key: a dropout of 1 gives the same outputs and gradients, zeros."""
    return torch.zeros((1, 1, 1, 1), dtype=torch.bool, device=q.device)


def checked_scale(scale: Any, q: torch.Tensor, name: str = "scale") -> float | None:
    """Return the factor of q k^T, or None where it is to follow from the head dim."""
    if scale is None:
        return None
    number = as_number(scale)
    # Not math.isfinite, which torch.compile cannot trace with a number that is a symbol.
    if number is None or not -math.inf < number < math.inf:
        raise wrong(name, "a finite number or None", short(scale), "None means 1 / sqrt(D)")
    _, most, dtype = _range_of_scores(q)
    if not -most <= number <= most:
        raise wrong(name, f"a number that is finite in {dtype}", short(scale), "None means 1 / sqrt(D)")
    return number


def _range_of_scores(q: torch.Tensor) -> tuple[float, float, str]:
    """Return the least and the largest number above 0 of the dtype of the scores, and its name."""
    return (2.0**-1074, FP64_MAX, "fp64") if q.dtype == torch.float64 else (1e-45, FP32_MAX, "fp32")


def _softcap(options: Options, q: torch.Tensor) -> BoundScoreMod:
    """Return the bound of the scores as a mod."""
    bound = score_mods.softcap(options.softcap)
    least, most, dtype = _range_of_scores(q)
    if not least <= bound.params[0] <= most:
        expected = f"a number above 0 and finite in {dtype}, the dtype of the scores"
        raise wrong("softcap", expected, short(options.softcap), "None switches it off")
    return bound


def bound_score_mods(q: torch.Tensor, options: Options) -> list[BoundScoreMod]:
    """Return softcap, ALiBi and the user's mod, as far as the call has them, in the contract's order."""
    bound = []
    if options.softcap is not None:
        bound.append(_softcap(options, q))
    if options.alibi_slopes is not None:
        bound.append(score_mods.alibi(options.alibi_slopes, q))
    score_mod = options.score_mod
    if score_mod is not None:
        if not isinstance(score_mod, BoundScoreMod):
            remedy = "pass mod(*aux, **params), with mod from fusemesh.register_score_mod"
            raise wrong("score_mod", "a registered mod with its arguments, or None", short(score_mod), remedy)
        score_mods.get(score_mod.mod.name)
        for x in score_mod.aux:
            if x.device != q.device or not x.is_contiguous():
                received = f"{short(x)} on {x.device}, strides {x.stride()}"
                remedy = "move it or call .contiguous()"
                raise wrong("score_mod", f"contiguous aux tensors on q's device {q.device}", received, remedy)
            if x.requires_grad and not score_mod.mod.aux_grad:
                remedy = "detach it, or register the mod with aux_grad=True (reference backend)"
                raise wrong("score_mod", "aux tensors without gradient", "requires_grad=True", remedy)
        bound.append(score_mod)
    return bound


def descale_factors(descale: Any, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor | None:
    """Return the factors of fp8's q, k and v, fp32 [B, Hkv, 3] on the device; None for other dtypes."""
    if q.dtype != FP8:
        if descale is not None:
            raise wrong("descale", f"None beside q of {q.dtype}", short(descale), f"it belongs to q, k, v of {FP8}")
        return None
    batch, heads = k.shape[:2]

    def wrong_factors(received: object) -> ValueError:
        # Written out only for the error: torch.compile makes constants of sizes that are in a string.
        numbers = f"an fp32 tensor of 1 element or [B, Hkv] = [{batch}, {heads}]"
        remedy = "for the tensor or for each batch and key head (q's: that of the heads that share it)"
        expected = f"(q's, k's, v's), each None, a number, or {numbers}"
        return wrong("descale", expected, received, f"x = descale * fp8(x), {remedy}")

    parts = (None, None, None) if descale is None else descale
    if not isinstance(parts, (tuple, list)) or len(parts) != 3:
        raise wrong_factors(short(descale))
    found = []
    for x in parts:
        number = None if x is None or isinstance(x, torch.Tensor) else as_number(x)
        if isinstance(x, torch.Tensor):
            if x.dtype != torch.float32 or x.device != q.device or (x.numel() != 1 and x.shape != (batch, heads)):
                raise wrong_factors(f"{short(x)} on {x.device}")
            found.append(x.reshape(1, 1).expand(batch, heads) if x.numel() == 1 else x)
        elif x is None or (number is not None and abs(number) <= FP32_MAX):
            factor = 1.0 if number is None else number
            found.append(torch.full((batch, heads), factor, dtype=torch.float32, device=q.device))
        else:
            raise wrong_factors(short(x))
    return torch.stack(found, -1)


def checked_sinks(sinks: Any, q: torch.Tensor) -> torch.Tensor | None:
    """The sinks, contiguous [H]."""
    if sinks is None:
        return None
    dtype = out_dtype(q.dtype)

    def wrong_sinks(received: object) -> ValueError:
        expected = f"a tensor [H] = [{q.shape[1]}] of q's dtype {dtype} or torch.float32 on {q.device}"
        fits = isinstance(sinks, torch.Tensor) and tuple(sinks.shape) == (q.shape[2],) != (q.shape[1],)
        return wrong("sinks", expected, received, or_transpose("one logit for each query head", fits))

    if not isinstance(sinks, torch.Tensor) or sinks.dtype not in (dtype, torch.float32) or sinks.device != q.device:
        received = f"{sinks.dtype} on {sinks.device}" if isinstance(sinks, torch.Tensor) else short(sinks)
        raise wrong_sinks(received)
    if tuple(sinks.shape) != (q.shape[1],):
        raise wrong_sinks(f"shape {tuple(sinks.shape)}")
    return sinks if sinks.is_contiguous() else sinks.contiguous()


def seed_tensor(seed: Any, q: torch.Tensor) -> torch.Tensor:
    """Dropout's seed on the device, int64 [1]; drawn from torch's generator where there is none."""
    if seed is None:
        return torch.randint(-(2**63), 2**63 - 1, (1,), dtype=torch.int64, device=q.device)
    if isinstance(seed, torch.Tensor):
        if seed.dtype != torch.int64 or seed.numel() != 1 or seed.device != q.device:
            received = f"a tensor of shape {tuple(seed.shape)}, {seed.dtype} on {seed.device}"
            remedy = "it is read on the device, without a synchronisation"
            raise wrong("seed", f"an int, or an int64 tensor with one element on {q.device}", received, remedy)
        return seed.reshape(1)
    number = as_integer(seed)
    if number is None or not -(2**63) <= number < 2**63:
        remedy = "pass the same seed for the same mask; None draws one"
        raise wrong("seed", "an int of 64 bits, an int64 tensor, or None", short(seed), remedy)
    return torch.full((1,), number, dtype=torch.int64, device=q.device)
