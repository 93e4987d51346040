"""Modules whose parameters are split over the tp axis: linear layers, embedding and norm.

Each is an ordinary module of one process until :meth:`TensorParallelModule.distribute` is called (by
:func:`fusemesh.hybrid.apply.parallelize`). From then on its parameters are DTensors on tp, which is what fully_shard,
clipping, optimizers and checkpoints see; its forward works on plain local tensors with an explicit process group.

How a parameter's gradient relates to the ranks of tp is stated once, in :meth:`TensorParallelModule.placements`:
``Shard`` for a sharded weight, ``Replicate`` where every rank computes the whole gradient, ``Partial`` where each rank
computes a part of the sum (then the data-parallel wrapper's redistribution sums it, once).
"""

from __future__ import annotations

import math

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard
from torch.nn import functional as F

from fusemesh.kernels.matmul import parallel


class TensorParallelModule(nn.Module):
    """Base of the modules below: holds the group, and turns parameters into DTensors and back into local tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.group: dist.ProcessGroup | None = None
        self.sequence_parallel = False

    @property
    def ranks(self) -> int:
        """Return the number of ranks on the tp axis."""
        return parallel.group_size(self.group)

    @property
    def rank(self) -> int:
        """Return this process's place on the tp axis."""
        return parallel.group_rank(self.group)

    def placements(self) -> dict[str, tuple[Placement, Placement]]:
        """Return each parameter's placement on tp, and that of the gradient which this module's backward computes."""
        raise NotImplementedError

    def check(self, ranks: int) -> None:
        """Raise ValueError if this module cannot be split over ``ranks`` ranks."""

    def distribute(
        self,
        mesh: DeviceMesh,
        sequence_parallel: bool,
        device: torch.device,
        shared: dict[nn.Parameter, nn.Parameter | None],
    ) -> None:
        """Split the parameters over the one-dimensional ``mesh``; every rank must hold the same whole ones.

        Args:
            device: of the mesh. The part alone is moved there, cut where the whole parameter is.
            shared: parameters that several modules hold, and the part that is made of each for the first of them.
        """
        self.group, self.sequence_parallel = mesh.get_group(), sequence_parallel
        for name, (placement, _) in self.placements().items():
            whole = getattr(self, name)
            if whole is None:
                continue
            part = shared.get(whole)
            if part is None:
                part = nn.Parameter(own_part(whole.detach(), mesh, placement, device), whole.requires_grad)
                if whole in shared:
                    shared[whole] = part
            self.register_parameter(name, part)

    def local(self, name: str) -> torch.Tensor | None:
        """Return this rank's part of a parameter, through which the gradient flows back to it."""
        parameter = getattr(self, name)
        if isinstance(parameter, DTensor):
            return parameter.to_local(grad_placements=[self.placements()[name][1]])
        return parameter

    def enter_group(self, x: torch.Tensor) -> torch.Tensor:
        """Return ``x`` for matmuls split over tp: gathered along the sequence, or copied; dx is summed over tp."""
        if self.sequence_parallel:
            return parallel.gather_from_sequence(x, self.group)
        return parallel.copy_to_group(x, self.group)


class ColumnParallelLinear(TensorParallelModule):
    """y = act(x W^T + bias), or act(x W^T + bias) * (x W_up^T); the output features are split over tp.

    Local shapes: x [B, S, in], or [B, S / tp, in] under sequence parallel; ``weight``, ``weight_up`` [out / tp, in];
    ``bias`` [out / tp]; y [B, S, out / tp]. tp need not divide ``out``: see :func:`own_rows`.

    Args:
        in_features, out_features: of the whole layer.
        bias: whether there is one.
        activation: see :func:`fusemesh.kernels.matmul.api.fused_linear`.
        gated: whether there is a ``weight_up``.
        num_heads: the output is this many heads, none of which may be split. With fewer heads than ranks, each head is
            computed by tp / num_heads ranks: the weight is stored whole, a rank uses its head's rows, and the
            gradients (zero outside those rows) are summed over tp.
        enter: whether forward takes x into the group (gather or copy). False if the caller did, for several layers at
            once, by :meth:`enter_group`.
        gather_output: y is [B, S, out], whole on every rank, for a computation that every rank does alike.
        backend: of the matmul.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        bias: bool = False,
        activation: str | None = None,
        gated: bool = False,
        num_heads: int | None = None,
        enter: bool = True,
        gather_output: bool = False,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        if num_heads is not None and gather_output:
            raise ValueError("gather_output: expected False with num_heads, whose parts may repeat, received True")
        if num_heads is not None and out_features % num_heads != 0:
            raise ValueError(f"out_features: expected a multiple of num_heads={num_heads}, received {out_features}")
        self.in_features, self.out_features, self.num_heads = in_features, out_features, num_heads
        self.activation, self.enter, self.gather_output, self.backend = activation, enter, gather_output, backend
        self.weight = nn.Parameter(torch.empty(out_features, in_features))
        self.weight_up = nn.Parameter(torch.empty(out_features, in_features)) if gated else None
        self.bias = nn.Parameter(torch.empty(out_features)) if bias else None
        _initialise_linear(self)

    @property
    def replicated(self) -> bool:
        """Return whether every rank stores all rows: with fewer heads than ranks, or if some rank would have none."""
        if self.num_heads is not None:
            return self.num_heads < self.ranks
        return leaves_none(self.out_features, self.ranks)

    @property
    def local_heads(self) -> int:
        """Return the number of heads that this rank computes."""
        assert self.num_heads is not None
        return max(1, self.num_heads // self.ranks)

    def check(self, ranks: int) -> None:
        heads = self.num_heads
        if heads is not None and heads % ranks != 0 and ranks % heads != 0:
            raise ValueError(f"num_heads: {heads} heads fit tp{ranks} only if one divides the other")

    def placements(self) -> dict[str, tuple[Placement, Placement]]:
        pair: tuple[Placement, Placement] = (Replicate(), Partial()) if self.replicated else (Shard(0), Shard(0))
        return dict.fromkeys(("weight", "weight_up", "bias"), pair)

    def local(self, name: str) -> torch.Tensor | None:
        part = super().local(name)
        if part is None or not self.replicated:
            return part
        if self.num_heads is None:
            return part[own_rows(self.out_features, self.ranks, self.rank)]
        rows = self.out_features // self.num_heads
        head = self.rank * self.num_heads // self.ranks
        return part.narrow(0, head * rows, rows)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight = self.local("weight")
        assert weight is not None
        y = parallel.column_parallel_linear(
            x,
            weight,
            self.local("bias"),
            activation=self.activation,
            w_up=self.local("weight_up"),
            group=self.group if self.enter else None,
            sequence_parallel=self.sequence_parallel,
            backend=self.backend,
        )
        return parallel.gather_from_columns(y, self.group, self.out_features) if self.gather_output else y


class RowParallelLinear(TensorParallelModule):
    """y = residual + x W^T + bias; the input features are split over tp, and the parts' products summed.

    Local shapes: x [B, S, in / tp]; ``weight`` [out, in / tp]; ``bias`` [out] on every rank; y and residual
    [B, S, out], or [B, S / tp, out] under sequence parallel (then a rank's dbias covers its own tokens: Partial).

    Args:
        in_features, out_features, bias, backend: of the whole layer, as in :class:`ColumnParallelLinear`.
        split_input: x is [B, S, in], whole on every rank, of which each takes its part.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        bias: bool = False,
        split_input: bool = False,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        self.in_features, self.out_features, self.backend = in_features, out_features, backend
        self.split_input = split_input
        self.weight = nn.Parameter(torch.empty(out_features, in_features))
        self.bias = nn.Parameter(torch.empty(out_features)) if bias else None
        _initialise_linear(self)

    def check(self, ranks: int) -> None:
        if self.in_features % ranks != 0:
            raise ValueError(
                f"in_features: {self.in_features} cannot be split over tp{ranks}; use a multiple of {ranks}"
            )

    def placements(self) -> dict[str, tuple[Placement, Placement]]:
        whole = Partial() if self.sequence_parallel else Replicate()
        return {"weight": (Shard(1), Shard(1)), "bias": (Replicate(), whole)}

    def forward(self, x: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
        weight = self.local("weight")
        assert weight is not None
        if self.split_input:
            # The same operation as along the sequence, here along the features.
            x = parallel.scatter_to_sequence(x, self.group, x.dim() - 1)
        return parallel.row_parallel_linear(
            x,
            weight,
            self.local("bias"),
            group=self.group,
            sequence_parallel=self.sequence_parallel,
            residual=residual,
            backend=self.backend,
        )


class VocabParallelEmbedding(TensorParallelModule):
    """Rows of a table by token id; the rows are split over tp, unevenly where tp does not divide the vocabulary.

    Local shapes: ids [B, S] equal on every rank; ``weight`` [about V / tp, E], see :func:`own_rows`; y [B, S, E], or
    [B, S / tp, E] under sequence parallel.

    - forward: y = reduce-scatter (or all-reduce) of the rows this rank holds, zero for the other ids
    - wgrad: dW[id] = sum of dY over the positions of id; no sum over tp

    With tied embeddings the same table is the head's weight: :meth:`logits`.

    Args:
        num_embeddings, embedding_dim: V and E.
        padding_idx: an id whose row gets no gradient here; see torch.nn.Embedding.
    """

    def __init__(self, num_embeddings: int, embedding_dim: int, *, padding_idx: int | None = None) -> None:
        super().__init__()
        self.num_embeddings, self.embedding_dim, self.padding_idx = num_embeddings, embedding_dim, padding_idx
        self.weight = nn.Parameter(torch.empty(num_embeddings, embedding_dim))
        nn.init.normal_(self.weight)

    @property
    def replicated(self) -> bool:
        """Return whether every rank stores all rows, because one would be left with none."""
        return leaves_none(self.num_embeddings, self.ranks)

    def placements(self) -> dict[str, tuple[Placement, Placement]]:
        return {"weight": (Replicate(), Partial()) if self.replicated else (Shard(0), Shard(0))}

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        weight = self.local("weight")
        assert weight is not None
        if self.ranks == 1:
            return F.embedding(ids, weight, self.padding_idx)
        rows = own_rows(self.num_embeddings, self.ranks, self.rank)
        if self.replicated:
            weight = weight[rows]
        local = ids - rows.start
        here = (local >= 0) & (local < weight.shape[0])
        # A rank that has no rows looks up a row of zeros, so that its weight still gets a gradient.
        table = weight if weight.shape[0] > 0 else F.pad(weight, (0, 0, 0, 1))
        padding = None if self.padding_idx is None else self.padding_idx - rows.start
        if padding is not None and not 0 <= padding < weight.shape[0]:
            padding = None
        y = F.embedding(local.clamp(0, table.shape[0] - 1), table, padding)
        y = torch.where(here.unsqueeze(-1), y, torch.zeros_like(y))
        if self.sequence_parallel:
            return parallel.reduce_scatter_to_sequence(y, self.group)
        return parallel.reduce_from_group(y, self.group)

    def head_weight(self) -> torch.Tensor:
        """Return the rows [V_local, E] of which this rank computes logits."""
        weight = self.local("weight")
        assert weight is not None
        return weight[own_rows(self.num_embeddings, self.ranks, self.rank)] if self.replicated else weight

    def logits(self, x: torch.Tensor, backend: str = "auto") -> torch.Tensor:
        """Return x W^T [B, S, V_local] with this rank's rows; x [B, S, E], or its part under sequence parallel."""
        return parallel.column_parallel_linear(
            x, self.head_weight(), group=self.group, sequence_parallel=self.sequence_parallel, backend=backend
        )


class RMSNorm(TensorParallelModule):
    """torch's RMS norm, whose weight every rank of tp holds whole.

    Under sequence parallel a rank norms its own part of the sequence, so its gradient of the weight is one term of a
    sum over tp; otherwise every rank computes the whole gradient.
    """

    def __init__(self, features: int, *, eps: float = 1e-6) -> None:
        super().__init__()
        self.features, self.eps = features, eps
        self.weight = nn.Parameter(torch.ones(features))

    def placements(self) -> dict[str, tuple[Placement, Placement]]:
        return {"weight": (Replicate(), Partial() if self.sequence_parallel else Replicate())}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(x, (self.features,), self.local("weight"), self.eps)


def own_part(whole: torch.Tensor, mesh: DeviceMesh, placement: Placement, device: torch.device) -> DTensor:
    """Return ``whole``, the same on every rank, as a DTensor on the one-dimensional ``mesh``, without communication.

    A rank cuts its part where ``whole`` is and moves the part alone. One that is all of it is not copied, and a tensor
    on meta stays there.
    """
    part = whole
    if isinstance(placement, Shard) and mesh.size() > 1:
        rows = own_rows(whole.shape[placement.dim], mesh.size(), mesh.get_local_rank())
        # A view would keep the whole alive.
        part = whole.narrow(placement.dim, rows.start, rows.stop - rows.start).clone(
            memory_format=torch.contiguous_format
        )
    part = part.contiguous()
    part = to_device(part, device)
    stride = torch.empty(whole.shape, device="meta").stride()
    return DTensor.from_local(part, mesh, [placement], run_check=False, shape=whole.shape, stride=stride)


def to_device(x: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Return ``x`` on ``device``; a tensor on meta stays there."""
    return x if x.is_meta else x.to(device)


def own_rows(rows: int, ranks: int, rank: int) -> slice:
    """Return the rows that ``rank`` computes: ceil(rows / ranks) each, as torch.chunk and Shard(0) cut them.

    The last ranks may get fewer, or none. Nothing is padded: the stored shapes are the true ones, so that a checkpoint
    loads at any tp.
    """
    size = math.ceil(rows / ranks)
    return slice(min(rank * size, rows), min((rank + 1) * size, rows))


def own_slices(own: torch.Tensor) -> tuple[slice, ...]:
    """Return the part of the whole tensor that this rank's part of ``own`` is, one slice a dimension."""
    found = [slice(0, rows) for rows in own.shape]
    if isinstance(own, DTensor):
        place = own.device_mesh.get_coordinate()
        assert place is not None
        # tp has cut first, and fsdp its parts.
        for axis in reversed(range(own.device_mesh.ndim)):
            dim = getattr(own.placements[axis], "dim", None)  # of Shard, and of the class for parts of parts
            if dim is not None:
                start, stop = found[dim].start, found[dim].stop
                rows = own_rows(stop - start, own.device_mesh.size(axis), place[axis])
                found[dim] = slice(start + rows.start, start + rows.stop)
        assert tuple(own.to_local().shape) == tuple(part.stop - part.start for part in found), (own.shape, found)
    return tuple(found)


def leaves_none(rows: int, ranks: int) -> bool:
    """Return whether :func:`own_rows` leaves some rank no row.

    fully_shard takes no empty parameter. Such a weight has at most ranks^2 rows, so every rank stores it whole: each
    computes its own rows, or none, and the gradients (zero outside them) are summed over tp.
    """
    last = own_rows(rows, ranks, ranks - 1)
    return last.start == last.stop


def _initialise_linear(module: nn.Module) -> None:
    for name, parameter in module.named_parameters(recurse=False):
        if name == "bias":
            nn.init.zeros_(parameter)
        else:
            nn.init.kaiming_uniform_(parameter, a=math.sqrt(5))
