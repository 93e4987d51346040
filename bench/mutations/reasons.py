"""Why a change of a kernel's text that nothing notices changes nothing: by kind, kernel and line of the source."""

from __future__ import annotations

import re
from typing import Any

# (kind, kernel, code of the source, text, reason): regular expressions; the first that matches counts.
REASONS: list[tuple[str, str, str, str, str]] = []


def reason(survivor: dict[str, Any]) -> str:
    """Return why a survivor is none of the emulator's failures, or ""."""
    for kind, kernel, code, text, why in REASONS:
        fields = ((kind, "kind"), (kernel, "kernel"), (code, "code"), (text, "text"))
        if all(re.search(pattern, survivor[name]) for pattern, name in fields):
            return why
    return ""
