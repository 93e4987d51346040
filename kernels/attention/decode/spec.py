"""DecodeCall: one call of attention over a cache, which every backend of decode takes."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ...backend_record import Request
from ..call.options import Call


@dataclass(frozen=True)
class DecodeCall:
    """The tensors and numbers of one call, checked.

    Key j of batch b stands in slot j of its cache: row j of ``k_cache[b]``, or with pages row ``j % page`` of page
    ``block_table[b, j // page]``. Of these keys ``length[b] = cache_lens[b] + Sn`` exist (Sn new ones, appended by the
    call itself), and those before ``cache_starts[b]`` are unseen. Query i stands at ``length[b] - Sq + i``. The origins
    of ``call`` are not used.
    """

    q: torch.Tensor  # [B, H, Sq, D]
    k_cache: torch.Tensor  # [B, Hkv, S, D], or pages [N, Hkv, page, D]; unit last stride
    v_cache: torch.Tensor | None  # likewise with Dv; None: the values are the first v_dim columns of the keys
    cache_lens: torch.Tensor  # int32 or int64 [B]
    block_table: torch.Tensor | None  # int32 or int64 [B, pages]
    cache_starts: torch.Tensor | None  # int32 or int64 [B]
    k_new: torch.Tensor | None  # [B, Hkv, Sn, D]
    v_new: torch.Tensor | None  # [B, Hkv, Sn, Dv]
    v_dim: int  # Dv
    call: Call  # the options; mask and bias are for [B, H, Sq, capacity]

    @property
    def page(self) -> int:
        """Keys in one page; all of the cache without pages."""
        return self.k_cache.shape[2]

    @property
    def capacity(self) -> int:
        """Slots that a sequence has."""
        return self.page if self.block_table is None else self.block_table.shape[1] * self.page

    @property
    def added(self) -> int:
        """New keys of each sequence."""
        return 0 if self.k_new is None else self.k_new.shape[2]

    def request(self) -> Request:
        """Return the call as a backend is asked for it."""
        q = self.q
        rows = q.shape[1] // max(self.k_cache.shape[1], 1) * q.shape[2]
        dims = (q.shape[3], self.v_dim)
        is_latent = self.v_cache is None
        scores = (*q.shape[:3], self.capacity)
        return Request(
            "attention_decode",
            q.device,
            q.dtype,
            dims,
            self.call,
            is_latent=is_latent,
            rows=rows,
            scores=scores,
        )
