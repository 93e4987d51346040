"""Floor 1: tables with pages that the cache does not have. Nothing else is touched, on any backend."""

from __future__ import annotations

import pytest
import torch

from fusemesh import flash_attention_decode
from fusemesh.kernels import env
from fusemesh.kernels.attention.gpu import decode_tiles
from fusemesh.kernels.testing.poison import surround
from tests.support.engine_required import require_engine

BACKENDS = ["reference", "cpu", pytest.param("triton", marks=pytest.mark.interpreter)]

PAGES, HKV, PAGE, D = 4, 2, 4, 16
MISSING = [-1, -3, PAGES, PAGES + 2, 2**31 - 1, -(2**31)]


def caches() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    keys, values = (torch.randn(PAGES, HKV, PAGE, D, generator=generator) for _ in range(2))
    return keys, values


def attend(
    keys: torch.Tensor, values: torch.Tensor, table: torch.Tensor, lens: list[int], added: int, backend: str = "triton"
) -> torch.Tensor:
    if backend == "cpu":
        require_engine()
    new = torch.ones(2, HKV, added, D) if added else None
    out = flash_attention_decode(
        torch.full((2, 2 * HKV, 1, D), 0.1),
        keys,
        values,
        cache_lens=torch.tensor(lens, dtype=torch.int32),
        block_table=table,
        k_new=new,
        v_new=new,
        backend=backend,
    )
    assert isinstance(out, torch.Tensor)
    return out


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("page", MISSING)
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_keys_of_missing_pages_are_dropped(page: int, dtype: torch.dtype, backend: str) -> None:
    """Of three new keys of sequence 0 one has a page, the others' is missing; sequence 1 has all of its own."""
    keys, values = caches()
    table = torch.tensor([[2, page], [0, 3]], dtype=dtype)
    # Pages before and after the cache are part of the buffer, so that a write through -1 or PAGES is found.
    around = [surround(x, margin=(3, 1, 1, 0)) for x in (keys, values)]
    out = attend(around[0].view, around[1].view, table, [3, 2], 3, backend)
    for name, cache, before in zip(("keys", "values"), around, (keys, values), strict=True):
        cache.assert_intact(name)
        want = before.clone()
        want[2, :, 3] = 1.0
        want[0, :, 2:] = 1.0
        want[3, :, :1] = 1.0
        assert torch.equal(cache.view, want), name
    assert out.isfinite().all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("page", MISSING)
def test_all_new_keys_may_be_dropped(page: int, backend: str) -> None:
    """No key of the call has a page: the cache stays as it is, also where a slot of page 0 would be the nearest."""
    keys, values = caches()
    around = [surround(x, margin=(3, 1, 1, 0)) for x in (keys, values)]
    out = attend(around[0].view, around[1].view, torch.tensor([[2, page], [0, page]]), [4, 5], 2, backend)
    for name, cache, before in zip(("keys", "values"), around, (keys, values), strict=True):
        cache.assert_intact(name)
        assert torch.equal(cache.view, before), name
    assert out.isfinite().all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("page", MISSING)
def test_the_check_names_them(page: int, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(env, "CHECK", True)
    with pytest.raises(ValueError, match=rf"^block_table\[0, 1\]: expected a page from 0 to 3, received {page};"):
        attend(*caches(), torch.tensor([[2, page], [0, 3]]), [3, 2], 3, backend)


@pytest.mark.interpreter
@pytest.mark.parametrize("splits", [1, 2])
@pytest.mark.parametrize("page", MISSING)
def test_keys_of_missing_pages_are_read_within_the_cache(page: int, splits: int) -> None:
    keys, values = caches()
    around = [surround(x, margin=(3, 1, 1, 0)) for x in (keys, values)]
    with decode_tiles.force(splits=splits):
        out = attend(around[0].view, around[1].view, torch.tensor([[2, page], [0, 3]]), [7, 7], 0)
        whole = attend(keys, values, torch.tensor([[2, min(max(page, 0), PAGES - 1)], [0, 3]]), [7, 7], 0)
    assert out.isfinite().all() and torch.equal(out, whole)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_cache_without_pages(backend: str) -> None:
    keys, values = torch.zeros(0, HKV, PAGE, D), torch.zeros(0, HKV, PAGE, D)
    out = attend(keys, values, torch.zeros(2, 2, dtype=torch.int32), [2, 3], 1, backend)
    assert (out == 0).all()
