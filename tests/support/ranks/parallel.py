"""Functions that ranks run for the tests of tensor parallel operations. Imported by the ranks, so it holds no tests.

Most inputs are small integers held in floating point: every product and sum is exact, so that any order of reduction
gives the same bits, and a sharded operation must equal the whole one to the bit, forward and backward.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from fusemesh.hybrid.ranks.join import World
from fusemesh.kernels.matmul import parallel
from fusemesh.kernels.matmul.api import fused_linear
from fusemesh.kernels.vocab_loss import reference
from fusemesh.kernels.vocab_loss.api import vocab_parallel_cross_entropy
from fusemesh.kernels.vocab_loss.linear import fused_linear_cross_entropy

B, S, K, N = 2, 12, 20, 28


def integers(name: str, *shape: int) -> torch.Tensor:
    """A tensor of integers from -3 to 3 that depends on its name alone."""
    generator = torch.Generator().manual_seed(sum(name.encode()))
    return torch.randint(-3, 4, shape, generator=generator).double()


def part(x: torch.Tensor, dim: int) -> torch.Tensor:
    """This rank's part of ``x``, as a leaf."""
    return x.chunk(dist.get_world_size(), dim=dim)[dist.get_rank()].clone().requires_grad_()


def same(found: torch.Tensor | None, expected: torch.Tensor) -> None:
    """Equal to the bit."""
    assert found is not None
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def movements(world: World) -> None:
    """The ways across the group, against what they are by definition, in both directions and along each dim."""
    group, ranks = dist.group.WORLD, world.world_size
    for dim in (0, 1, 2):
        shape = [4, 8, 12]
        x = integers(f"x{dim}", *shape)
        each = [integers(f"each{dim}{rank}", *shape) for rank in range(ranks)]
        total = sum(each[1:], each[0])
        own = each[world.rank].clone().requires_grad_()
        weight = integers("w", *shape)

        # Every rank differentiates (y * weight).sum(), with its own weight where y differs between ranks.
        y = parallel.copy_to_group(own, group)
        same(y, own.detach())
        y.backward(each[world.rank])
        same(own.grad, total)

        own.grad = None
        y = parallel.reduce_from_group(own, group)
        same(y, total)
        y.backward(weight)
        same(own.grad, weight)

        piece = part(x, dim)
        y = parallel.gather_from_sequence(piece, group, dim)
        same(y, x)
        y.backward(each[world.rank])
        same(piece.grad, part(total, dim).detach())

        own.grad = None
        y = parallel.reduce_scatter_to_sequence(own, group, dim)
        same(y, part(total, dim).detach())
        y.backward(part(weight, dim).detach())
        same(own.grad, weight)

        own.grad = None
        y = parallel.scatter_to_sequence(own, group, dim)
        same(y, part(each[world.rank], dim).detach())
        y.backward(part(weight, dim).detach())
        same(own.grad, weight)

        # A gradient that autograd shares between two uses is not changed under the other's hands.
        own.grad = None
        other = x.clone().requires_grad_()
        (parallel.copy_to_group(own, group) + other).backward(weight)
        same(other.grad, weight)


def gathered_columns(world: World, columns: int) -> None:
    """The whole from its parts, of which the last may be smaller or empty; the gradient is whole on every rank."""
    group = dist.group.WORLD
    x, weight = integers("x", 4, 6, columns), integers("w", 4, 6, columns)
    size = -(-columns // world.world_size)
    mine = slice(min(world.rank * size, columns), min((world.rank + 1) * size, columns))
    own = x[..., mine].clone().requires_grad_()
    y = parallel.gather_from_columns(own, group, columns)
    same(y, x)
    y.backward(weight)
    same(own.grad, weight[..., mine])


def column(world: World, sequence_parallel: bool, gated: bool, backend: str) -> None:
    """Column-parallel forward, dgrad, wgrad and bias gradient: bit-equal to slices of the whole layer's."""
    x, w, bias, dy = integers("x", B, S, K), integers("w", N, K), integers("b", N), integers("dy", B, S, N)
    up = integers("up", N, K) if gated else None
    # relu2 keeps integers integers.
    activation = "relu2" if gated else None
    whole = [t.clone().requires_grad_() for t in (x, w, bias, *([up] if gated else []))]
    y = fused_linear(*whole[:3], activation=activation, w_up=whole[3] if gated else None, backend=backend)
    y.backward(dy)

    mine = part(x, 1) if sequence_parallel else x.clone().requires_grad_()
    shards = [part(t, 0) for t in (w, bias, *([up] if gated else []))]
    found = parallel.column_parallel_linear(
        mine,
        *shards[:2],
        activation=activation,
        w_up=shards[2] if gated else None,
        group=dist.group.WORLD,
        sequence_parallel=sequence_parallel,
        backend=backend,
    )
    same(found, part(y.detach(), 2).detach())
    found.backward(part(dy, 2).detach())
    gradient = whole[0].grad
    assert gradient is not None
    same(mine.grad, part(gradient, 1).detach() if sequence_parallel else gradient)
    for shard, tensor in zip(shards, whole[1:], strict=True):
        assert tensor.grad is not None
        same(shard.grad, part(tensor.grad, 0).detach())


def column_of_any_numbers(world: World, backend: str, dtype: torch.dtype) -> None:
    """Terms that cross no rank (forward, wgrad) are bit-equal to one process's on the same shapes, for any input."""
    torch.manual_seed(0)
    x, w, dy = torch.randn(B, S, K, dtype=dtype), torch.randn(N, K, dtype=dtype), torch.randn(B, S, N, dtype=dtype)
    alone = part(w, 0)
    y = fused_linear(x, alone, activation="silu", backend=backend)
    y.backward(part(dy, 2).detach())
    shard = part(w, 0)
    found = parallel.column_parallel_linear(
        part(x, 1), shard, activation="silu", group=dist.group.WORLD, sequence_parallel=True, backend=backend
    )
    found.backward(part(dy, 2).detach())
    same(found, y.detach())
    assert alone.grad is not None
    same(shard.grad, alone.grad)


def row(world: World, sequence_parallel: bool, backend: str) -> None:
    """Row-parallel forward with bias and residual, and every gradient: bit-equal to the whole layer's."""
    x, w, bias = integers("x", B, S, K), integers("w", N, K), integers("b", N)
    residual, dy = integers("r", B, S, N), integers("dy", B, S, N)
    whole = [t.clone().requires_grad_() for t in (x, w, bias, residual)]
    y = whole[3] + fused_linear(*whole[:3], backend=backend)
    y.backward(dy)

    mine, shard, own_bias = part(x, 2), part(w, 1), bias.clone().requires_grad_()
    stream = part(residual, 1) if sequence_parallel else residual.clone().requires_grad_()
    found = parallel.row_parallel_linear(
        mine,
        shard,
        own_bias,
        group=dist.group.WORLD,
        sequence_parallel=sequence_parallel,
        residual=stream,
        backend=backend,
    )
    same(found, part(y.detach(), 1).detach() if sequence_parallel else y.detach())
    found.backward(part(dy, 1).detach() if sequence_parallel else dy)
    dx, dw, dbias, dresidual = (t.grad for t in whole)
    assert dx is not None and dw is not None and dbias is not None and dresidual is not None
    same(mine.grad, part(dx, 2).detach())
    same(shard.grad, part(dw, 1).detach())
    same(stream.grad, part(dresidual, 1).detach() if sequence_parallel else dresidual)
    assert own_bias.grad is not None
    if sequence_parallel:
        # A rank's part of a sum: whoever owns the bias adds them up.
        dist.all_reduce(own_bias.grad)
    same(own_bias.grad, dbias)


def uneven_sequence(world: World) -> str:
    """The message for a sequence that the ranks do not divide; no rank waits for another."""
    try:
        parallel.reduce_scatter_to_sequence(torch.zeros(2, world.world_size + 1, 4), dist.group.WORLD)
    except ValueError as error:
        return str(error)
    return ""


def vocab_loss(world: World, vocabulary: int, dtype: torch.dtype) -> dict[str, Any]:
    """Loss and gradient of this rank's columns; those of one process with the whole vocabulary; the same in fp64."""
    torch.manual_seed(0)
    # Far from zero, so that a loss without its maximum overflows.
    logits = (5 * torch.randn(3, 7, vocabulary) + 200).to(dtype)
    targets = torch.randint(0, vocabulary, (3, 7))
    targets[0, :3] = -100
    targets[1] = vocabulary - 1
    weights = torch.randn(3, 7, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    whole = logits.clone().requires_grad_()
    expected = reference.cross_entropy(whole, targets)
    expected.backward(weights)

    size = -(-vocabulary // world.world_size)
    start = min(world.rank * size, vocabulary)
    columns = slice(start, min(start + size, vocabulary))
    own = logits[..., columns].clone().requires_grad_()
    loss = vocab_parallel_cross_entropy(own, targets, vocab_start=start, group=dist.group.WORLD)
    loss.backward(weights)
    assert whole.grad is not None and own.grad is not None
    exact = logits.double().requires_grad_()
    exact_loss = reference.cross_entropy(exact, targets)
    exact_loss.backward(weights.double())
    assert exact.grad is not None
    return {
        "loss": loss.detach(),
        "gradient": own.grad,
        "eager loss": expected.detach(),
        "eager gradient": whole.grad[..., columns],
        "exact loss": exact_loss.detach(),
        "exact gradient": exact.grad[..., columns],
    }


def fused_linear_loss(world: World, vocabulary: int) -> dict[str, Any]:
    """Loss and gradients of a head split over the ranks, and in fp64 those of the whole head in one process."""
    torch.manual_seed(0)
    h, weight, bias = (torch.randn(*x, dtype=torch.float64) for x in ((3, 7, 8), (vocabulary, 8), (vocabulary,)))
    targets = torch.randint(0, vocabulary, (3, 7))
    targets[0, :3], targets[1] = -100, vocabulary - 1
    weights = torch.randn(3, 7, dtype=torch.float64)
    whole = [x.clone().requires_grad_() for x in (h, weight, bias)]
    expected = reference.cross_entropy(torch.nn.functional.linear(*whole), targets)
    expected.backward(weights)

    size = -(-vocabulary // world.world_size)
    start = min(world.rank * size, vocabulary)
    rows = slice(start, min(start + size, vocabulary))
    own = [x.clone().requires_grad_() for x in (h, weight[rows], bias[rows])]
    entered = parallel.copy_to_group(own[0], dist.group.WORLD)
    loss = fused_linear_cross_entropy(entered, own[1], targets, own[2], vocab_start=start, group=dist.group.WORLD)
    loss.backward(weights)
    found: dict[str, Any] = {"loss": loss.detach(), "exact loss": expected.detach()}
    for name, mine, right, part in zip(("dh", "dweight", "dbias"), own, whole, (slice(None), rows, rows), strict=True):
        assert right.grad is not None
        found |= {name: mine.grad, f"exact {name}": right.grad[part]}
    return found


def unknown_target(world: World) -> str:
    """The message for an id that no rank holds; the ranks run with FUSEMESH_CHECK=1."""
    try:
        vocab_parallel_cross_entropy(
            torch.zeros(2, 5), torch.tensor([1, 99]), vocab_start=5 * world.rank, group=dist.group.WORLD
        )
    except ValueError as error:
        return str(error)
    return ""


def fused_linear_of_no_rows(world: World, backend: str) -> tuple[tuple[int, ...], bool]:
    """An empty part of a weight, as an uneven vocabulary leaves to the last rank: shape of y, and whether dx is 0."""
    x = torch.randn(2, 3, K).requires_grad_()
    w = torch.empty(0, K).requires_grad_()
    y = fused_linear(x, w, backend=backend)
    y.sum().backward()
    assert x.grad is not None and w.grad is not None and w.grad.shape == (0, K)
    return tuple(y.shape), bool(torch.equal(x.grad, torch.zeros_like(x)))
