"""What flash-attn 2 publishes of its functions, written out plainly: one sequence and one head at a time.

Nothing of fusemesh is imported here, so that what these functions say is independent of what they judge.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Scores:
    """The arguments about scores, by flash-attn's names and defaults; ``alibi`` is "", "h" or "bh"."""

    softmax_scale: float | None = None
    causal: bool = False
    window_size: tuple[int, int] = (-1, -1)
    softcap: float = 0.0
    alibi: str = ""

    def slopes(self, batch: int, heads: int) -> torch.Tensor | None:
        """alibi_slopes of a call, or None."""
        shape = {"": None, "h": (heads,), "bh": (batch, heads)}[self.alibi]
        return None if shape is None else torch.rand(shape, generator=torch.Generator().manual_seed(3)) / 4

    def arguments(self, batch: int, heads: int) -> dict[str, Any]:
        """The keyword arguments of a call."""
        names = ("softmax_scale", "causal", "window_size", "softcap")
        return {**{name: getattr(self, name) for name in names}, "alibi_slopes": self.slopes(batch, heads)}


SCORES = {
    "plain": Scores(),
    "scale": Scores(softmax_scale=0.4),
    "causal": Scores(causal=True),
    "window": Scores(window_size=(2, 1)),
    "left": Scores(window_size=(3, -1)),
    "right": Scores(window_size=(-1, 2)),
    "own": Scores(window_size=(0, 0)),
    "causal-window": Scores(causal=True, window_size=(2, 5)),
    "softcap": Scores(softcap=1.5),
    "alibi": Scores(alibi="h"),
    "alibi-batch": Scores(alibi="bh", causal=True),
    "all": Scores(softmax_scale=0.3, causal=True, window_size=(4, -1), softcap=2.0, alibi="bh"),
}


def attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scores: Scores, slopes: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """One sequence: q [Sq, H, D], k and v [Sk, Hkv, D], slopes [H] or None, to out [Sq, H, Dv] and lse [H, Sq]."""
    sq, heads, dim = q.shape
    sk, group = k.shape[0], heads // k.shape[1]
    scale = dim**-0.5 if scores.softmax_scale is None else scores.softmax_scale
    left, right = scores.window_size
    outs, lses = [], []
    for h in range(heads):
        s = scale * q[:, h] @ k[:, h // group].T
        if scores.softcap > 0:
            s = scores.softcap * torch.tanh(s / scores.softcap)
        seen = torch.ones(sq, sk, dtype=torch.bool)
        for i in range(sq):
            at = i + sk - sq
            for j in range(sk):
                hidden = (scores.causal and j > at) or (left >= 0 and j < at - left) or (right >= 0 and j > at + right)
                seen[i, j] = not hidden
        if slopes is not None:
            away = (torch.arange(sq)[:, None] + sk - sq - torch.arange(sk)).abs()
            s = s - slopes[h].to(s.dtype) * away
        # Where a row sees nothing its probabilities are 0, not 0 / 0.
        s = s.masked_fill(~seen, -math.inf)
        top = s.detach().amax(1, keepdim=True).clamp(min=-1e30) if sk else s.new_zeros(sq, 1)
        e = torch.exp(s - top)
        empty = e.sum(1, keepdim=True) == 0
        total = e.sum(1, keepdim=True).masked_fill(empty, 1.0)
        outs.append(e / total @ v[:, h // group])
        lses.append((torch.log(total) + top).masked_fill(empty, -math.inf).squeeze(1))
    return torch.stack(outs, 1), torch.stack(lses)


def batched(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scores: Scores) -> tuple[torch.Tensor, torch.Tensor]:
    """[B, S, H, D] to out [B, Sq, H, Dv] and lse [B, H, Sq]."""
    slopes = scores.slopes(q.shape[0], q.shape[2])
    parts = [attend(q[b], k[b], v[b], scores, _of(slopes, b)) for b in range(q.shape[0])]
    return torch.stack([out for out, _ in parts]), torch.stack([lse for _, lse in parts])


def packed(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, lens_q: list[int], lens_k: list[int], scores: Scores
) -> tuple[torch.Tensor, torch.Tensor]:
    """[total, H, D] to out [total_q, H, Dv] and lse [H, total_q]."""
    slopes = scores.slopes(len(lens_q), q.shape[1])
    sequences = zip(q.split(lens_q), k.split(lens_k), v.split(lens_k), strict=True)
    parts = [attend(*x, scores, _of(slopes, b)) for b, x in enumerate(sequences)]
    return torch.cat([out for out, _ in parts]), torch.cat([lse for _, lse in parts], 1)


def rotated(x: torch.Tensor, positions: list[int], angles: torch.Tensor, interleaved: bool) -> torch.Tensor:
    """x [S, H, D]: the first dimensions as complex numbers, multiplied by exp(i angle), angles [positions, R / 2]."""
    half = angles.shape[1]
    pairs = [(2 * i, 2 * i + 1) if interleaved else (i, i + half) for i in range(half)]
    out = x.clone()
    for token, position in enumerate(positions):
        for i, (a, b) in enumerate(pairs):
            turn = torch.polar(torch.ones((), dtype=x.dtype), angles[position, i].to(x.dtype))
            z = torch.complex(x[token, :, a].contiguous(), x[token, :, b].contiguous()) * turn
            out[token, :, a], out[token, :, b] = z.real, z.imag
    return out


def _of(slopes: torch.Tensor | None, b: int) -> torch.Tensor | None:
    return slopes if slopes is None or slopes.dim() == 1 else slopes[b]
