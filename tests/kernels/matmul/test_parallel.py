"""Distributed layer: linear layers split over four gloo ranks, against one process, to the bit."""

from __future__ import annotations

import pytest
import torch

from fusemesh.hybrid.ranks.testing import RankPool
from fusemesh.kernels.matmul import parallel
from fusemesh.kernels.matmul.api import fused_linear
from tests.support.ranks import parallel as parallel_ranks

pytestmark = pytest.mark.distributed


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_movements(rank_pool: RankPool, ranks: int) -> None:
    rank_pool.run(parallel_ranks.movements, ranks=ranks)


@pytest.mark.parametrize("columns", [12, 11, 5])  # five leave the fourth rank none
def test_columns_are_gathered(rank_pool: RankPool, columns: int) -> None:
    rank_pool.run(parallel_ranks.gathered_columns, columns)


@pytest.mark.parametrize("sequence_parallel", [False, True], ids=["nosp", "sp"])
@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_column_parallel(rank_pool: RankPool, sequence_parallel: bool, gated: bool, backend: str) -> None:
    rank_pool.run(parallel_ranks.column, sequence_parallel, gated, backend)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_terms_that_cross_no_rank_are_bit_equal(rank_pool: RankPool, backend: str, dtype: torch.dtype) -> None:
    rank_pool.run(parallel_ranks.column_of_any_numbers, backend, dtype)


@pytest.mark.parametrize("sequence_parallel", [False, True], ids=["nosp", "sp"])
@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_row_parallel(rank_pool: RankPool, sequence_parallel: bool, backend: str) -> None:
    rank_pool.run(parallel_ranks.row, sequence_parallel, backend)


def test_a_sequence_that_the_ranks_do_not_divide(rank_pool: RankPool) -> None:
    for message in rank_pool.run(parallel_ranks.uneven_sequence):
        assert "size 5" in message and "multiple of 4" in message


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_an_empty_part_of_a_weight(rank_pool: RankPool, backend: str) -> None:
    assert rank_pool.run(parallel_ranks.fused_linear_of_no_rows, backend, ranks=1) == [((2, 3, 0), True)]


def test_one_process_communicates_nothing() -> None:
    """Without a group each movement is the identity, and the layers are fused_linear: no process group exists here."""
    x, w, bias = torch.randn(2, 3, 8), torch.randn(5, 8), torch.randn(5)
    for movement in (
        parallel.copy_to_group,
        parallel.reduce_from_group,
        parallel.gather_from_sequence,
        parallel.reduce_scatter_to_sequence,
        parallel.scatter_to_sequence,
    ):
        assert movement(x, None) is x
    plain = fused_linear(x, w, bias)
    for sequence_parallel in (False, True):
        y = parallel.column_parallel_linear(x, w, bias, group=None, sequence_parallel=sequence_parallel)
        assert torch.equal(y, plain)
        y = parallel.row_parallel_linear(x, w, bias, group=None, sequence_parallel=sequence_parallel, residual=plain)
        assert torch.equal(y, plain + plain)
