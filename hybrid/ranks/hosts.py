"""Slurm's node lists, expanded as ``scontrol show hostnames`` does."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

# A name with any number of bracketed groups; commas inside the brackets belong to the group.
_NAME = re.compile(r"(?:[A-Za-z0-9._\-]+|\[[0-9,\-]+\])+")
_PART = re.compile(r"\[([^\]]*)\]|([^\[\]]+)")
_RANGE = re.compile(r"([0-9]{1,18})(?:-([0-9]{1,18}))?")
# As many as Slurm accepts in one range.
_MOST_HOSTS = 2**16


def expand_hosts(nodes: str) -> Iterator[str]:
    """Yield the hosts of a node list in its order: ``"r[1-2]n[08-10],login"`` gives r1n08, r1n09, r1n10, r2n08, ...

    Raises:
        ValueError: the text is no node list.
    """
    nodes = nodes.strip()
    at = 0
    while True:
        name = _NAME.match(nodes, at)
        if name is None or (name.end() < len(nodes) and nodes[name.end()] != ","):
            raise _wrong(nodes)
        # The last group varies fastest.
        yield from _product(
            [_ranges(group, nodes) if group or not text else text for group, text in _PART.findall(name.group())]
        )
        if name.end() == len(nodes):
            return
        at = name.end() + 1


def first_node(nodes: str) -> str:
    """Return the first host of a Slurm node list: ``"gpu[003-006,9],login1"`` gives ``"gpu003"``."""
    return next(expand_hosts(nodes))


def _product(parts: Sequence[str | list[tuple[int, int, int]]]) -> Iterator[str]:
    """Yield the names that texts and ranges give, one at a time: a range may be long."""
    if not parts:
        yield ""
        return
    for first in [parts[0]] if isinstance(parts[0], str) else _numbers(parts[0]):
        for rest in _product(parts[1:]):
            yield first + rest


def _ranges(group: str, nodes: str) -> list[tuple[int, int, int]]:
    """Return the ranges of ``01-03,7``, each as its first and last number and the width of their text."""
    ranges = []
    for part in group.split(","):
        match = _RANGE.fullmatch(part)
        if match is None:
            raise _wrong(nodes)
        low, high = match[1], match[2] or match[1]
        if not 0 <= int(high) - int(low) < _MOST_HOSTS:
            raise _wrong(nodes)
        ranges.append((int(low), int(high), len(low)))
    return ranges


def _numbers(ranges: list[tuple[int, int, int]]) -> Iterator[str]:
    for low, high, width in ranges:
        yield from (f"{number:0{width}d}" for number in range(low, high + 1))


def _wrong(nodes: str) -> ValueError:
    return ValueError(f"SLURM_STEP_NODELIST: expected a node list such as gpu[003-006],login, received {nodes!r}")
