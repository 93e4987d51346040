"""Patterns of module names: a name in which a component may hold wildcards."""

from __future__ import annotations

from fnmatch import fnmatchcase


def matches(pattern: str, name: str) -> bool:
    """Return whether ``name`` has as many components as ``pattern``, each of which matches."""
    wanted, parts = pattern.split("."), name.split(".")
    return len(wanted) == len(parts) and all(fnmatchcase(part, want) for part, want in zip(parts, wanted, strict=True))
