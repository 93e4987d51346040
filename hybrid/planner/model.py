"""The planner's description of a model, as data: parameters and how tp splits each, layers, head.

The Transformer describes itself, with the parameters that :func:`weights_of` reads from its modules; :mod:`.published`
describes decoders by their published sizes.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from torch import nn
from torch.distributed.tensor import Placement, Shard

from ..capabilities import EVERYTHING, Capabilities
from ..layout import Layout
from ..pipeline_options import deal_blocks
from ..tensor.modules import ColumnParallelLinear, TensorParallelModule, leaves_none, own_rows


@dataclass(frozen=True)
class Weight:
    """One parameter of the whole model.

    shape: of the whole tensor. split: how tp cuts it: ``rows`` (by :func:`own_rows`), ``columns``, ``heads`` (rows,
    but stored whole where there are fewer heads than ranks), or ``whole``. heads: for ``heads``, how many. is_frozen:
    whether it is not trained, and so has no gradient.
    """

    name: str
    shape: tuple[int, ...]
    split: str = "whole"
    heads: int = 0
    is_frozen: bool = False

    @property
    def numel(self) -> int:
        """Elements of the whole tensor."""
        return math.prod(self.shape)

    def is_replicated(self, tp: int) -> bool:
        """Return whether every rank of tp stores all of it, by the rules of :mod:`fusemesh.hybrid.tensor.modules`."""
        if self.split == "heads":
            return self.heads < tp
        return self.split == "whole" or (self.split == "rows" and leaves_none(self.shape[0], tp))

    def local_shape(self, tp: int = 1, fsdp: int = 1, tp_rank: int = 0, fsdp_rank: int = 0) -> tuple[int, ...]:
        """Return the shape that one rank stores: its part over tp, and of that its part of dim 0 over fsdp."""
        rows, *rest = self.shape
        if not self.is_replicated(tp):
            if self.split == "columns":
                part = own_rows(rest[0], tp, tp_rank)
                rest = [part.stop - part.start]
            else:
                part = own_rows(rows, tp, tp_rank)
                rows = part.stop - part.start
        part = own_rows(rows, fsdp, fsdp_rank)
        return (part.stop - part.start, *rest)

    def local(self, tp: int = 1, fsdp: int = 1, tp_rank: int = 0, fsdp_rank: int = 0) -> int:
        """Elements that one rank stores."""
        return math.prod(self.local_shape(tp, fsdp, tp_rank, fsdp_rank))


def weights_of(module: nn.Module) -> tuple[Weight, ...]:
    """Return the parameters of a model that is on no mesh yet, split as its own modules say; a shared one once.

    Raises:
        ValueError: a parameter of a module that is no :class:`TensorParallelModule`.
    """
    found: dict[int, Weight] = {}
    for path, part in module.named_modules():
        for name, parameter in part.named_parameters(recurse=False):
            if id(parameter) in found:
                continue
            full = f"{path}.{name}" if path else name
            if not isinstance(part, TensorParallelModule):
                raise ValueError(
                    f"model: expected every parameter in a module of fusemesh.hybrid.tensor.modules, received {full} "
                    f"of {type(part).__name__}"
                )
            heads = part.num_heads if isinstance(part, ColumnParallelLinear) else None
            split = "heads" if heads is not None else _split(part.placements()[name][0])
            found[id(parameter)] = Weight(full, tuple(parameter.shape), split, heads or 0, not parameter.requires_grad)
    return tuple(found.values())


def _split(placement: Placement) -> str:
    if not isinstance(placement, Shard):
        return "whole"
    return "rows" if placement.dim == 0 else "columns"


@dataclass(frozen=True)
class Layer:
    """One layer: its parameters, and the tokens that its attention sees.

    weights: their names count from the layer. causal: whether a token sees only those up to itself. window: how many
    tokens back and ahead it sees; None: all. with_memory: whether it has a second attention, over an encoder's output.
    """

    weights: tuple[Weight, ...]
    causal: bool = True
    window: tuple[int, int] | None = None
    with_memory: bool = False

    def visible(self, length: int) -> float:
        """Return the part of ``length`` x ``length`` scores that self-attention computes."""
        if self.window is None:
            # Half where causal tiles are skipped.
            return 0.5 if self.causal else 1.0
        back, ahead = (min(reach, length - 1) for reach in self.window)
        if self.causal:
            ahead = 0
        return (length + sum(reach * length - reach * (reach + 1) / 2 for reach in (back, ahead))) / length**2


@dataclass(frozen=True)
class Outer:
    """A parameter of no layer. layers: numbers of the layers whose stages hold it, each a copy of its own."""

    weight: Weight
    layers: tuple[int, ...]


@dataclass(frozen=True)
class Head:
    """The computation of logits from the last hidden states.

    outputs: logits in a row, which tp splits. of: the rows. ``tokens``: a row for each token, by a linear layer.
    ``texts``: a row for each text, by a linear layer on the mean of its tokens. ``positions``: ``outputs`` rows for
    each text of a logit for each position, by products of the tokens with as many vectors made of the mean of some;
    every rank of tp makes all of these vectors. is_whole: whether tp does not split the head, so that each rank
    computes all of it.
    """

    outputs: int
    of: str = "tokens"
    is_whole: bool = False

    def __post_init__(self) -> None:
        assert self.of in ("tokens", "texts", "positions"), self.of

    @property
    def is_vocabulary(self) -> bool:
        """Return whether the logits are those of tokens, of which the loss never has all at once."""
        return self.of == "tokens" and not self.is_whole

    def own_outputs(self, tp: int) -> int:
        """Return the outputs that the first rank of ``tp`` computes."""
        return self.outputs if self.is_whole else own_rows(self.outputs, tp, 0).stop


@dataclass(frozen=True)
class Share:
    """The part of a model that one rank of a pipeline holds.

    layers: each kind of layer, with its number. weights: those of no layer. is_first, is_last: whether the first, the
    last layer is among them. encoder_ends: whether the encoder's last layer is, behind which its output is normed.
    decoder_starts: whether the first layer with memory is, before which the target is embedded. has_memory: whether any
    layer with memory is. states: hidden states of a sample's tokens that travel to the next stage (of
    the last stage: from the one before).
    """

    layers: tuple[tuple[Layer, int], ...]
    weights: tuple[Weight, ...]
    is_first: bool
    is_last: bool
    encoder_ends: bool
    decoder_starts: bool
    has_memory: bool
    states: int

    @property
    def num_layers(self) -> int:
        """All layers of the rank."""
        return sum(count for _, count in self.layers)

    @property
    def groups(self) -> tuple[tuple[tuple[Weight, ...], int], ...]:
        """Parameters that are gathered together, and how often: a layer's, and those of no layer."""
        return (*((layer.weights, count) for layer, count in self.layers), (self.weights, 1))


@dataclass(frozen=True)
class ModelDescription:
    """A Transformer: a decoder, an encoder, or an encoder and behind it a decoder.

    sequence_length: tokens of a sample in training, unless the job says otherwise; source and target of an
    encoder-decoder have so many each. layers: the encoder's first. outer: the parameters of no layer. gated: whether
    the feed-forward multiplies by a second projection. layer_norm: layer norms with biases; False: RMS norms. rotary:
    whether queries and keys are turned by their positions. capabilities: of the class that is trained. fits: called
    with a layout and virtual stages, raises ValueError where the class's own modules cannot be split so, in the words
    of parallelize; None: the sizes here say all.
    """

    name: str
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int
    sequence_length: int
    layers: tuple[Layer, ...]
    outer: tuple[Outer, ...]
    head: Head
    gated: bool = True
    layer_norm: bool = False
    rotary: bool = True
    capabilities: Capabilities = EVERYTHING
    fits: Callable[[Layout, int], None] | None = dataclasses.field(default=None, compare=False)

    @property
    def num_layers(self) -> int:
        """All layers, of encoder and decoder."""
        return len(self.layers)

    @property
    def memory_at(self) -> int | None:
        """The number of the first layer with memory, before which an encoder ends; None where there is none."""
        return next((number for number, layer in enumerate(self.layers) if layer.with_memory), None)

    @property
    def weights(self) -> tuple[Weight, ...]:
        """Every parameter of the whole model, a shared one once."""
        found = [
            dataclasses.replace(weight, name=f"blocks.{number}.{weight.name}")
            for number, layer in enumerate(self.layers)
            for weight in layer.weights
        ]
        return (*found, *(outer.weight for outer in self.outer))

    @property
    def parameters(self) -> int:
        """Elements of all parameters, a shared one counted once."""
        layers = sum(count * numel(layer.weights) for layer, count in _counted(self.layers))
        return layers + numel(outer.weight for outer in self.outer)

    def share(self, layout: Layout, stage: int, virtual_stages: int = 1) -> Share:
        """Return the part of the ranks of the pipeline's ``stage``: every pp-th of pp * ``virtual_stages`` stages."""
        # Without a pipeline nothing looks at virtual stages.
        stages = layout.pp * virtual_stages if layout.pp > 1 else 1
        spans = deal_blocks(self.num_layers, stages)[stage :: layout.pp]
        at, last = self.memory_at, self.num_layers - 1
        held = {number for span in spans for number in span}
        weights = [outer.weight for span in spans for outer in self.outer if any(n in span for n in outer.layers)]
        return Share(
            layers=_counted(self.layers[number] for number in sorted(held)),
            weights=tuple(weights),
            is_first=0 in held,
            is_last=last in held,
            encoder_ends=at is not None and at - 1 in held,
            decoder_starts=at is not None and at in held,
            has_memory=any(self.layers[number].with_memory for number in held),
            states=max(self._states_at(span.start if last in span else span.stop) for span in spans),
        )

    def distinct_stages(self, layout: Layout) -> list[int]:
        """Return the stages of a pipeline of which one costs most: of equal layers the first two and the last."""
        if len(_counted(self.layers)) > 1:
            return list(range(layout.pp))
        return sorted({0, layout.pp - 1, min(1, layout.pp - 1)})

    def _states_at(self, border: int) -> int:
        """Return how many hidden states go into layer number ``border``: behind an encoder, h and the memory."""
        return 1 if self.memory_at is None or border <= self.memory_at else 2


def numel(weights: Iterable[Weight]) -> int:
    """Return the elements of whole parameters."""
    return sum(weight.numel for weight in weights)


def _counted(layers: Iterable[Layer]) -> tuple[tuple[Layer, int], ...]:
    """Return each kind of layer once, with its number; descriptions share one object for equal layers."""
    found: dict[int, tuple[Layer, int]] = {}
    for layer in layers:
        _, count = found.get(id(layer), (layer, 0))
        found[id(layer)] = layer, count + 1
    return tuple(found.values())
