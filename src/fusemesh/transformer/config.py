"""Sizes and kind of a :class:`fusemesh.Transformer`, each stated once; imports neither torch nor anything heavy.

A field that has a ``doc`` is one that the user's ``[model]`` section states, too: :func:`user_fields` lists them, and
:mod:`fusemesh.config` makes its section of them.
"""

from __future__ import annotations

import dataclasses
import math
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from fusemesh.hybrid.layout import check_heads

ARCHITECTURES = ("decoder", "encoder", "encoder-decoder")
# The architectures that can make each output. How one is computed is a class of heads.py under the same name.
OUTPUTS = {"tokens": ("decoder", "encoder-decoder"), "class": ("encoder",), "span": ("encoder",)}


def _user(text: str, *, least: float | None = None, **default: Any) -> dict[str, Any]:
    """Return the metadata of a field that the user's section states.

    Args:
        text: what the command line says of it.
        least: the smallest legal value.
        default: the section's ``default``, where the Transformer itself has none or another.
    """
    return {"doc": text, "least": least, **default}


@dataclass(frozen=True)
class TransformerConfig:
    """Sizes of a :class:`Transformer`.

    Raises:
        ValueError: a size that is no positive number, or sizes that do not fit together.
    """

    vocab_size: int
    hidden_size: int = field(metadata=_user("width of the residual stream", least=1, default=128))
    num_layers: int = field(metadata=_user("blocks; an encoder-decoder has as many of each kind", least=1, default=4))
    num_heads: int = field(metadata=_user("query heads", least=1, default=4))
    num_kv_heads: int = field(metadata=_user("key and value heads; divides num_heads", least=1, default=2))
    intermediate_size: int = field(metadata=_user("width inside the gated feed-forward", least=1, default=384))
    max_sequence_length: int
    rope_theta: float = field(default=10000.0, metadata=_user("base of the rotary embedding's wavelengths", least=1.0))
    norm_eps: float = field(default=1e-6, metadata=_user("added under the root in RMSNorm", least=1e-12, default=1e-5))
    use_bias: bool = False
    """Whether the linear layers (not the head) have biases."""
    initializer_range: float = field(
        default=0.02, metadata=_user("standard deviation of the initial weights", least=1e-12)
    )
    """Projections onto the residual have it over sqrt(2 * num_layers)."""
    tie_embeddings: bool = field(default=False, metadata=_user("the output layer's weight is the embedding's"))
    """One parameter, ``embedding.weight``, with both gradients. In an encoder-decoder it is
    ``target_embedding.weight``."""
    local_window: int = field(
        default=0, metadata=_user("every other block sees only tokens at most so many away; 0: all see all", least=0)
    )
    """The first block is one of them."""
    architecture: str = "decoder"
    """``decoder`` sees what came before; ``encoder`` sees all of a text; ``encoder-decoder`` has ``num_layers`` of
    each."""
    output: str = "tokens"
    """The prediction: ``tokens`` of the vocabulary; of an encoder the ``class`` of the text, or a ``span`` of it. Each
    is a class of :mod:`fusemesh.transformer.heads`."""
    num_classes: int = 0
    """With ``output="class"``."""

    def __post_init__(self) -> None:
        for name in (
            "vocab_size",
            "hidden_size",
            "num_layers",
            "num_heads",
            "num_kv_heads",
            "intermediate_size",
            "max_sequence_length",
        ):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name}: expected a positive integer, received {value!r}")
        for name in ("rope_theta", "norm_eps", "initializer_range"):
            value = getattr(self, name)
            if not isinstance(value, int | float) or not 0 < value < math.inf:
                raise ValueError(f"{name}: expected a positive number, received {value!r}")
        for name in ("use_bias", "tie_embeddings"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name}: expected True or False, received {getattr(self, name)!r}")
        if not isinstance(self.local_window, int) or self.local_window < 0:
            raise ValueError(f"local_window: expected at least 0, received {self.local_window!r}")
        for name, legal in (("architecture", ARCHITECTURES), ("output", tuple(OUTPUTS))):
            if getattr(self, name) not in legal:
                raise ValueError(f"{name}: expected one of {', '.join(legal)}, received {getattr(self, name)!r}")
        if self.architecture not in OUTPUTS[self.output]:
            legal_output = " or ".join(name for name, makers in OUTPUTS.items() if self.architecture in makers)
            raise ValueError(
                f"output: expected {legal_output} of architecture {self.architecture!r}, received {self.output!r}"
            )
        if self.output == "class" and self.num_classes < 2:
            raise ValueError(f"num_classes: expected at least 2, received {self.num_classes!r}")
        if self.output != "tokens" and self.tie_embeddings:
            raise ValueError(
                f"tie_embeddings: expected False with output {self.output!r}, received True; it has no "
                "weight of the vocabulary's size"
            )
        check_sizes(self)

    @property
    def head_dim(self) -> int:
        """Dimensions of one head."""
        return self.hidden_size // self.num_heads

    def is_causal(self, block: int) -> bool:
        """Return whether a block's self-attention sees only the tokens up to its own."""
        return self.architecture != "encoder" and block >= (self.memory_at or 0)

    def window_of(self, block: int) -> tuple[int, int] | None:
        """Return how many tokens back and ahead a block's self-attention sees; None: all."""
        if not self.local_window or block % 2:
            return None
        return self.local_window, 0 if self.is_causal(block) else self.local_window

    @property
    def num_blocks(self) -> int:
        """Blocks in all: encoder first, then decoder."""
        return self.num_layers * (2 if self.architecture == "encoder-decoder" else 1)

    @property
    def memory_at(self) -> int | None:
        """The block before which the encoder's output becomes the memory; None where there is no decoder behind."""
        return self.num_layers if self.architecture == "encoder-decoder" else None


def check_sizes(sizes: Any, prefix: str = "") -> None:
    """Check that the sizes of a :class:`TransformerConfig`, or of the user's section, fit together.

    Args:
        sizes: has the fields ``hidden_size``, ``num_heads`` and ``num_kv_heads``.
        prefix: stands before their names in the error.

    Raises:
        ValueError: they do not.
    """
    hidden, heads = sizes.hidden_size, sizes.num_heads
    if hidden % (2 * heads) != 0:
        raise ValueError(
            f"{prefix}hidden_size: expected a multiple of 2 * {prefix}num_heads = {2 * heads} (rotary positions "
            f"turn pairs of a head's dimensions), received {hidden}"
        )
    check_heads(heads, sizes.num_kv_heads, prefix)


def user_fields() -> list[tuple[str, type, Any, Mapping[str, Any]]]:
    """Return name, type, default and metadata of each field that the user's section states."""
    hints = typing.get_type_hints(TransformerConfig)
    return [
        (item.name, hints[item.name], item.metadata.get("default", item.default), item.metadata)
        for item in dataclasses.fields(TransformerConfig)
        if "doc" in item.metadata
    ]
