"""Which local ranks failed, as their parent hears of it, and the error that says so."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from ..outputs import UserError
from .waiting import ranks_text


class RankError(RuntimeError):
    """One or more ranks failed.

    ``failures`` maps rank to its traceback, or to how its process ended, the first one first; ``unfinished`` maps the
    ranks that were ended to their stacks; ``followed`` those that failed because another had, to their errors.
    """

    def __init__(
        self,
        failures: dict[int, str],
        unfinished: dict[int, str],
        ranks: int,
        followed: Mapping[int, str] | None = None,
    ) -> None:
        self.failures = failures
        self.unfinished = unfinished
        self.followed = dict(followed or {})
        parts = []
        if failures:
            first = next(iter(failures))
            parts.append(f"{len(failures)} of {ranks} ranks failed, rank {first} first")
            ended = {*self.followed, *unfinished} - failures.keys()
            if ended:
                parts.append(f"{ranks_text(ended)} ended because of that")
        elif unfinished:
            parts.append(f"ranks {sorted(unfinished)} did not finish and were ended")
        text = "; ".join(parts)
        for rank, reason in (failures or unfinished).items():
            text += f"\n--- rank {rank} ---\n{reason.rstrip()}"
        super().__init__(text)


@dataclass
class Heard:
    """What ranks have told that did not return, as (time, rank, text); followed: with the rank that they name."""

    died: list[tuple[float, int, str]] = field(default_factory=list)
    raised: list[tuple[float, int, str]] = field(default_factory=list)
    followed: list[tuple[float, int, int | None, str]] = field(default_factory=list)
    refusals: dict[int, UserError] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return bool(self.died or self.raised or self.followed)

    def add(self, kind: str, at: float, rank: int, answer: Any) -> None:
        """Take down what a rank tells: that it died, raised, refused, or failed because another had."""
        if kind in ("followed", "ended"):
            self.followed.append((at, rank, *answer))
        elif kind == "died":
            self.died.append((at, rank, answer))
        else:
            if kind == "refused":
                self.refusals[rank], answer = answer, f"{type(answer).__name__}: {answer}"
            self.raised.append((at, rank, answer))

    def refusal(self) -> UserError | None:
        """Return the error of the rank that failed first if it says everything, and no rank raised another such one."""
        texts = {str(error) for error in self.refusals.values()}
        if len(texts) != 1 or self.died:
            return None
        # Whatever the others do follows from it.
        return self.refusals.get(min(self.raised)[1])

    def verdict(
        self, unfinished: dict[int, str], returned: Collection[int], ranks: int
    ) -> tuple[dict[int, str], dict[int, str], int, dict[int, str]]:
        """Return the arguments of :class:`RankError`.

        Who died or was stopped first is to blame, alone: the others' errors follow from that, and are often told
        sooner. Else those are that raised an error of their own, and where nobody did, whom the others name.
        """
        followed = {rank: text for _, rank, _, text in sorted(self.followed, key=lambda told: told[0])}
        if self.died:
            _, first, reason = min(self.died)
            followed |= {rank: text for _, rank, text in self.raised + sorted(self.died)[1:]}
            return {first: reason}, unfinished, ranks, followed
        if self.raised or not self.followed:
            return {rank: text for _, rank, text in sorted(self.raised)}, unfinished, ranks, followed
        named = [(at, rank, text) for at, _, rank, text in self.followed if rank is not None and rank not in returned]
        _, first, text = min(named) if named else min((at, rank, text) for at, rank, _, text in self.followed)
        return {first: text}, unfinished, ranks, {rank: text for rank, text in followed.items() if rank != first}
