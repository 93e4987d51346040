"""The error of a kernel that a GPU would be free to run wrongly (leaf)."""

from __future__ import annotations


class Hazard(Exception):
    """What a GPU would be free to do wrong, or does wrong: `kind` in one word."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(f"{kind}: {message}")
        self.kind = kind
