"""check_score_mod: is a score mod's backward that of its forward, and is its twin in PyTorch the same function?

The twin in fp64 is the definition. Its derivative is taken by central differences, so that neither autograd nor the
mod's own backward is believed.
"""

from __future__ import annotations

import importlib
import math
from typing import Any, NamedTuple

import torch

from .. import backends, env
from .call import score_mods
from .call.errors import short, wrong
from .call.options import Call
from .call.scalars import as_number
from .call.score_mods import BoundScoreMod, ScoreMod
from .call.spec import AttentionSpec, Origin

# In fp64, of elements of size 1: h^2 and eps / h are far below what is allowed.
_STEP = 1e-6
# Where neither shape nor origin says so, positions are tried at which queries lie far behind the keys, and far ahead.
_FAR = (Origin(q=5000, k=130, head=40, batch=20), Origin(q=130, k=5000, head=40, batch=20))
_WIDE = 32.0
# The pair computes in fp32: of the tiles beyond the first, as many times the error of torch_forward in fp32 is allowed.
_OF_FP32 = 4.0
_LARGE = 1e30  # a right mod's numbers on the way to such a one may overflow
# Differences of the pair in fp32 only tell which of two is wrong.
_ROUGH_STEP, _ROUGH = 1e-2, 2e-2


class _Scores(NamedTuple):
    """What the mod is applied to."""

    s: torch.Tensor  # fp32 [B, H, Sq, Sk]
    ds: torch.Tensor
    positions: tuple[torch.Tensor, ...]  # batch, head, query and key, int64, that broadcast against s
    origin: Origin
    # Of the tiles beyond the first: what an error adds, and where fp32 holds the results.
    where: str = ""
    counted: torch.Tensor | None = None


def check_score_mod(
    mod: BoundScoreMod | ScoreMod,
    *,
    shape: tuple[int, int, int, int] = (2, 2, 19, 21),
    origin: Origin | None = None,
    scores: torch.Tensor | None = None,
    tolerance: float = 1e-4,
) -> None:
    """Check that a score mod's forward, backward and twin in PyTorch are one function and its derivative.

    Compared are, on random scores: the Triton forward with ``torch_forward`` in fp64; the Triton backward, and the
    gradient that autograd takes of ``torch_forward``, with central differences of ``torch_forward`` in fp64. Both ways
    in which kernels lay a tile are tried. A mod without a pair is checked as far as it goes.

    Args:
        mod: ``mod(*aux, **params)`` as calls take it; a registered mod itself where it takes neither.
        shape: B, H, Sq and Sk of the scores. The mod's tensors must reach as far.
        origin: where the scores stand in the whole, in numbers. None means at its beginning and, of a mod without
            tensors, also far from there: queries far behind and far ahead of the keys, other heads and samples.
        scores: [B, H, Sq, Sk], in place of random ones of ``shape``: to try a mod near an edge of its function. None
            tries scores around 0, and others from -32 to 32.
        tolerance: allowed error of an element x, as a share of 1 + abs(x).

    Raises:
        ValueError: a part is wrong; the message names forward, backward or torch_forward, and says where and by how
            much. Or the pair cannot run here: on a CPU it needs TRITON_INTERPRET=1 before Python starts.
    """
    bound = mod() if isinstance(mod, ScoreMod) else mod
    if not isinstance(bound, BoundScoreMod):
        raise wrong("mod", "a registered mod with its arguments", short(mod), "pass mod(*aux, **params)")
    score_mods.get(bound.mod.name)
    allowed = as_number(tolerance)
    if allowed is None or not 0 <= allowed < math.inf:
        raise wrong("tolerance", "a finite number of at least 0", short(tolerance), "1e-4 is what fp32 needs")
    device = bound.aux[0].device if bound.aux else _device()
    given = _scores(shape, scores, origin or Origin(), device)
    tiles = [given]
    if scores is None:
        s = _WIDE * (2 * torch.rand(given.s.shape, generator=torch.Generator().manual_seed(1)) - 1)
        tiles.append(given._replace(s=s.to(device), where=f", of scores up to {_WIDE:g}"))
    if origin is None and not bound.aux:
        size = tuple(given.s.shape)
        tiles += [_scores(size, scores, far, device)._replace(where=f", at origin={far}") for far in _FAR]
    for tile in tiles:
        found = [fault for fault in _faults_of(bound, tile, allowed) if fault is not None]
        if found:
            raise ValueError(f"score_mod {bound.mod.name!r}: " + "; ".join(found))


def _faults_of(bound: BoundScoreMod, given: _Scores, tolerance: float) -> list[str | None]:
    """Return what is wrong with the mod for the scores."""
    out, slope = _by_differences(bound, given.s.double(), given.positions)
    want = {"out": out, "dx": slope * given.ds.double()}
    allowed = dict.fromkeys(want, tolerance)
    if given.where:
        given, allowed = _in_fp32(bound, given, want, tolerance)
    faults = [_autograd_fault(bound, given, want["dx"], tolerance)]
    if bound.mod.forward is not None:
        faults += _pair_faults(bound, given, want, allowed)
    return faults


def _in_fp32(
    bound: BoundScoreMod, given: _Scores, want: dict[str, torch.Tensor], tolerance: float
) -> tuple[_Scores, dict[str, float]]:
    """Return the scores with the places where fp32 holds the results, and the errors that the pair may have in fp32."""
    found = dict(zip(("out", "dx"), _by_autograd(bound, given, given.s), strict=True))
    counted = torch.ones_like(given.s, dtype=torch.bool)
    for name, x in want.items():
        counted &= (found[name] == x) | (found[name].isfinite() & (x.abs() < _LARGE))
    allowed = {}
    for name, x in want.items():
        allowed[name] = tolerance + _OF_FP32 * float(_relative_error(found[name], x, counted).max())
    return given._replace(counted=counted), allowed


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() and not env.INTERPRET else "cpu")


def _scores(shape: Any, scores: torch.Tensor | None, origin: Origin, device: torch.device) -> _Scores:
    if scores is not None:
        if not isinstance(scores, torch.Tensor) or scores.dim() != 4 or not scores.dtype.is_floating_point:
            raise wrong("scores", "a floating tensor [B, H, Sq, Sk] or None", short(scores), "None draws them")
        if not bool(scores.isfinite().all()):
            raise wrong("scores", "finite numbers", f"{short(scores)} with others", "attention scales q k^T to such")
        shape = tuple(scores.shape)
    sizes = list(shape) if isinstance(shape, (tuple, list)) else []
    if len(sizes) != 4 or any(isinstance(n, bool) or not isinstance(n, int) or n < 1 for n in sizes):
        raise wrong("shape", "(B, H, Sq, Sk), ints above 0", repr(shape), "small numbers do")
    starts: list[Any] = [getattr(origin, name, None) for name in ("batch", "head", "q", "k")]
    if not isinstance(origin, Origin) or any(not isinstance(start, int) for start in starts):
        raise wrong("origin", "an Origin of ints", short(origin), "pass the numbers themselves")
    generator = torch.Generator().manual_seed(0)
    s, ds = (2 * torch.randn(shape, generator=generator) for _ in range(2))
    s = (s if scores is None else scores.detach().float()).to(device).contiguous()
    positions = []
    for dim, start in enumerate(starts):
        index = torch.arange(shape[dim], device=device) + start
        positions.append(index.reshape([-1 if i == dim else 1 for i in range(4)]))
    return _Scores(s, ds.to(device), tuple(positions), origin)


def _twin(bound: BoundScoreMod, s: torch.Tensor, positions: tuple[torch.Tensor, ...]) -> torch.Tensor:
    """Return torch_forward of the scores."""
    params = dict(zip(bound.mod.param_names, bound.params, strict=True))
    try:
        found = bound.mod.torch_forward(s, *positions, *bound.aux, **params)
    except Exception as error:
        at = ", ".join(str(int(x.flatten()[0])) for x in positions)
        remedy = "pass the shape and origin for which its tensors are made"
        raise ValueError(
            f"score_mod {bound.mod.name!r}: torch_forward raised {type(error).__name__} ({error}) for scores of shape "
            f"{tuple(s.shape)} from position ({at}); "
            + (remedy if isinstance(error, IndexError) else f"correct it, or {remedy}")
        ) from error
    if not isinstance(found, torch.Tensor) or found.shape != s.shape:
        raise ValueError(
            f"score_mod {bound.mod.name!r}: torch_forward: expected a tensor of the scores' shape {tuple(s.shape)}, "
            f"received {short(found)}; it changes each score by itself"
        )
    return found.to(s.dtype)


def _by_differences(
    bound: BoundScoreMod, s: torch.Tensor, positions: tuple[torch.Tensor, ...]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return torch_forward of s, and its derivative by central differences: 0 where both neighbours are infinite."""
    with torch.no_grad():
        out = _twin(bound, s, positions)
        step = _STEP * (1 + s.abs())
        above, below = (_twin(bound, x, positions) for x in (s + step, s - step))
    return out, torch.where(above == below, 0.0, (above - below) / (2 * step))


def _autograd_fault(bound: BoundScoreMod, given: _Scores, want: torch.Tensor, tolerance: float) -> str | None:
    """Return what is wrong with the gradient that autograd takes of torch_forward, in fp64."""
    _, found = _by_autograd(bound, given, given.s.double())
    name = f"torch_forward's gradient by autograd{given.where}"
    return _fault(name, found, want, given.counted, tolerance, "each score may depend on itself alone")


def _by_autograd(bound: BoundScoreMod, given: _Scores, s: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return torch_forward of ``s``, and the gradient that autograd takes of it, in the dtype of ``s``."""
    s = s.detach().clone().requires_grad_()
    with torch.enable_grad():
        out = _twin(bound, s, given.positions)
        found = torch.zeros_like(s)
        if out.requires_grad:
            (found,) = torch.autograd.grad(torch.where(out.isfinite(), out, 0.0), s, given.ds.to(s.dtype))
    return out.detach(), found


def _pair_faults(
    bound: BoundScoreMod, given: _Scores, want: dict[str, torch.Tensor], allowed: dict[str, float]
) -> list[str | None]:
    """Return what is wrong with the Triton pair, in either way of laying a tile."""
    unavailable = backends.why_unavailable("triton", given.s.device)
    if unavailable is not None:
        raise ValueError(f"check_score_mod cannot run the Triton pair here: {unavailable}")
    pair = importlib.import_module(f"{__package__}.gpu.mod_pair")
    names = {f"origin_{name}": getattr(given.origin, name) for name in ("q", "k", "head", "batch")}
    spec = AttentionSpec(1.0, **names, mods=(bound.mod.name,), params=bound.params)
    call = Call(spec, aux=tuple(x.detach() for x in bound.aux))
    faults: list[str | None] = []
    for is_transposed in (False, True):
        out, dx = pair.run(given.s, given.ds, call, is_transposed=is_transposed)
        suffix = (", tiles of keys by queries" if is_transposed else "") + given.where
        forward = _fault(
            f"forward{suffix}", out, want["out"], given.counted, allowed["out"], "it must do what torch_forward does"
        )
        backward = None
        if dx is not None:
            remedy = "it is the gradient of the score that forward took"
            backward = _fault(f"backward{suffix}", dx, want["dx"], given.counted, allowed["dx"], remedy)
        faults += [forward, backward]
        if forward and backward and dx is not None:
            step = _ROUGH_STEP * (1 + given.s.abs())
            above, below = (
                pair.run(x, given.ds, call, is_transposed=is_transposed)[0] for x in (given.s + step, given.s - step)
            )
            own = torch.where(above == below, 0.0, (above - below) / (2 * step)) * given.ds
            if _fault("", dx, own.double(), given.counted, _ROUGH, "") is None:
                faults.append("forward and backward agree with each other, so torch_forward may be the wrong one")
        if forward or backward:
            break  # the other way would say the same again
    return faults


def _relative_error(found: torch.Tensor, want: torch.Tensor, counted: torch.Tensor | None) -> torch.Tensor:
    """Return the error of each element x as a share of 1 + abs(x), since differences lose digits of large values."""
    found = found.double()
    error = torch.where(found == want, 0.0, (found - want).abs())
    error = torch.where(error.isnan(), math.inf, error) / (1 + want.abs().nan_to_num(0.0, 0.0, 0.0))
    return error if counted is None else torch.where(counted, error, 0.0)


def _fault(
    name: str, found: torch.Tensor, want: torch.Tensor, counted: torch.Tensor | None, tolerance: float, remedy: str
) -> str | None:
    """Return where and by how much ``found`` [B, H, Sq, Sk] is not ``want`` among those ``counted``, or None."""
    found = found.double()
    error = _relative_error(found, want, counted)
    is_wrong = error > tolerance
    if not bool(is_wrong.any()):
        return None
    at = tuple(int(i) for i in torch.unravel_index(error.argmax(), error.shape))
    place = "b {}, h {}, query {}, key {}".format(*at)
    expected, received = float(want[at]), float(found[at])
    return (
        f"{name}: expected {expected:.6g} at ({place}), received {received:.6g}, off by "
        f"{abs(received - expected):.3g}, as the worst of {int(is_wrong.sum())} wrong ones of {error.numel()}; {remedy}"
    )
