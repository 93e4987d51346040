"""Sizes and kind of a :class:`fusemesh.Transformer`."""

from __future__ import annotations

import math
from dataclasses import dataclass

ARCHITECTURES = ("decoder", "encoder", "encoder-decoder")
OUTPUTS = ("tokens", "class", "span")


@dataclass(frozen=True)
class TransformerConfig:
    """Sizes of a :class:`Transformer`.

    Raises:
        ValueError: a size that is no positive number, or sizes that do not fit together.
    """

    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    intermediate_size: int
    max_sequence_length: int
    rope_theta: float = 10000.0
    norm_eps: float = 1e-6
    use_bias: bool = False
    """Whether the linear layers (not the head) have biases."""
    initializer_range: float = 0.02
    """Standard deviation of the initial weights; projections onto the residual have it over sqrt(2 * num_layers)."""
    tie_embeddings: bool = False
    """Whether the head's weight is the embedding's: one parameter, ``embedding.weight``, with both gradients. In an
    encoder-decoder it is ``target_embedding.weight``."""
    local_window: int = 0
    """Every other block, the first among them, sees only tokens at most so many away; 0: all blocks see all."""
    architecture: str = "decoder"
    """``decoder`` sees what came before; ``encoder`` sees all of a text; ``encoder-decoder`` has ``num_layers`` of
    each."""
    output: str = "tokens"
    """What is predicted: ``tokens`` of the vocabulary; of an encoder the ``class`` of the text, or a ``span`` of it."""
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
        for name, legal in (("architecture", ARCHITECTURES), ("output", OUTPUTS)):
            if getattr(self, name) not in legal:
                raise ValueError(f"{name}: expected one of {', '.join(legal)}, received {getattr(self, name)!r}")
        if (self.architecture == "encoder") == (self.output == "tokens"):
            legal_output = "class or span" if self.architecture == "encoder" else "tokens"
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
        if self.hidden_size % (2 * self.num_heads) != 0:
            raise ValueError(
                f"hidden_size: expected a multiple of 2 * num_heads = {2 * self.num_heads}, because rotary positions "
                f"turn pairs of a head's dimensions, received {self.hidden_size}"
            )
        if self.num_heads % self.num_kv_heads != 0:
            raise ValueError(
                f"num_kv_heads: expected a divisor of num_heads = {self.num_heads}, received {self.num_kv_heads}"
            )

    @property
    def head_dim(self) -> int:
        """Dimensions of one head."""
        return self.hidden_size // self.num_heads

    def window_of(self, block: int) -> tuple[int, int] | None:
        """How far back and ahead a block's self-attention sees; None: all the way."""
        if not self.local_window or block % 2:
            return None
        is_causal = self.architecture == "decoder" or block >= (self.memory_at or self.num_blocks)
        return self.local_window, 0 if is_causal else self.local_window

    @property
    def num_blocks(self) -> int:
        """Blocks in all: encoder first, then decoder."""
        return self.num_layers * (2 if self.architecture == "encoder-decoder" else 1)

    @property
    def memory_at(self) -> int | None:
        """The block before which the encoder's output becomes the memory; None where there is no decoder behind."""
        return self.num_layers if self.architecture == "encoder-decoder" else None
