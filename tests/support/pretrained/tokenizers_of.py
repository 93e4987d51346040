"""Tokenizers of the kinds that question answering meets, trained or made on the spot, and folders with them."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers

from .folders import make_model

_SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]


def word_pieces(texts: Iterable[str], size: int = 200) -> Any:
    """Return BERT's tokenizer, which lowers case and strips accents, with word pieces trained on texts."""
    trained = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    trained.normalizer = normalizers.BertNormalizer()
    trained.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    trained.train_from_iterator(texts, trainers.WordPieceTrainer(vocab_size=size, special_tokens=_SPECIAL))
    return transformers.BertTokenizer(vocab=trained.get_vocab())


def characters(texts: Iterable[str]) -> Any:
    """Return BERT's tokenizer as bert-base-chinese has it: a vocabulary of characters."""
    letters = sorted(set("".join(texts)) - set(" "))
    return transformers.BertTokenizer(vocab={token: number for number, token in enumerate([*_SPECIAL, *letters])})


def byte_pairs(texts: Iterable[str], size: int = 300, *, trim_offsets: bool = True) -> Any:
    """Return RoBERTa's tokenizer, of bytes, whose words begin with their blanks.

    Args:
        trim_offsets: whether offsets leave these out.
    """
    trained = Tokenizer(models.BPE(unk_token=None))
    trained.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=["<s>", "<pad>", "</s>", "<unk>", "<mask>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    trained.train_from_iterator(texts, trainer)
    model = json.loads(trained.to_str())["model"]
    return transformers.RobertaTokenizer(
        vocab=model["vocab"], merges=[tuple(pair) for pair in model["merges"]], trim_offsets=trim_offsets
    )


def save_folder(
    path: Path, family: str, kind: str, tokenizer: Any, *, dtype: torch.dtype = torch.float32, **changed: Any
) -> Path:
    """Save a random model of a family with as many tokens as a tokenizer has, and that; return the folder."""
    changed = {"vocab_size": len(tokenizer), "max_position_embeddings": 514, **changed}
    make_model(family, kind, **changed).to(dtype).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path
