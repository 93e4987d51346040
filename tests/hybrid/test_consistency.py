"""Layer: hybrid, 4 gloo ranks. Replicas that drift and numbers that are not finite are found by rank and parameter."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from fusemesh.hybrid.consistency import checksum, quick_sum
from fusemesh.hybrid.ranks.testing import RankPool
from tests.support.ranks import fault as fault_ranks


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_checksum(dtype: torch.dtype) -> None:
    x = torch.randn(7, 11).to(dtype)
    assert checksum(x) == checksum(x.clone()) == checksum(x.t().contiguous().t())
    other = x.clone()
    other[3, 4] = torch.nextafter(other[3, 4], torch.tensor(9.0, dtype=dtype)) if dtype != torch.bfloat16 else 0.5
    swapped = x.clone()
    swapped[0, 0], swapped[5, 5] = x[5, 5], x[0, 0]
    assert len({int(checksum(y)) for y in (x, other, swapped)}) == 3


@pytest.mark.parametrize("size", [1, 7, 128, 500, 65536 + 7])
def test_a_quick_sum_sees_a_change_of_any_element(size: int) -> None:
    x = torch.randn(size + 1)
    for y in (x[:size], x[1:]):  # which begins where eight bytes do not
        for index in (0, size // 2, size - 1):
            other = y.clone()
            other[index] = torch.nextafter(other[index], torch.tensor(9.0))
            assert quick_sum(other) != quick_sum(y) == quick_sum(y.clone())
    y = x[:size].view(-1, 1).expand(size, 2)
    assert quick_sum(y) == quick_sum(y.contiguous()) and quick_sum(torch.empty(0)) == quick_sum(torch.empty(0))


def _bit_flipped(x: torch.Tensor, *indices: int, bit: int = 7) -> torch.Tensor:
    """Of the highest byte of each of these elements."""
    x.view(-1, 1).view(torch.uint8)[list(indices), -1] ^= 1 << bit
    return x


CHANGES: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "rows in another order": lambda x: x.flip(0),
    "swapped heads": lambda x: x.unflatten(0, (2, -1)).flip(0).flatten(0, 1),
    "a palindrome of rows": lambda x: torch.cat([x[[1, 0]], x[2:-2], x[[-1, -2]]]),
    "negated": lambda x: -x,
    "a negated column": lambda x: torch.cat([x[:, :1], -x[:, 1:2], x[:, 2:]], 1),
    "two signs in a column": lambda x: _bit_flipped(x, 0, x.shape[1]),
    "two signs far apart": lambda x: _bit_flipped(x, 3, 3 + 2**15 if x.numel() > 2**16 else 67),
    "zeros with two signs": lambda x: _bit_flipped(x, x.numel() - 1, x.numel() - 2),
    "one sign": lambda x: _bit_flipped(x, 5),
    "one bit": lambda x: _bit_flipped(x, x.numel() // 2, bit=0),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("shape", [(32, 128), (128, 2048)], ids=str)
def test_a_quick_sum_sees_what_leaves_plain_sums_as_they_are(shape: tuple[int, int], dtype: torch.dtype) -> None:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    x[-1] = 0
    changed = {name: change(x.clone()) for name, change in CHANGES.items()}
    sums = {"none": quick_sum(x), **{name: quick_sum(y) for name, y in changed.items()}}
    assert len(set(sums.values())) == len(CHANGES) + 1, sums


GATE = "blocks.1.mlp.gate.weight"
NORM = "blocks.0.mlp_norm.weight"


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("layout", "spoilt", "told"),
    [
        ("dp4", {2: GATE}, f"step 7: replicas of parameter '{GATE}' along dp differ: rank 2 from"),
        ("dp4", {1: GATE, 3: NORM}, f"'{NORM}' along dp differ: rank 3 from"),
        ("dp2 x tp2", {3: GATE}, f"'{GATE}' along dp differ: rank 1, 3 from"),
        ("tp4", {0: NORM}, f"'{NORM}' along tp differ: rank 0 from"),
        ("fsdp2 x tp2", {1: NORM}, f"'{NORM}' along tp differ: rank 0, 1 from"),
        ("pp2 x tp2", {3: "embedding.weight"}, "'embedding.weight' along pp differ: rank 1, 3 from"),
        ("pp2 x dp2", {3: GATE}, f"'{GATE}' along dp differ: rank 2, 3 from"),
        # Every rank holds another part: there is nothing to compare with.
        ("fsdp4", {1: GATE}, "none"),
        ("dp2 x tp2", {}, "none"),
    ],
)
def test_drift_is_named(rank_pool: RankPool, layout: str, spoilt: dict[int, str], told: str) -> None:
    for message in rank_pool.call(fault_ranks.drift, layout, spoilt):
        assert told in message


@pytest.mark.distributed
@pytest.mark.parametrize("layout", [pytest.param("dp4", marks=pytest.mark.slow), "fsdp2 x tp2"])
@pytest.mark.parametrize(
    ("where", "name", "told"),
    [
        ("parameter", GATE, f"in parameter '{GATE}'"),
        ("output", "blocks.0.mlp.down", "in the output of module 'blocks.0.mlp.down'"),
        ("output", "norm", "in the output of module 'norm'"),
        ("gradient", GATE, f"in the gradient of parameter '{GATE}'"),
        ("gradient", "embedding.weight", "in the gradient of parameter 'embedding.weight'"),
    ],
)
def test_a_nan_is_found_where_it_was_born(rank_pool: RankPool, layout: str, where: str, name: str, told: str) -> None:
    assert rank_pool.call(fault_ranks.not_finite, layout, 3, where, name) == [f"on rank 3, {told}"] * 4


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("rank", "where", "name", "told"),
    [
        (3, "parameter", GATE, f"in parameter '{GATE}'"),
        # From the first stage it goes on to the second, and from the second back to the first.
        (1, "output", "blocks.0.mlp.gate", "in the output of module 'blocks.0.mlp.gate'"),
        (3, "output", "norm", "in the output of module 'norm'"),
        (3, "gradient", GATE, f"in the gradient of parameter '{GATE}'"),
        (0, "gradient", "embedding.weight", "in the gradient of parameter 'embedding.weight'"),
    ],
)
def test_a_nan_is_found_in_its_stage(rank_pool: RankPool, rank: int, where: str, name: str, told: str) -> None:
    assert rank_pool.call(fault_ranks.not_finite, "pp2 x tp2", rank, where, name) == [f"on rank {rank}, {told}"] * 4


@pytest.mark.distributed
def test_without_a_nan_nothing_is_found(rank_pool: RankPool) -> None:
    (message, *_) = rank_pool.call(fault_ranks.not_finite, "dp2 x tp2", -1, "", "")
    assert message.startswith("nowhere, when the step was done again")
