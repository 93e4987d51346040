"""Every collective that the layers use, over one rank, where each gives back what it was given; and a training step.

The public functions leave out what one rank does not need, so what is called here lies beneath them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from fusemesh.hybrid import checkpoint, consistency
from fusemesh.hybrid.apply import parallelize
from fusemesh.hybrid.layout import Layout
from fusemesh.hybrid.pipeline_parallel import clip_gradients
from fusemesh.hybrid.ranks.join import World, build_mesh
from fusemesh.kernels.matmul import parallel
from fusemesh.kernels.vocab_loss.api import vocab_parallel_cross_entropy
from fusemesh.transformer import Transformer, TransformerConfig


def check_layers(world: World) -> None:
    """Tensor parallel's, the vocabulary's loss, and the pipeline's."""
    group = build_mesh(Layout(), world).get_group("tp")
    x = torch.randn(2, 8, 16, device=world.device, dtype=torch.bfloat16, requires_grad=True)
    for dim in (0, 1, 2):
        for collective in (parallel.all_gather, parallel.reduce_scatter, parallel.own_part):
            assert torch.equal(collective(x.detach(), group, dim), x), collective.__name__
    for op in (dist.ReduceOp.SUM, dist.ReduceOp.MAX):
        assert torch.equal(parallel.all_reduce(x.detach(), group, op), x)
    functions: tuple[Any, ...] = (parallel._CopyToGroup, parallel._ReduceFromGroup)
    of_sequence: tuple[Any, ...] = (
        parallel._GatherFromSequence,
        parallel._ReduceScatterToSequence,
        parallel._ScatterToSequence,
    )
    for function, options in ((f, o) for fs, o in ((functions, ()), (of_sequence, (1,))) for f in fs):
        y = function.apply(x, group, *options)
        (gradient,) = torch.autograd.grad(y, x, torch.ones_like(y))
        assert torch.equal(y, x) and torch.equal(gradient, torch.ones_like(x)), function.__name__
    logits, targets = torch.randn(6, 31, device=world.device), torch.arange(6, device=world.device)
    loss = vocab_parallel_cross_entropy(logits, targets, vocab_start=0, group=group)
    torch.testing.assert_close(loss, torch.nn.functional.cross_entropy(logits, targets, reduction="none"))
    total = torch.ones(3, device=world.device)
    dist.broadcast(total, group=group, group_src=0)
    if world.device.type == "cuda":
        # Stages send to each other; gloo does not send to itself.
        other = torch.empty_like(total)
        exchange = [
            dist.P2POp(dist.isend, total, group=group, group_peer=0),
            dist.P2POp(dist.irecv, other, group=group, group_peer=0),
        ]
        for work in dist.batch_isend_irecv(exchange):
            work.wait()
        assert torch.equal(other, total)


def check_training(world: World, folder: Path) -> None:
    """fully_shard's collectives, clipping, comparisons of replicas, and a checkpoint."""
    layout = Layout()
    made = Transformer(TransformerConfig(31, 32, 2, 4, 1, 48, 8), "torch")
    model: Any = parallelize(made, build_mesh(layout, world), layout, dtype=torch.bfloat16)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, fused=True)
    tokens = torch.arange(16, device=world.device).view(2, 8)
    losses = []
    for _ in range(4):
        optimizer.zero_grad()
        losses.append(model.loss_and_gradients(tokens, (tokens + 1) % 31, 16).item())
        clip_gradients(model, 1.0)
        optimizer.step()
    assert losses[3] < losses[0]
    consistency.check_replicas(model, step=4)
    checkpoint.save(folder, model, optimizer, {"step": 4}, step=4)
    before = [p.detach().full_tensor().clone() for p in model.parameters()]
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    assert checkpoint.load(folder, model, optimizer) == {"step": 4}
    assert all(torch.equal(p.full_tensor(), value) for p, value in zip(model.parameters(), before, strict=True))
