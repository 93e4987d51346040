"""One record of a language model as tokens."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np


class Document(NamedTuple):
    """Tokens, and which of them are targets.

    ids: int32 [n]. counts: bool [n]; counts[i] says whether token i is a target, of the tokens before it; the first
    never is.
    """

    ids: np.ndarray
    counts: np.ndarray
