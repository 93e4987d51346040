"""Published decoders: by a name of ``models.json``, or from a Hugging Face ``config.json``.

Sizes: L layers, E hidden size, H heads, Hkv key/value heads, D head dim, F width of the feed-forward, V vocabulary.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, fields
from importlib import resources
from pathlib import Path
from typing import Any

from ..capabilities import EVERYTHING, Capabilities
from ..layout import check_heads
from .model import Head, Layer, ModelDescription, Outer, Weight

# A model_type of transformers: what parallelize() can do with its decoder.
FAMILIES = {
    "llama": Capabilities("LlamaForCausalLM", tp=True, pp=True, sequence_parallel=False, family="llama"),
    "mistral": Capabilities("MistralForCausalLM", tp=True, pp=True, sequence_parallel=False, family="mistral"),
    "qwen2": Capabilities("Qwen2ForCausalLM", tp=True, pp=True, sequence_parallel=False, family="qwen2"),
    "gpt2": Capabilities("GPT2LMHeadModel", tp=True, pp=True, sequence_parallel=False, family="gpt2"),
}


@dataclass(frozen=True)
class PublishedDecoder:
    """Sizes of a decoder as its authors state them; :meth:`describe` derives its parameters.

    gated: whether the feed-forward multiplies by a second projection (three matrices instead of two). tied: whether
    the head is the embedding. bias: of every linear layer but the head; qkv_bias: of query, key and value; output_bias:
    of attention's output; mlp_bias: of each matrix of the feed-forward, where ``bias`` has one for the gated two.
    layer_norm: layer norms with biases; False: RMS norms. learned_positions: rows of a position table; 0: rotary.
    sequence_length: tokens a sample that it was trained with. family: of :data:`FAMILIES`, whose class is trained; ""
    is a Transformer of our modules, which every axis can split.

    Raises:
        ValueError: a size that is no positive integer, or heads that key/value heads do not divide.
    """

    name: str
    num_layers: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int
    sequence_length: int
    gated: bool = True
    tied: bool = False
    bias: bool = False
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    layer_norm: bool = False
    learned_positions: int = 0
    family: str = ""

    def __post_init__(self) -> None:
        for item in fields(self):
            value = getattr(self, item.name)
            if item.type == "int" and item.name != "learned_positions" and (type(value) is not int or value < 1):
                raise ValueError(f"{item.name}: expected a positive integer in model {self.name!r}, received {value!r}")
        check_heads(self.num_heads, self.num_kv_heads, of=f" in model {self.name!r}")

    def describe(self) -> ModelDescription:
        """Return the model as the planner sees it."""
        return ModelDescription(
            name=self.name,
            hidden_size=self.hidden_size,
            num_heads=self.num_heads,
            num_kv_heads=self.num_kv_heads,
            head_dim=self.head_dim,
            intermediate_size=self.intermediate_size,
            vocab_size=self.vocab_size,
            sequence_length=self.sequence_length,
            layers=(Layer(self._layer()),) * self.num_layers,
            outer=self._outer(),
            head=Head(self.vocab_size),
            gated=self.gated,
            layer_norm=self.layer_norm,
            rotary=not self.learned_positions,
            capabilities=FAMILIES[self.family] if self.family else EVERYTHING,
        )

    def _layer(self) -> tuple[Weight, ...]:
        """Return the parameters of one layer."""
        hidden, wide, heads, kv = self.hidden_size, self.intermediate_size, self.num_heads, self.num_kv_heads
        query, key = heads * self.head_dim, kv * self.head_dim
        found = [
            *self._norm("attention_norm"),
            Weight("attention.query.weight", (query, hidden), "heads", heads),
            Weight("attention.key.weight", (key, hidden), "heads", kv),
            Weight("attention.value.weight", (key, hidden), "heads", kv),
            Weight("attention.output.weight", (hidden, query), "columns"),
            *self._norm("mlp_norm"),
            Weight("mlp.gate.weight", (wide, hidden), "rows"),
            Weight("mlp.down.weight", (hidden, wide), "columns"),
        ]
        if self.gated:
            found.append(Weight("mlp.gate.weight_up", (wide, hidden), "rows"))
        if self.bias or self.qkv_bias:
            found += [
                Weight("attention.query.bias", (query,), "heads", heads),
                Weight("attention.key.bias", (key,), "heads", kv),
                Weight("attention.value.bias", (key,), "heads", kv),
            ]
        if self.bias or self.output_bias:
            found.append(Weight("attention.output.bias", (hidden,)))
        if self.bias or self.mlp_bias:
            found += [Weight("mlp.gate.bias", (wide,), "rows"), Weight("mlp.down.bias", (hidden,))]
        if self.mlp_bias and self.gated:
            found.append(Weight("mlp.gate.bias_up", (wide,), "rows"))
        return tuple(found)

    def _outer(self) -> tuple[Outer, ...]:
        """Return the parameters of no layer."""
        last, table = self.num_layers - 1, (self.vocab_size, self.hidden_size)
        found = [Outer(Weight("embedding.weight", table, "rows"), (0, last) if self.tied else (0,))]
        if self.learned_positions:
            found.append(Outer(Weight("positions.weight", (self.learned_positions, self.hidden_size)), (0,)))
        found += [Outer(weight, (last,)) for weight in self._norm("norm")]
        if not self.tied:
            found.append(Outer(Weight("head.weight", table, "rows"), (last,)))
        return tuple(found)

    def _norm(self, name: str) -> tuple[Weight, ...]:
        weight = Weight(f"{name}.weight", (self.hidden_size,))
        return (weight, Weight(f"{name}.bias", (self.hidden_size,))) if self.layer_norm else (weight,)


def named_models() -> dict[str, dict[str, Any]]:
    """Return every entry of ``models.json``: sizes, ``parameters`` as published, and the ``source`` of both."""
    text = resources.files(__package__).joinpath("models.json").read_text(encoding="utf-8")
    table: dict[str, dict[str, Any]] = json.loads(text)
    return table


def find_model(name: str) -> ModelDescription:
    """Return a model's description; see :func:`find_decoder`."""
    return find_decoder(name).describe()


def find_decoder(name: str) -> PublishedDecoder:
    """Return the sizes of a decoder by its name in ``models.json``, or in a Hugging Face config or its folder.

    Raises:
        ValueError: neither, or a config of a family that is not known here.
    """
    known = named_models()
    if name.lower() in known:
        entry = known[name.lower()]
        names = {item.name for item in fields(PublishedDecoder)}
        return PublishedDecoder(name=name.lower(), **{key: value for key, value in entry.items() if key in names})
    path = Path(name)
    path = path / "config.json" if path.is_dir() else path
    if not path.is_file():
        raise ValueError(
            f"--model: expected one of {', '.join(known)}, or the path of a Hugging Face config.json, received {name!r}"
        )
    return from_hugging_face(path)


def from_hugging_face(path: str | os.PathLike[str]) -> PublishedDecoder:
    """Return the sizes in a Hugging Face ``config.json`` of the families llama, mistral, qwen2 and gpt2.

    Raises:
        ValueError: the file is no such config, or lacks a key.
    """
    try:
        config = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"--model: expected a Hugging Face config.json, received {str(path)!r}: {error}") from error
    family = config.get("model_type") if isinstance(config, dict) else None
    name = str(config.get("_name_or_path") or Path(path).parent.name) if isinstance(config, dict) else ""
    try:
        if family == "gpt2":
            return _gpt2(name, config)
        if family in FAMILIES:
            return _llama(name, config, family)
    except KeyError as error:
        raise ValueError(
            f"--model: {str(path)!r} has no key {error.args[0]!r}, which a {family} config needs"
        ) from None
    raise ValueError(
        f"--model: expected a config of model_type {', '.join(FAMILIES)}, received {family!r} in {str(path)!r}"
    )


def _llama(name: str, config: Mapping[str, Any], family: str) -> PublishedDecoder:
    heads = config["num_attention_heads"]
    # Where a config says nothing, transformers takes these and not as many as heads.
    kv_heads = config.get("num_key_value_heads", {"mistral": 8, "qwen2": 32}.get(family))
    # Mistral and Qwen2 have the biases that they have, whatever a config says.
    attention_bias = family == "llama" and bool(config.get("attention_bias", False))
    return PublishedDecoder(
        name=name,
        num_layers=config["num_hidden_layers"],
        hidden_size=config["hidden_size"],
        num_heads=heads,
        num_kv_heads=kv_heads or heads,
        head_dim=config.get("head_dim") or config["hidden_size"] // heads,
        intermediate_size=config["intermediate_size"],
        vocab_size=config["vocab_size"],
        sequence_length=config["max_position_embeddings"],
        tied=config.get("tie_word_embeddings", False),
        qkv_bias=attention_bias or family == "qwen2",
        output_bias=attention_bias,
        mlp_bias=family == "llama" and bool(config.get("mlp_bias", False)),
        family=family,
    )


def _gpt2(name: str, config: Mapping[str, Any]) -> PublishedDecoder:
    if config.get("add_cross_attention"):
        raise ValueError(
            "--model: expected a decoder alone, received a gpt2 config with add_cross_attention; leave it out"
        )
    hidden, heads = config["n_embd"], config["n_head"]
    return PublishedDecoder(
        name=name,
        num_layers=config["n_layer"],
        hidden_size=hidden,
        num_heads=heads,
        num_kv_heads=heads,
        head_dim=hidden // heads,
        intermediate_size=config.get("n_inner") or 4 * hidden,
        vocab_size=config["vocab_size"],
        sequence_length=config["n_positions"],
        gated=False,
        tied=config.get("tie_word_embeddings", True),
        bias=True,
        layer_norm=True,
        learned_positions=config["n_positions"],
        family="gpt2",
    )
