"""The asynchronous operations of one CTA that are under way, and the rule by which they take effect."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from .opcodes.bulk import Stores
    from .opcodes.copies import Copy
    from .opcodes.mbarrier import MBarrier, Transfer
    from .opcodes.wgmma import Product
    from .ptx import Instruction

ASYNCHRONY = ("late", "early", "random")


class InFlight:
    """What the threads of a CTA started and did not wait for yet.

    A GPU may do an asynchronous operation at any time between its issue and the end of the wait for it. Here each takes
    effect as ``late`` or as ``early`` as that, or at ``random``, by a seed.
    """

    def __init__(self, threads: int, asynchrony: str, seed: tuple[int, int]) -> None:
        if asynchrony not in ASYNCHRONY:
            raise ValueError(f"asynchrony: expected one of {ASYNCHRONY}, received {asynchrony!r}")
        self.asynchrony, self.random = asynchrony, np.random.default_rng(seed)
        # cp.async: the groups that each thread committed, and those that it has waited for.
        self.copies: list[Copy] = []
        self.newest = 0
        self.committed = np.zeros(threads, np.int64)
        self.waited = np.zeros(threads, np.int64)
        self.in_step = True  # all threads have committed as often
        # mbarriers by address, and the operations that complete at one.
        self.mbarriers: dict[int, MBarrier] = {}
        self.agents: dict[int, tuple[int, int]] = {}  # address -> number, phases of earlier mbarriers there
        self.transfers: list[Transfer] = []
        # bulk stores by thread
        self.stores: dict[int, Stores] = {}
        # Tensor maps in global memory by address: the warp that acquired what was written there, and when.
        self.tensor_maps: dict[int, tuple[int, int]] = {}
        # setmaxnreg: registers of a thread of each warp, and the last that asked for more than the CTA has.
        self.held = np.zeros(0, np.int64)
        self.over: Instruction | None = None
        # wgmma, of each warpgroup: since its last commit, its committed groups, and the registers of all of them.
        groups = max(threads // 128, 1)
        self.products: list[list[Product]] = [[] for _ in range(groups)]
        self.product_groups: list[list[list[Product]]] = [[] for _ in range(groups)]
        self.registers: set[str] = set()

    def late(self) -> bool:
        """Return whether the next operation takes effect at the end of its wait (or at its issue)."""
        return self.asynchrony == "late" or (self.asynchrony == "random" and bool(self.random.integers(2)))

    def under_way(self, group: int) -> list[Any]:
        """Return the products of a warpgroup that it did not wait for, oldest first."""
        return [x for each in [*self.product_groups[group], self.products[group]] for x in each]

    def leftovers(self) -> str | None:
        """Return how a CTA that ends now leaves something under way, or None."""
        if any(self.products) or any(self.product_groups):
            return "the kernel ends with a wgmma that it never waited for"
        if self.copies:
            return f"the kernel ends with a cp.async that it never waited for (PTX line {self.copies[0].ins.line})"
        if self.transfers:
            return f"the kernel ends while a copy to an mbarrier is under way (PTX line {self.transfers[0].ins.line})"
        for bar in self.mbarriers.values():
            if bar.bytes:
                return f"the kernel ends while the {bar} expects {bar.bytes} bytes more"
            if bar.landed > bar.seen:
                return f"the kernel ends with a copy to the {bar} that nobody waited for"
        return None
