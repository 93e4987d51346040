"""Question answering by transformers alone; tokenizers of the kinds that it meets, made on the spot, and folders."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers

from fusemesh.config import Config
from fusemesh.run.settings import load_config

from .training import build

_SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]


def word_pieces(texts: Iterable[str]) -> Any:
    """Return BERT's tokenizer, which lowers case and strips accents, with some words of texts whole and others in
    pieces."""
    normal, parts = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    words = sorted({word for text in texts for word, _ in parts.pre_tokenize_str(normal.normalize_str(text))})
    letters = sorted(set("".join(words)))
    pieces = {*letters, *(f"##{letter}" for letter in letters)}
    pieces |= {word if number % 3 else f"##{word[-3:]}" for number, word in enumerate(words)}
    return transformers.BertTokenizer(vocab={token: n for n, token in enumerate([*_SPECIAL, *sorted(pieces)])})


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
    # RoBERTa counts positions from behind the padding's number.
    most = 514 if family == "roberta" else 512
    own = {"vocab_size": len(tokenizer), "max_position_embeddings": most, "pad_token_id": tokenizer.pad_token_id}
    build(family, kind, dtype, **own, **changed).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def configured(folder: Path, records: Path, **given: str) -> Config:
    """The configuration of a run on records; ``data__held_out="b.jsonl"`` gives ``data.held_out``."""
    dotted = {key.replace("__", "."): value for key, value in given.items()}
    own = {"task": "question_answering", "model.pretrained": str(folder), "data.path": str(records)}
    return load_config(None, {**own, "run.device": "cpu", **dotted})


def best_answer(
    logits_of: Callable[..., torch.Tensor],
    tokenizer: Any,
    question: str,
    passage: str,
    length: int,
    shared: int,
    most: int = 30,
) -> tuple[str, float]:
    """The answer by transformers' own windows and offsets, all spans of all windows one by one, and its probability.

    Args:
        logits_of: a window's tokens to [2, S]; with ``token_type_ids`` as its second argument where there are some.
        shared: tokens that neighbouring windows have both.
        most: tokens of an answer.
    """
    rows = tokenizer(
        question,
        passage,
        truncation="only_second",
        max_length=length,
        stride=shared,
        return_overflowing_tokens=True,
        return_offsets_mapping=True,
    )
    spans: list[tuple[float, str]] = []
    for number, ids in enumerate(rows["input_ids"]):
        types = [rows["token_type_ids"][number]] if "token_type_ids" in rows else []
        starts, ends = logits_of(ids, *types).double().tolist()
        own = [at for at, text in enumerate(rows.sequence_ids(number)) if text == 1]
        places = rows["offset_mapping"][number]
        for first in own:
            for last in own[own.index(first) :][:most]:
                spans.append((starts[first] + ends[last], passage[places[first][0] : places[last][1]].strip()))
    scores = torch.tensor([score for score, _ in spans], dtype=torch.float64)
    best = max(range(len(spans)), key=lambda number: spans[number][0])
    return spans[best][1], float(scores.softmax(0)[best])
