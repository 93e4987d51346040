"""Byte-level language modelling on text files, by default the Python standard library's own source.

A corpus is two streams of bytes, for training and held out. Documents go to one or the other as a whole, by a hash of
their relative path, so that no held-out text has a part in training and the split is the same on every rank and in
every run. A sample is a fixed-length window of a stream, known by its global index.
"""

from __future__ import annotations

import codecs
import functools
import gzip
import math
import os
import platform
import sysconfig
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .base import (
    HELD_OUT_ONE_IN,
    IGNORED,
    PAD,
    VOCAB_SIZE,
    Batch,
    Examples,
    Indices,
    Task,
    decode,
    encode,
    hash_of,
    is_held_out,
    padded,
)

if TYPE_CHECKING:
    import torch

    from fusemesh.config import Config
    from fusemesh.transformer import Transformer, TransformerConfig

DEFAULTS: Mapping[str, Any] = {}
SEPARATOR = PAD  # ends every document; NUL does not occur in source text

# Not the library's source: installed packages, compiled files, tests, and text that a program wrote.
_EXCLUDED_FOLDERS = {"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test", "pydoc_data"}
_EXCLUDED_PREFIX = "_sysconfigdata"
_SOURCE_SUFFIX = ".py"


@dataclass(frozen=True)
class Corpus:
    """Two streams of bytes; each document is followed by one separator byte.

    train, held_out: uint8 [bytes]. train_documents, held_out_documents: how many documents each holds.
    source: where the text came from, for reports.
    """

    train: np.ndarray
    held_out: np.ndarray
    train_documents: int
    held_out_documents: int
    source: str


def standard_library() -> Path:
    """Return the folder of the running Python's standard library."""
    return Path(sysconfig.get_paths()["stdlib"])


def _library() -> str:
    """Return the name and the version of the default corpus."""
    return f"Python {platform.python_version()} standard library"


def _documents(root: Path) -> Iterator[tuple[str, bytes]]:
    """Yield (relative path, content) of text files; unreadable, empty and binary ones are left out."""
    if root.is_file():
        # One file has no files to split by: its paragraphs are the documents.
        for number, part in enumerate(root.read_bytes().split(b"\n\n")):
            if part:
                yield f"{root.name}#{number}", part + b"\n\n"
        return
    suffix = _SOURCE_SUFFIX if root == standard_library() else ""
    for folder, folders, files in os.walk(root):
        folders[:] = [name for name in folders if name not in _EXCLUDED_FOLDERS and not name.startswith(".")]
        for name in files:
            if not name.endswith(suffix) or name.startswith((_EXCLUDED_PREFIX, ".")):
                continue
            path = Path(folder, name)
            try:
                content = path.read_bytes()
            except OSError:
                continue
            # A NUL byte marks a binary file, and would be taken for the end of a document.
            if content and b"\0" not in content:
                yield path.relative_to(root).as_posix(), content


def load_corpus(path: str = "") -> Corpus:
    """Read a corpus.

    Args:
        path: a text file, a folder of text files, or "" for the standard library's source.

    Raises:
        ValueError: nothing is there, or it holds too few documents for a held-out part.
    """
    root = Path(path).expanduser().resolve() if path else standard_library()
    if not root.exists():
        raise ValueError(f"data.path: expected a text file or a folder of text files, received {path!r}: not found")
    parts: dict[bool, list[bytes]] = {False: [], True: []}
    # In the order of the hash: the first part of a stream is then a random choice of documents.
    for name, content in sorted(_documents(root), key=lambda document: hash_of(document[0])):
        parts[is_held_out(name)].append(content + bytes([SEPARATOR]))
    if not parts[False] or not parts[True]:
        raise ValueError(
            f"data.path: expected enough documents to hold some out (one in {HELD_OUT_ONE_IN}), received "
            f"{len(parts[False])} to train on and {len(parts[True])} held out in {root}; give more text"
        )
    train, held_out = (np.frombuffer(b"".join(parts[key]), dtype=np.uint8) for key in (False, True))
    source = str(root) if path else _library()
    return Corpus(train, held_out, len(parts[False]), len(parts[True]), source)


class Samples:
    """The windows of a stream: sample i predicts bytes i*S+1 ... (i+1)*S, each from those before it in the window.

    Args:
        stream: uint8 [bytes].
        sequence_length: S, in bytes.

    Raises:
        ValueError: the stream is too short for one sample.
    """

    def __init__(self, stream: np.ndarray, sequence_length: int) -> None:
        self.stream, self.sequence_length = stream, sequence_length
        self.count = (len(stream) - 1) // sequence_length
        if self.count < 1:
            raise ValueError(
                f"data.sequence_length: expected at most {len(stream) - 1}, one less than the bytes of the stream, "
                f"received {sequence_length}; give more text or a smaller data.sequence_length"
            )

    def __len__(self) -> int:
        return self.count

    def targets_in(self, indices: Indices) -> int:
        """Return the number of targets of these samples: every byte of a window counts."""
        return len(indices) * self.sequence_length

    def batch(self, indices: Indices) -> Batch:
        """Return tokens and targets of these samples, each int64 [len(indices), S], sharing no memory."""
        at = np.asarray(indices, dtype=np.int64)[:, None] * self.sequence_length + np.arange(self.sequence_length + 1)
        window = self.stream[at].astype(np.int64)
        return Batch(window[:, :-1].copy(), window[:, 1:].copy())


class LanguageModel(Task):
    """See the module. Without a metric of predictions: the loss says all."""

    continues_texts = True

    def __init__(self, config: Config, metadata: Mapping[str, Any] | None = None) -> None:
        for key in ("columns", "held_out"):
            if getattr(config.data, key):
                raise ValueError(
                    f"data.{key}: expected nothing with task language_model, whose text has no records, received "
                    f"{getattr(config.data, key)!r}"
                )
        super().__init__(config, metadata)

    @staticmethod
    def default_version() -> str:
        return _library()

    @staticmethod
    def files_of(path: str) -> Iterator[tuple[str, bytes]]:
        root = Path(path).expanduser().resolve()
        yield from sorted(_documents(root)) if root.is_dir() else [("", root.read_bytes())]

    @functools.cached_property
    def _corpus(self) -> Corpus:
        return load_corpus(self.config.data.path)

    @property
    def source(self) -> str:
        """Where the text is from."""
        return self._corpus.source

    def read_train(self) -> Samples:
        return Samples(self._corpus.train, self.config.data.sequence_length)

    def read_held_out(self) -> Samples:
        return Samples(self._corpus.held_out, self.config.data.sequence_length)

    def model_config(self) -> TransformerConfig:
        return self.sizes()

    def score(self, loss: float, predictions: np.ndarray | None, count: int) -> dict[str, float]:
        return {"bits_per_byte": bits_per_byte(loss)}

    def examples_of(self, lines: Sequence[str]) -> Examples:
        """Return lines as beginnings of a text; half of the sequence length is kept for the continuation."""
        length = self.config.data.sequence_length // 2
        tokens, lengths = padded([encode(line, length) or b"\n" for line in lines], length)
        return Examples(tokens, np.full((len(lines), 1), IGNORED, np.int64), lengths=lengths)

    def predict(self, model: Transformer, batch: Batch, device: torch.device) -> torch.Tensor:
        """Return the bytes that come next, up to the end of the line, [B, S / 2], filled up with PAD."""
        import torch

        from fusemesh.transformer.generation import generate

        length = self.config.data.sequence_length // 2
        prompts = [
            torch.from_numpy(row[:size]).to(device)
            for row, size in zip(batch.tokens, batch.inputs["lengths"], strict=True)
        ]
        found = generate(model, prompts, max_new_tokens=length, end=ord("\n"))
        return torch.stack([torch.nn.functional.pad(row, (0, length - len(row)), value=PAD) for row in found])

    def answer(self, prediction: np.ndarray, line: str) -> str:
        return decode(prediction)

    def encode_prompt(self, text: str, most: int) -> list[int]:
        return list(text.encode()[-most:])

    def token_decoder(self) -> Callable[[Sequence[int], bool], str]:
        decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        return lambda tokens, last: decoder.decode(bytes(tokens), last)


def ngram_bits_per_byte(
    train: np.ndarray, text: np.ndarray, positions: np.ndarray, context: int, smoothing: float = 0.01
) -> float:
    """Return the mean -log2 p of ``text[positions]`` by counts of the training bytes, add-``smoothing`` over 256 bytes.

    p(byte | context) = (count(context, byte) + smoothing) / (count(context) + 256 smoothing). The context is the
    ``context`` bytes before the position in the text, however far they reach, so that the baseline never sees less
    than a model with a window does; positions too near the start to have it are given zeros before the text.

    Args:
        train, text: uint8 [bytes].
        positions: int64 [n], indices into ``text``.
        context: bytes of context, 0 to 2 (256^3 counts are 128 MB).
    """
    if context not in (0, 1, 2):
        raise ValueError(f"context: expected 0, 1 or 2 bytes, received {context}")

    def keys(stream: np.ndarray) -> np.ndarray:
        padded = np.concatenate([np.zeros(context, np.uint8), stream]).astype(np.int32)
        key = np.zeros(len(stream), np.int32)
        for back in range(context, -1, -1):
            key = key * VOCAB_SIZE + padded[context - back : len(padded) - back]
        return key

    counts = np.bincount(keys(train), minlength=VOCAB_SIZE ** (context + 1))
    totals = counts.reshape(-1, VOCAB_SIZE).sum(axis=1)
    key = keys(text)[positions]
    p = (counts[key] + smoothing) / (totals[key // VOCAB_SIZE] + VOCAB_SIZE * smoothing)
    return float(-np.log2(p).mean())


def baselines(corpus: Corpus, sequence_length: int, indices: Indices) -> dict[str, float]:
    """Return the bits per byte of simple models on the bytes that these held-out samples predict.

    Keys: ``ngram0``, ``ngram1``, ``ngram2`` (bytes of context, trained on the training bytes) and ``gzip`` (level 9, of
    those bytes together).
    """
    starts = np.sort(np.asarray(indices, dtype=np.int64)) * sequence_length
    positions = (starts[:, None] + np.arange(1, sequence_length + 1)).ravel()
    result = {f"ngram{n}": ngram_bits_per_byte(corpus.train, corpus.held_out, positions, n) for n in range(3)}
    text = corpus.held_out[positions].tobytes()
    result["gzip"] = 8 * len(gzip.compress(text, 9)) / len(text)
    return result


def bits_per_byte(loss: float) -> float:
    """Convert a mean loss per byte from nats to bits."""
    return loss / math.log(2)
