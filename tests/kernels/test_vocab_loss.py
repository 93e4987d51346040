"""Distributed layer: cross entropy over a vocabulary split over gloo ranks, evenly, unevenly, or with none left."""

from __future__ import annotations

import pytest
import torch

from fusemesh.hybrid.ranks.testing import RankPool
from fusemesh.kernels.testing import budget
from fusemesh.kernels.vocab_loss import reference
from fusemesh.kernels.vocab_loss.api import vocab_parallel_cross_entropy
from tests.support.ranks import parallel as parallel_ranks


@pytest.mark.distributed
@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("vocabulary", [64, 101, 5])
def test_fp64(rank_pool: RankPool, vocabulary: int, ranks: int) -> None:
    """5 ids on 4 ranks leave the last rank none."""
    for found in rank_pool.run(parallel_ranks.vocab_loss, vocabulary, torch.float64, ranks=ranks):
        torch.testing.assert_close(found["loss"], found["exact loss"], rtol=1e-13, atol=1e-13)
        torch.testing.assert_close(found["gradient"], found["exact gradient"], rtol=1e-13, atol=1e-14)


@pytest.mark.distributed
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_narrow_dtypes(rank_pool: RankPool, dtype: torch.dtype) -> None:
    """Computed in fp32: the loss keeps fp32's error budget whatever the dtype, the gradient that of its dtype."""
    for found in rank_pool.run(parallel_ranks.vocab_loss, 101, dtype):
        budget.check("loss", found["loss"], found["exact loss"], found["eager loss"], dtype=torch.float32)
        budget.check("dlogits", found["gradient"], found["exact gradient"], found["eager gradient"], dtype=dtype)


@pytest.mark.distributed
def test_an_id_that_no_rank_holds(rank_pool: RankPool) -> None:
    for message in rank_pool.run(parallel_ranks.unknown_target, ranks=2):
        assert "targets" in message and "99" in message


def test_one_process() -> None:
    """The exact gradient, by finite differences in fp64, with ignored targets."""
    torch.manual_seed(0)
    logits = torch.randn(4, 9, dtype=torch.float64, requires_grad=True)
    targets = torch.tensor([0, 8, -1, 3])
    assert torch.autograd.gradcheck(
        lambda x: vocab_parallel_cross_entropy(x, targets, vocab_start=0, ignore_index=-1), (logits,)
    )
    loss = vocab_parallel_cross_entropy(logits, targets, vocab_start=0, ignore_index=-1)
    torch.testing.assert_close(loss, reference.cross_entropy(logits, targets, ignore_index=-1), rtol=1e-14, atol=1e-14)
    assert loss[2] == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"targets": torch.zeros(3, dtype=torch.long)}, r"targets: expected shape \(2,\).*received \(3,\)"),
        ({"targets": torch.zeros(2)}, "targets: expected int64 or int32.*float32"),
        ({"logits": torch.zeros(2, 5, dtype=torch.long)}, "logits: expected a floating dtype.*int64"),
        ({"vocab_start": -1}, "vocab_start: .*received -1"),
    ],
)
def test_wrong_input(change: dict, message: str) -> None:
    call = {"logits": torch.zeros(2, 5), "targets": torch.zeros(2, dtype=torch.long), "vocab_start": 0, **change}
    with pytest.raises(ValueError, match=message):
        vocab_parallel_cross_entropy(**call)
