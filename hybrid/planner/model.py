"""What the planner knows of a model: its sizes, its weights, and how tensor parallelism splits each of them.

Sizes: L layers, E hidden size, H heads, Hkv key/value heads, D head dim, F width of the feed-forward, V vocabulary.
A model comes from numbers, from a Hugging Face ``config.json``, or by a name of ``models.json``.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, fields
from importlib import resources
from pathlib import Path
from typing import Any

from ..tensor.modules import leaves_none, own_rows


@dataclass(frozen=True)
class Weight:
    """One parameter of the whole model.

    shape: of the whole tensor. split: how tp cuts it: ``rows`` (by :func:`own_rows`), ``columns``, ``heads`` (rows,
    but stored whole where there are fewer heads than ranks), or ``whole``. heads: for ``heads``, how many.
    """

    name: str
    shape: tuple[int, ...]
    split: str = "whole"
    heads: int = 0

    @property
    def numel(self) -> int:
        """Elements of the whole tensor."""
        return math.prod(self.shape)

    def is_replicated(self, tp: int) -> bool:
        """Whether every rank of tp stores all of it, by the rules of :mod:`fusemesh.hybrid.tensor.modules`."""
        if self.split == "heads":
            return self.heads < tp
        return self.split == "whole" or (self.split == "rows" and leaves_none(self.shape[0], tp))

    def local_shape(self, tp: int = 1, fsdp: int = 1, tp_rank: int = 0, fsdp_rank: int = 0) -> tuple[int, ...]:
        """What one rank stores: its part over tp, and of that its part of dim 0 over fsdp."""
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


@dataclass(frozen=True)
class Model:
    """Sizes of a decoder-only Transformer.

    gated: whether the feed-forward multiplies by a second projection (three matrices instead of two). tied: whether
    the head is the embedding. bias: of every linear layer but the head; qkv_bias: of query, key and value alone.
    layer_norm: layer norms with biases; False: RMS norms. learned_positions: rows of a position table; 0: rotary.
    sequence_length: tokens a sample, what it was trained with unless the job says otherwise.

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
    layer_norm: bool = False
    learned_positions: int = 0

    def __post_init__(self) -> None:
        for item in fields(self):
            value = getattr(self, item.name)
            if item.type == "int" and item.name != "learned_positions" and (type(value) is not int or value < 1):
                raise ValueError(f"{item.name}: expected a positive integer in model {self.name!r}, received {value!r}")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_kv_heads: expected a divisor of num_heads = {self.num_heads} in model {self.name!r}, received "
                f"{self.num_kv_heads}"
            )

    @property
    def parameters(self) -> int:
        """Elements of all weights, a tied one counted once."""
        block = sum(w.numel for w in self.block_weights())
        return self.num_layers * block + sum(w.numel for w in (*self.first_weights(), *self.last_weights()))

    def block_weights(self) -> tuple[Weight, ...]:
        """The parameters of one layer."""
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
        if self.bias:
            found += [
                Weight("attention.output.bias", (hidden,)),
                Weight("mlp.gate.bias", (wide,), "rows"),
                Weight("mlp.down.bias", (hidden,)),
            ]
        return tuple(found)

    def first_weights(self) -> tuple[Weight, ...]:
        """The parameters before the layers."""
        found = [Weight("embedding.weight", (self.vocab_size, self.hidden_size), "rows")]
        if self.learned_positions:
            found.append(Weight("positions.weight", (self.learned_positions, self.hidden_size)))
        return tuple(found)

    def last_weights(self, *, with_tied: bool = False) -> tuple[Weight, ...]:
        """The parameters after the layers; ``with_tied`` adds a tied head's own copy, which a last stage holds."""
        head = (Weight("head.weight", (self.vocab_size, self.hidden_size), "rows"),)
        return (*self._norm("norm"), *(head if with_tied or not self.tied else ()))

    def _norm(self, name: str) -> tuple[Weight, ...]:
        weight = Weight(f"{name}.weight", (self.hidden_size,))
        return (weight, Weight(f"{name}.bias", (self.hidden_size,))) if self.layer_norm else (weight,)


def named_models() -> dict[str, dict[str, Any]]:
    """Every entry of ``models.json``: sizes, ``parameters`` as published, and the ``source`` of both."""
    text = resources.files(__package__).joinpath("models.json").read_text(encoding="utf-8")
    table: dict[str, dict[str, Any]] = json.loads(text)
    return table


def find_model(name: str) -> Model:
    """A model by its name in ``models.json``, or from a Hugging Face config: the file or the folder that holds it.

    Raises:
        ValueError: neither, or a config of a family that is not known here.
    """
    known = named_models()
    if name.lower() in known:
        entry = known[name.lower()]
        names = {item.name for item in fields(Model)}
        return Model(name=name.lower(), **{key: value for key, value in entry.items() if key in names})
    path = Path(name)
    path = path / "config.json" if path.is_dir() else path
    if not path.is_file():
        raise ValueError(
            f"--model: expected one of {', '.join(known)}, or the path of a Hugging Face config.json, received {name!r}"
        )
    return from_hugging_face(path)


# model_type: whether query, key and value have biases unless the config says so.
_LLAMA_LIKE = {"llama": False, "mistral": False, "qwen2": True}


def from_hugging_face(path: str | os.PathLike[str]) -> Model:
    """The model of a Hugging Face ``config.json`` of the families llama, mistral, qwen2 and gpt2.

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
        if family in _LLAMA_LIKE:
            return _llama(name, config, _LLAMA_LIKE[family])
    except KeyError as error:
        raise ValueError(
            f"--model: {str(path)!r} has no key {error.args[0]!r}, which a {family} config needs"
        ) from None
    raise ValueError(
        f"--model: expected a config of model_type {', '.join((*_LLAMA_LIKE, 'gpt2'))}, received {family!r} in "
        f"{str(path)!r}"
    )


def _llama(name: str, config: Mapping[str, Any], qkv_bias: bool) -> Model:
    heads = config["num_attention_heads"]
    return Model(
        name=name,
        num_layers=config["num_hidden_layers"],
        hidden_size=config["hidden_size"],
        num_heads=heads,
        num_kv_heads=config.get("num_key_value_heads") or heads,
        head_dim=config.get("head_dim") or config["hidden_size"] // heads,
        intermediate_size=config["intermediate_size"],
        vocab_size=config["vocab_size"],
        sequence_length=config["max_position_embeddings"],
        tied=config.get("tie_word_embeddings", False),
        qkv_bias=config.get("attention_bias", qkv_bias),
    )


def _gpt2(name: str, config: Mapping[str, Any]) -> Model:
    hidden, heads = config["n_embd"], config["n_head"]
    return Model(
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
    )
