"""Distributed layer: how parameters are stored on the mesh, and what parallelize() refuses, on gloo ranks."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fusemesh.hybrid.ranks.testing import RankPool
from fusemesh.hybrid.tensor.modules import ColumnParallelLinear, RMSNorm, RowParallelLinear, leaves_none, own_rows
from fusemesh.transformer import Transformer
from tests.support.ranks import module as module_ranks

distributed = pytest.mark.distributed


@distributed
@pytest.mark.parametrize("layout", ["tp4", "fsdp2 x tp2", "dp2 x tp2", "dp4"])
def test_storage(rank_pool: RankPool, layout: str) -> None:
    """Every parameter is one DTensor on (dp, fsdp, tp), sizes of 1 included, with the whole's shape and value."""
    sharded = {"weight": "Shard0", "weight_up": "Shard0", "bias": "Shard0"}
    tp = {
        "embedding": sharded,
        "query": sharded,
        "gate": sharded,
        "head": sharded,
        # 2 key/value heads on 4 ranks: stored whole
        **{
            name: {"weight": "Replicate", "bias": "Replicate"} if layout == "tp4" else sharded
            for name in ("key", "value")
        },
        **{name: {"weight": "Shard1", "bias": "Replicate"} for name in ("output", "down")},
        **{name: {"weight": "Replicate"} for name in ("attention_norm", "mlp_norm", "norm")},
    }
    for table in rank_pool.run(module_ranks.storage, layout):
        assert len(table) == 18
        for name, (axes, kinds, _, kept) in table.items():
            assert axes == ("dp", "fsdp", "tp") and kept, name
            module, parameter = name.split(".")[-2:]
            assert kinds[0] == "Replicate" and kinds[1] in ("Shard0", "StridedShard0"), name
            assert kinds[2] == tp[module][parameter], name
    if layout == "tp4":
        rows = [table["head.weight"][2][0] for table in rank_pool.run(module_ranks.storage, layout)]
        assert rows == [26, 26, 26, 23]


@distributed
@pytest.mark.parametrize("sequence_parallel", [False, True], ids=["nosp", "sp"])
@pytest.mark.parametrize(("vocabulary", "rows"), [(8, [2, 2, 2, 2]), (7, [2, 2, 2, 1]), (5, [5, 5, 5, 5])])
def test_embedding_of_an_uneven_vocabulary(
    rank_pool: RankPool, vocabulary: int, rows: list[int], sequence_parallel: bool
) -> None:
    """5 rows would leave the fourth rank none: all store all of them, and the fourth looks nothing up."""
    weight = torch.arange(vocabulary * 6.0).view(vocabulary, 6).requires_grad_()
    expected = F.embedding(torch.arange(8).view(1, 8) % vocabulary, weight)
    expected.sum().backward()
    for rank, found in enumerate(rank_pool.run(module_ranks.embed, vocabulary, sequence_parallel)):
        assert found["held"].tolist() == [rows[rank], 6]
        assert torch.equal(found["y"], expected.chunk(4, dim=1)[rank] if sequence_parallel else expected)
        assert weight.grad is not None and torch.equal(found["gradient"], weight.grad)


@pytest.mark.parametrize("vocabulary", [1, 5, 8, 101])
@pytest.mark.parametrize("ranks", [1, 2, 4, 8])
def test_own_rows_agree_with_chunk(vocabulary: int, ranks: int) -> None:
    """torch.chunk makes fewer chunks than it is asked for where some would be empty."""
    whole = torch.arange(vocabulary)
    chunks = whole.chunk(ranks)
    for rank in range(ranks):
        expected = chunks[rank] if rank < len(chunks) else whole[:0]
        assert torch.equal(whole[own_rows(vocabulary, ranks, rank)], expected)
    assert leaves_none(vocabulary, ranks) == (len(chunks) < ranks)


@distributed
@pytest.mark.parametrize("layout", ["dp2 x tp2", "fsdp4", "tp4"])
def test_own_model(rank_pool: RankPool, layout: str) -> None:
    """A user's model of our modules: loss, gradients and norm of one process."""
    torch.manual_seed(0)
    model = module_ranks.Own(plain=False).double()
    loss = model(torch.randn(4, 8, 6, dtype=torch.float64)).square().sum()
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1e9)
    for found in rank_pool.run(module_ranks.own_model, layout, False):
        torch.testing.assert_close(found["loss"], loss.detach(), rtol=1e-13, atol=0)
        torch.testing.assert_close(found["norm"], norm, rtol=1e-13, atol=0)
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(found["gradients"][name], parameter.grad, rtol=1e-12, atol=1e-14)


@distributed
def test_own_model_with_plain_layers(rank_pool: RankPool) -> None:
    """Without tp they are sharded like any other; with tp they would be computed by every rank, and are refused."""
    torch.manual_seed(0)
    model = module_ranks.Own(plain=True).double()
    model(torch.randn(4, 8, 6, dtype=torch.float64)).square().sum().backward()
    for found in rank_pool.run(module_ranks.own_model, "dp2 x fsdp2", True):
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(found["gradients"][name], parameter.grad, rtol=1e-12, atol=1e-14)
    for found in rank_pool.run(module_ranks.own_model, "dp2 x tp2", True):
        assert "table for its parameter 'last.weight'; pass one" in found["error"] and "use fsdp" in found["error"]


@distributed
@pytest.mark.parametrize(
    ("layout", "change", "parts"),
    [
        ("tp4", {"num_heads": 2, "num_kv_heads": 1}, ["num_heads: 2", "tp4", "[1, 2]"]),
        ("tp4", {"hidden_size": 24, "num_heads": 12, "num_kv_heads": 6}, ["num_kv_heads: 6", "tp4", "[1, 2, 3, 6]"]),
        ("tp4", {"intermediate_size": 14}, ["intermediate_size: 14", "multiple of 4"]),
        ("dp2", {}, ["layout: dp2 needs 2 ranks and 4 were started", "--nproc 2"]),
        ("cp4", {}, ["layout: context parallel (cp) is not there yet"]),
        ("pp4", {"num_layers": 3}, ["num_layers: 3 layers", "pp4", "pp up to 3", "at least 4 layers"]),
    ],
)
def test_refusals(rank_pool: RankPool, layout: str, change: dict, parts: list[str]) -> None:
    """Every rank refuses by itself, before it waits for another."""
    for message in rank_pool.run(module_ranks.refused, layout, change):
        for part in parts:
            assert part in message


@distributed
def test_a_length_that_tp_does_not_divide(rank_pool: RankPool) -> None:
    for message in rank_pool.run(module_ranks.refused_tokens):
        assert message.startswith("tokens: 5 tokens") and "multiple of 4" in message


@distributed
@pytest.mark.parametrize("layout", ["tp4", "fsdp4"])
def test_weights_loaded_after_an_evaluation_are_used(rank_pool: RankPool, layout: str) -> None:
    """fully_shard keeps gathered parameters after a forward without backward; loading must not leave them behind."""
    model = Transformer(module_ranks.CONFIG, seed=1)
    model.load_state_dict({name: value * 2 for name, value in model.state_dict().items()})
    expected = model(torch.arange(8).view(1, 8)).detach()
    parts = expected.chunk(4, dim=-1) if layout == "tp4" else [expected] * 4
    for found, part in zip(rank_pool.run(module_ranks.logits, layout, None), parts, strict=True):
        torch.testing.assert_close(found, part, rtol=1e-4, atol=1e-5)


@distributed
def test_mixed_precision(rank_pool: RankPool) -> None:
    """dtype= computes in it: logits come in bf16, near those of fp32."""
    model = Transformer(module_ranks.CONFIG, seed=1)
    model.load_state_dict({name: value * 2 for name, value in model.state_dict().items()})
    expected = model(torch.arange(8).view(1, 8)).detach()
    for found in rank_pool.run(module_ranks.logits, "fsdp4", torch.bfloat16):
        assert found.dtype == torch.bfloat16
        assert (found.float() - expected).norm() < 0.03 * expected.norm()


def test_modules_on_one_process() -> None:
    """Before parallelize() they are torch's own layers, by value and gradient."""
    torch.manual_seed(0)
    x, residual = torch.randn(2, 3, 8), torch.randn(2, 3, 6)
    column = ColumnParallelLinear(8, 12, bias=True, activation="silu", gated=True)
    row = RowParallelLinear(12, 6, bias=True)
    norm = RMSNorm(6, eps=1e-5)
    with torch.no_grad():
        for parameter in [*column.parameters(), *row.parameters(), *norm.parameters()]:
            parameter.normal_()
    found = norm(row(column(x), residual))
    found.square().sum().backward()
    gradients = [p.grad.clone() for m in (column, row, norm) for p in m.parameters() if p.grad is not None]
    for module in (column, row, norm):
        module.zero_grad()

    reference = nn.RMSNorm(6, eps=1e-5)
    reference.weight = norm.weight
    hidden = F.silu(F.linear(x, column.weight, column.bias)) * F.linear(x, column.weight_up)
    expected = reference(residual + F.linear(hidden, row.weight, row.bias))
    expected.square().sum().backward()
    torch.testing.assert_close(found, expected)
    again = [p.grad for m in (column, row, norm) for p in m.parameters()]
    assert len(gradients) == len(again) == 6
    for one, other in zip(gradients, again, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def test_initial_values() -> None:
    """torch's own scheme for a linear layer, and unit norms."""
    torch.manual_seed(0)
    column = ColumnParallelLinear(64, 256, bias=True)
    assert column.weight.abs().max() <= 1 / math.sqrt(64) and column.weight.std() > 0.5 / math.sqrt(64)
    assert column.bias is not None and not column.bias.any()
    assert torch.equal(RMSNorm(4).weight, torch.ones(4))
    with pytest.raises(ValueError, match="out_features: expected a multiple of num_heads=3, received 8"):
        ColumnParallelLinear(8, 8, num_heads=3)
