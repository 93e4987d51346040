"""What the tests of proofs at first use share."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from fusemesh.kernels import backends
from fusemesh.kernels.proof import first_use, store
from fusemesh.kernels.proof.store import Store


@pytest.fixture
def nothing_is_known(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """Neither this process nor an empty store knows of any kernel, and proofs are on."""
    monkeypatch.setattr(store, "_default", Store(tmp_path / "proofs"))
    monkeypatch.setattr(first_use, "_mode", first_use.ON)
    first_use.forget()
    backends.reset_call_counts()
    yield
    first_use.forget()
