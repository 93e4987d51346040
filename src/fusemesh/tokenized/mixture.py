"""Several sources of data in one path, each with a weight: ``"a.tokens:3 b.tokens:1"``."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

from fusemesh.tasks import corpus

from .file import VERIFIED_BYTES, header_bytes, is_token_file, verify

_ITEM = re.compile(r"(?P<path>\S+):(?P<weight>\d+(?:\.\d+)?)$")
_MOST = 10_000  # samples after which the order of sources repeats


@dataclass(frozen=True)
class Weighted:
    """A source of a mixture: of so many samples that the weights together say, ``weight`` are its."""

    path: str
    weight: int = 1


def sources_in(path: str, key: str = "data.path") -> list[Weighted]:
    """Return the sources of a path: one for a file, a folder or ""; several for paths that each have a weight.

    Args:
        path: as the configuration gives it.
        key: of the configuration, for messages.

    Raises:
        ValueError: the weights are all 0, or have no small common denominator.
    """
    found = [_ITEM.match(item) for item in path.split()]
    if not found or os.path.exists(Path(path).expanduser()) or None in found:
        return [Weighted(path)]
    pairs = [(item["path"], Fraction(item["weight"])) for item in found if item is not None]
    if any(weight == 0 for _, weight in pairs):
        raise ValueError(f"{key}: expected weights above 0, received {path!r}; leave sources of weight 0 out")
    scale = math.lcm(*(weight.denominator for _, weight in pairs))
    weights = [int(weight * scale) for _, weight in pairs]
    weights = [weight // math.gcd(*weights) for weight in weights]
    if sum(weights) > _MOST:
        raise ValueError(
            f"{key}: expected weights that are small whole numbers together ({_MOST} at most), received {path!r}, "
            f"which are {':'.join(map(str, weights))}; round them"
        )
    return [Weighted(name, weight) for (name, _), weight in zip(pairs, weights, strict=True)]


def written(sources: Sequence[Weighted]) -> str:
    """Return a path that :func:`sources_in` reads as these sources."""
    if len(sources) == 1:
        return sources[0].path
    return " ".join(f"{source.path}:{source.weight}" for source in sources)


def absolute(path: str) -> str:
    """Return a path whose sources are found from any folder."""
    found = sources_in(path)
    return written([Weighted(str(Path(item.path).expanduser().absolute()), item.weight) for item in found])


def files_of(path: str) -> Iterator[tuple[str, bytes]]:
    """Yield names and contents that identify the data of a path, see :meth:`fusemesh.tasks.base.Task.files_of`.

    Of a token file it is the header, in which the hash of the rest stands; the rest is compared with it here, if it is
    not too long for that.

    Raises:
        ValueError: a token file is damaged.
    """
    found = sources_in(path)
    for number, source in enumerate(found):
        mark = f"{number}:{source.weight}/" if len(found) > 1 else ""
        if source.path and is_token_file(source.path):
            if os.path.getsize(source.path) <= VERIFIED_BYTES:
                verify(source.path)
            yield mark, header_bytes(source.path)
        else:
            for name, content in corpus.files_of(source.path):
                yield mark + name, content
