"""A trial: a small call whose results are compared with the reference, and whose launches are what it can prove."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field

import torch

from ..testing import budget

Results = Mapping[str, torch.Tensor | None]


@dataclass(frozen=True)
class Wrong:
    """One result outside its budget."""

    name: str
    text: str


@dataclass(frozen=True)
class Trial:
    """A small call.

    Args:
        run: launches its kernels and returns the results.
        check: returns which of the results are wrong.
        written: by the name of a kernel, the results that it writes itself.
        read_by_all: kernels whose results the others read.
    """

    run: Callable[[], Results]
    check: Callable[[Results], list[Wrong]]
    written: Mapping[str, Collection[str]] = field(default_factory=dict)
    read_by_all: Collection[str] = ()

    def suspects(self, wrong: Collection[str], kernels: Collection[str]) -> list[str]:
        """Return the kernels, out of those not proven yet, that may have made these results wrong."""
        direct = [k for k in kernels if set(wrong) & set(self.written.get(k, ()))]
        if len(direct) == 1 and set(wrong) <= set(self.written[direct[0]]):
            return direct
        # Results of several kernels may be wrong by one that all of them read.
        shared = [k for k in kernels if k in self.read_by_all or k not in self.written]
        return [k for k in kernels if k in direct or k in shared] or list(kernels)


@dataclass(frozen=True)
class Wanted:
    """The right values of a result: see :func:`fusemesh.kernels.testing.budget.measure`."""

    exact: torch.Tensor
    eager: torch.Tensor
    absolute: torch.Tensor | None = None
    untouched: torch.Tensor | None = None  # where a result is to be ``exact`` to the bit: rows that are padding


def compare(results: Results, wanted: Mapping[str, Wanted]) -> list[Wrong]:
    """Return the results that are outside the error budget of DESIGN section 5, or absent."""
    found = []
    for name, want in wanted.items():
        actual = results.get(name)
        if actual is None:
            found.append(Wrong(name, f"{name}: expected a tensor, received None"))
            continue
        try:
            measured = budget.measure(
                name, actual, want.exact, want.eager, dtype=want.eager.dtype, absolute=want.absolute
            )
        except AssertionError as error:
            found.append(Wrong(name, str(error)))
            continue
        if not measured.passed:
            found.append(Wrong(name, str(measured)))
        elif want.untouched is not None and bool((actual != want.exact)[want.untouched].any()):
            found.append(Wrong(name, f"{name}: rows that are padding hold something"))
    return found
