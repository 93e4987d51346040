"""The outputs of a Transformer, one class each: how the last h becomes logits, and logits become a loss.

Another output is another :class:`Output` in :data:`OUTPUTS`, and its name in the table of the configuration. Shapes: B
batch, S sequence, T target sequence, E hidden size, V vocabulary, C classes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import Partial, Placement, Replicate

from fusemesh.hybrid.planner.model import Head
from fusemesh.hybrid.tensor.modules import (
    ColumnParallelLinear,
    TensorParallelModule,
    VocabParallelEmbedding,
    own_rows,
)
from fusemesh.kernels.matmul import parallel
from fusemesh.kernels.vocab_loss.api import vocab_parallel_cross_entropy
from fusemesh.kernels.vocab_loss.linear import fused_linear_cross_entropy

from .config import TransformerConfig

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Place:
    """This process's place on the tp axis.

    group: of tp; None in one process. ranks, rank: its size and this process's number. parts: into how many parts the
    sequence is split between the matmuls: ``ranks`` under sequence parallel, else 1.
    """

    group: dist.ProcessGroup | None
    ranks: int
    rank: int
    parts: int


class Output:
    """One kind of prediction.

    inputs: names of inputs of a sample that it reads, besides ``lengths``.
    generates: whether its logits are of the next token.
    """

    inputs: tuple[str, ...] = ()
    generates = False

    def head(self, config: TransformerConfig, backend: str) -> nn.Module | None:
        """Return the module with the parameters of this output; None where the embedding has them."""
        raise NotImplementedError

    def planned(self, config: TransformerConfig) -> Head:
        """Return the sizes of the head, for the planner."""
        raise NotImplementedError

    def logits(
        self,
        head: Callable[..., torch.Tensor],
        h: torch.Tensor,
        place: Place,
        inputs: Mapping[str, torch.Tensor],
    ) -> torch.Tensor:
        """Return this rank's logits.

        Args:
            head: the module of :meth:`head`, or the embedding's product where there is none.
            h: [B, S, E] after the last norm, or [B, S / tp, E] under sequence parallel.
            place: of this rank.
            inputs: of the samples, by name.
        """
        raise NotImplementedError

    def shape(self, config: TransformerConfig, place: Place, batch: Mapping[str, Shape]) -> Shape:
        """Return the shape of :meth:`logits` for a batch of tensors of these shapes."""
        raise NotImplementedError

    def summed_loss(
        self,
        config: TransformerConfig,
        place: Place,
        head: Any,
        h: torch.Tensor,
        inputs: Mapping[str, torch.Tensor],
        targets: torch.Tensor,
    ) -> torch.Tensor:
        """Return the loss summed over ``targets``, equal on every rank of tp; the others as for :meth:`logits`."""
        logits = self.logits(head, h, place, inputs)
        start = self._start(config, place)
        return vocab_parallel_cross_entropy(logits, targets, vocab_start=start, group=place.group).sum()

    def _start(self, config: TransformerConfig, place: Place) -> int:
        """Return the number of this rank's first logit."""
        return own_rows(self._total(config), place.ranks, place.rank).start

    def whole(self, config: TransformerConfig, place: Place, logits: torch.Tensor) -> torch.Tensor:
        """Return the logits of all ranks of tp, joined along the last dimension."""
        return _joined(logits, place, self._total(config))

    def _total(self, config: TransformerConfig) -> int:
        """Return the number of logits in a row, of which each rank of tp has a part."""
        raise NotImplementedError


class Tokens(Output):
    """The next token: logits [B, S, V / tp], or [B, T, V / tp] of an encoder-decoder."""

    generates = True

    def head(self, config: TransformerConfig, backend: str) -> nn.Module | None:
        if config.tie_embeddings:
            return None
        return ColumnParallelLinear(config.hidden_size, config.vocab_size, backend=backend)

    def planned(self, config: TransformerConfig) -> Head:
        return Head(config.vocab_size)

    def logits(
        self,
        head: Callable[..., torch.Tensor],
        h: torch.Tensor,
        place: Place,
        inputs: Mapping[str, torch.Tensor],
    ) -> torch.Tensor:
        return head(h)

    def summed_loss(
        self,
        config: TransformerConfig,
        place: Place,
        head: Any,
        h: torch.Tensor,
        inputs: Mapping[str, torch.Tensor],
        targets: torch.Tensor,
    ) -> torch.Tensor:
        # The logits, the largest tensor by far, are never whole.
        h, weight = head.enter_group(h), head.local("weight")
        start = self._start(config, place)
        return fused_linear_cross_entropy(h, weight, targets, vocab_start=start, group=place.group).sum()

    def shape(self, config: TransformerConfig, place: Place, batch: Mapping[str, Shape]) -> Shape:
        rows, length = batch["tokens" if config.memory_at is None else "target_tokens"]
        return rows, length, _own(config.vocab_size, place)

    def _total(self, config: TransformerConfig) -> int:
        return config.vocab_size


class Class(Output):
    """The class of a text: logits [B, 1, C / tp]."""

    def head(self, config: TransformerConfig, backend: str) -> nn.Module:
        return ClassHead(config.hidden_size, config.num_classes, backend)

    def planned(self, config: TransformerConfig) -> Head:
        return Head(config.num_classes, of="texts")

    def logits(
        self,
        head: Callable[..., torch.Tensor],
        h: torch.Tensor,
        place: Place,
        inputs: Mapping[str, torch.Tensor],
    ) -> torch.Tensor:
        return head(h, _real(h, place, inputs.get("lengths")))

    def shape(self, config: TransformerConfig, place: Place, batch: Mapping[str, Shape]) -> Shape:
        return batch["tokens"][0], 1, _own(config.num_classes, place)

    def _total(self, config: TransformerConfig) -> int:
        return config.num_classes


class Span(Output):
    """The first and the last token of a span of the text: logits [B, 2, S], or [B, 2, S / tp] under sequence parallel.

    ``span_starts``, int64 [B], is the first position at which a span may start; what stands before it is the question.
    """

    inputs = ("span_starts",)

    def head(self, config: TransformerConfig, backend: str) -> nn.Module:
        return SpanHead(config.hidden_size)

    def planned(self, config: TransformerConfig) -> Head:
        return Head(2, of="positions")

    def logits(
        self,
        head: Callable[..., torch.Tensor],
        h: torch.Tensor,
        place: Place,
        inputs: Mapping[str, torch.Tensor],
    ) -> torch.Tensor:
        allowed = question = _real(h, place, inputs.get("lengths"))
        starts = inputs.get("span_starts")
        if starts is not None:
            question = torch.arange(allowed.shape[1], device=h.device) < starts[:, None]
            allowed = allowed & ~question
        return head(h, allowed, question)

    def shape(self, config: TransformerConfig, place: Place, batch: Mapping[str, Shape]) -> Shape:
        rows, length = batch["tokens"]
        return rows, 2, length // place.parts

    def summed_loss(
        self,
        config: TransformerConfig,
        place: Place,
        head: Any,
        h: torch.Tensor,
        inputs: Mapping[str, torch.Tensor],
        targets: torch.Tensor,
    ) -> torch.Tensor:
        logits = self.logits(head, h, place, inputs)
        # The classes are positions: split over tp under sequence parallel, else whole on every rank.
        is_split = place.parts > 1
        start = place.rank * logits.shape[-1] if is_split else 0
        group = place.group if is_split else None
        return vocab_parallel_cross_entropy(logits, targets, vocab_start=start, group=group).sum()

    def whole(self, config: TransformerConfig, place: Place, logits: torch.Tensor) -> torch.Tensor:
        return logits if place.parts == 1 else _joined(logits, place, logits.shape[-1] * place.ranks)


OUTPUTS: Mapping[str, Output] = {"tokens": Tokens(), "class": Class(), "span": Span()}


class TiedHead:
    """The table of tied embeddings as the head of tokens."""

    def __init__(self, table: VocabParallelEmbedding, backend: str) -> None:
        self.table, self.backend = table, backend

    def __call__(self, h: torch.Tensor) -> torch.Tensor:
        """Return this rank's logits [B, S, V / tp]."""
        return self.table.logits(h, self.backend)

    def enter_group(self, h: torch.Tensor) -> torch.Tensor:
        """See :meth:`ColumnParallelLinear.enter_group`."""
        return self.table.enter_group(h)

    def local(self, name: str) -> torch.Tensor | None:
        """Return this rank's rows of the weight."""
        return self.table.head_weight()


class ClassHead(nn.Module):
    """Logits [B, 1, C / tp] of a text's class: a linear layer on the mean of its tokens.

    Args:
        hidden_size, num_classes: E and C.
        backend: of the linear layer.
    """

    def __init__(self, hidden_size: int, num_classes: int, backend: str) -> None:
        super().__init__()
        self.linear = ColumnParallelLinear(hidden_size, num_classes, bias=True, enter=False, backend=backend)

    def forward(self, h: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
        """h [B, S, E], or [B, S / tp, E] under sequence parallel; real: bool [B, S], False for padding."""
        mean = _mean(h, real, self.linear)
        # [B, 1, E], equal on every rank, into the ranks' different classes
        return self.linear(parallel.copy_to_group(mean.unsqueeze(1), self.linear.group))


class SpanHead(TensorParallelModule):
    """Logits [B, 2, S] of where a span starts and ends; [B, 2, S / tp] under sequence parallel. -inf: not a place.

    The mean of the question's tokens, through a matrix each, is what starts and ends are compared with, by a product
    (pointer networks, Vinyals et al., 2015). Every rank of tp holds the whole weight [2 E, E]. With sequence parallel a
    rank scores its own positions, so its gradient is one term of a sum; otherwise every rank computes the whole.
    """

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(2 * hidden_size, hidden_size))
        nn.init.normal_(self.weight, std=0.02)

    def placements(self) -> dict[str, tuple[Placement, Placement]]:
        return {"weight": (Replicate(), Partial() if self.sequence_parallel else Replicate())}

    def forward(self, h: torch.Tensor, allowed: torch.Tensor, question: torch.Tensor) -> torch.Tensor:
        """h [B, S, E], or [B, S / tp, E]; bool [B, S]: where a span may start and end, and which tokens ask for it."""
        weight = self.local("weight")
        assert weight is not None
        asked = _mean(h, question, self)
        if self.sequence_parallel:
            # Each rank compares other positions with it.
            asked = parallel.copy_to_group(asked, self.group)
        # [B, 2, E]
        wanted = (asked @ weight.t()).view(len(h), 2, -1) / math.sqrt(h.shape[-1])
        return (wanted @ h.transpose(1, 2)).masked_fill(~_own_part(allowed, self).unsqueeze(1), float("-inf"))


def _own(total: int, place: Place) -> int:
    """Return how many of ``total`` logits a rank computes."""
    rows = own_rows(total, place.ranks, place.rank)
    return rows.stop - rows.start


def _joined(logits: torch.Tensor, place: Place, total: int) -> torch.Tensor:
    """Return ``total`` logits, of which each rank has as many, or the last ones fewer."""
    if place.group is None or place.ranks == 1:
        return logits
    most = math.ceil(total / place.ranks)
    padded = nn.functional.pad(logits, (0, most - logits.shape[-1]))
    return parallel.all_gather(padded, place.group, padded.dim() - 1)[..., :total]


def _real(h: torch.Tensor, place: Place, lengths: torch.Tensor | None) -> torch.Tensor:
    """Return bool [B, S]: True for a text's tokens, False for padding."""
    length = h.shape[1] * place.parts
    if lengths is None:
        return h.new_ones((h.shape[0], length), dtype=torch.bool)
    return torch.arange(length, device=lengths.device) < lengths[:, None]


def _own_part(where: torch.Tensor, module: TensorParallelModule) -> torch.Tensor:
    """Return this rank's part of bool [B, S]."""
    if module.sequence_parallel and module.group is not None:
        return parallel.own_part(where, module.group, 1)
    return where


def _mean(h: torch.Tensor, where: torch.Tensor, module: TensorParallelModule) -> torch.Tensor:
    """Return the mean [B, E], equal on every rank, of h over the tokens of bool [B, S]."""
    total = torch.einsum("bse,bs->be", h, _own_part(where, module).to(h.dtype))
    if module.sequence_parallel:
        total = parallel.reduce_from_group(total, module.group)
    return total / where.sum(1, keepdim=True).clamp(min=1)
