"""Where a Hugging Face model has its blocks, and what acts before, between and behind them: one line for each family.

A further family is a further line of :data:`ANATOMIES`: its stacks of blocks, each with what acts on embeddings, which
the first stage alone must do, and with what acts behind the last block.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from ..dropout_calls import OWN_CALLS
from .stand_ins import BiasAlone, BiasedSame, Embedded, Same, Zero, replaced

StandIn = Callable[[], nn.Module | None]


def _nothing() -> None:
    return None


def _same(block: nn.Module, index: int) -> nn.Module:
    return Same()


def _biased(block: nn.Module, index: int) -> nn.Module:
    return BiasAlone(block) if index == 0 else BiasedSame()


@dataclass(frozen=True)
class Stack:
    """A list of blocks, and the modules around it, by their names within the module whose forward runs it.

    Args:
        blocks: name of the list.
        entry: modules that make the first block's input, and what stands in their places in later stages.
        exit: modules behind the last block, and what stands in their places in earlier stages.
        constants: attributes of the module that act on the first block's input, and their values in later stages.
        absent: makes what stands in the place of a block of another stage, from the block and its index.
        both_ends: name of a dropout that is called before the first block, and again behind the last.
    """

    blocks: str
    entry: Mapping[str, StandIn]
    exit: Mapping[str, StandIn] = field(default_factory=dict)
    constants: Mapping[str, Any] = field(default_factory=dict)
    absent: Callable[[nn.Module, int], nn.Module] = _same
    both_ends: str = ""

    def part(self, module: nn.Module, span: range) -> nn.Module:
        """Return ``module`` with the blocks of ``span`` alone, and with its entry and exit if these blocks are ends."""
        blocks = module.get_submodule(self.blocks)
        assert isinstance(blocks, nn.ModuleList)
        first, last = span.start == 0, span.stop == len(blocks)
        others: dict[str, nn.Module | None] = {
            f"{self.blocks}.{index}": self.absent(block, index)
            for index, block in enumerate(blocks)
            if index not in span
        }
        for is_here, ends in ((first, self.entry), (last, self.exit)):
            if not is_here:
                others |= {name: made() for name, made in ends.items() if _has(module, name)}
        if self.both_ends and not (first and last):
            dropout = module.get_submodule(self.both_ends)
            own = {OWN_CALLS: frozenset([0] * first + [1] * last)}
            others[self.both_ends] = replaced(dropout, {}, own)
        return replaced(module, others, {} if first else dict(self.constants))


@dataclass(frozen=True)
class Anatomy:
    """A family's models.

    Args:
        stacks: by the names of their modules within the base model; "" is the base model itself.
        segments: whether it takes token types.
        positions: whether it has a table of positions, beyond which a text cannot go.
        first_position: number of that table's rows before the first position's; None: after the padding id's.
        pools: "last": a text's class is read off its last token; "end": off its last end-of-text token; "first": its
            own forward pools.
    """

    stacks: Mapping[str, Stack]
    segments: bool = False
    positions: bool = False
    first_position: int | None = 0
    pools: str = "first"

    @property
    def is_pair(self) -> bool:
        """Return whether it is an encoder and a decoder."""
        return len(self.stacks) > 1


_DECODER = Anatomy({"": Stack("layers", {"embed_tokens": _nothing}, {"norm": Same})}, pools="last")
_GPT2 = Anatomy(
    {"": Stack("h", {"wte": _nothing, "wpe": Zero, "drop": Same}, {"ln_f": Same})}, positions=True, pools="last"
)
_BERT = Stack("encoder.layer", {"embeddings": Embedded}, {"pooler": _nothing})
_T5 = Stack("block", {"embed_tokens": _nothing}, {"final_layer_norm": Same}, absent=_biased, both_ends="dropout")
_BART = Stack(
    "layers",
    {"embed_tokens": _nothing, "embed_positions": Zero, "layernorm_embedding": Same},
    constants={"dropout": 0.0},
)
_MARIAN = Stack(
    "layers", {"embed_tokens": _nothing, "embed_positions": Zero}, constants={"dropout": 0.0, "embed_scale": 1.0}
)

# By the config's model_type.
ANATOMIES: Mapping[str, Anatomy] = {
    **dict.fromkeys(("llama", "qwen2", "qwen3", "mistral", "gemma2", "gemma3_text", "phi3"), _DECODER),
    "gpt2": _GPT2,
    "bert": Anatomy({"": _BERT}, segments=True, positions=True),
    "roberta": Anatomy({"": _BERT}, segments=True, positions=True, first_position=None),
    "distilbert": Anatomy({"": Stack("transformer.layer", {"embeddings": Embedded})}, positions=True),
    "t5": Anatomy({"encoder": _T5, "decoder": _T5}, pools="end"),
    "bart": Anatomy({"encoder": _BART, "decoder": _BART}, positions=True, pools="end"),
    "marian": Anatomy({"encoder": _MARIAN, "decoder": _MARIAN}, positions=True),
}
# The kinds of heads, by the ends of classes' names.
_KINDS = {
    "ForCausalLM": "tokens",
    "LMHeadModel": "tokens",
    "ForConditionalGeneration": "pair",
    "MTModel": "pair",
    "ForSequenceClassification": "class",
    "ForQuestionAnswering": "span",
}


def model_type_of(model: nn.Module) -> str:
    """Return what a Hugging Face model's config calls its family; "" of any other model."""
    found = getattr(getattr(model, "config", None), "model_type", "")
    return found if isinstance(found, str) else ""


def kind_of(model: nn.Module) -> str:
    """Return the kind of the model's head, "tokens", "pair", "class" or "span"; "" where its anatomy is not known."""
    anatomy = ANATOMIES.get(model_type_of(model))
    kind = next((kind for end, kind in _KINDS.items() if type(model).__name__.endswith(end)), "")
    if anatomy is None or (kind == "tokens" and anatomy.is_pair) or (kind == "pair" and not anatomy.is_pair):
        return ""
    return kind


def base_name(model: nn.Module) -> str:
    """Return the name of the base model within ``model``; "" where it is the model itself."""
    prefix = getattr(model, "base_model_prefix", "")
    return prefix if prefix and _has(model, prefix) else ""


def within(*names: str) -> str:
    """Return the name of a module within a module, some of which may be "", the module itself."""
    return ".".join(name for name in names if name)


def _has(module: nn.Module, name: str) -> bool:
    parent, _, last = name.rpartition(".")
    return any(found == last for found, _ in module.get_submodule(parent).named_children())
