"""Slurm's node lists, expanded as ``scontrol show hostnames`` does."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator

# A name with any number of bracketed groups; commas inside the brackets belong to the group.
_NAME = re.compile(r"(?:[^\[\],\s]+|\[[0-9,\-]+\])+")
_PART = re.compile(r"\[([^\]]*)\]|([^\[\]]+)")
_RANGE = re.compile(r"([0-9]+)(?:-([0-9]+))?")


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
        parts = [
            list(_numbers(group, nodes)) if group or not text else [text] for group, text in _PART.findall(name.group())
        ]
        yield from map("".join, itertools.product(*parts))
        if name.end() == len(nodes):
            return
        at = name.end() + 1


def first_node(nodes: str) -> str:
    """Return the first host of a Slurm node list: ``"gpu[003-006,9],login1"`` gives ``"gpu003"``."""
    return next(expand_hosts(nodes))


def _numbers(group: str, nodes: str) -> Iterator[str]:
    """Yield the numbers of ``01-03,7``, as wide as the lower end of their range."""
    for part in group.split(","):
        match = _RANGE.fullmatch(part)
        if match is None:
            raise _wrong(nodes)
        low, high = match[1], match[2] or match[1]
        if int(high) < int(low):
            raise _wrong(nodes)
        yield from (f"{number:0{len(low)}d}" for number in range(int(low), int(high) + 1))


def _wrong(nodes: str) -> ValueError:
    return ValueError(f"SLURM_STEP_NODELIST: expected a node list such as gpu[003-006],login, received {nodes!r}")
