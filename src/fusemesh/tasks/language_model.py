"""Byte-level language modelling on text files, by default the Python standard library's own source.

A corpus is two streams of bytes, for training and held out. Documents go to one or the other as a whole, by a hash of
their relative path, so that no held-out text has a part in training and the split is the same on every rank and in
every run. A sample is a fixed-length window of a stream, known by its global index.
"""

from __future__ import annotations

import gzip
import hashlib
import math
import os
import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

VOCAB_SIZE = 256
SEPARATOR = 0  # ends every document; NUL does not occur in source text
HELD_OUT_ONE_IN = 16  # documents

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
    """The folder of the running Python's standard library."""
    return Path(sysconfig.get_paths()["stdlib"])


def _documents(root: Path) -> Iterator[tuple[str, bytes]]:
    """(relative path, content); unreadable, empty and binary files are left out."""
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


def _hash(name: str) -> int:
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big")


def is_held_out(name: str) -> bool:
    """Whether the document of this relative path is held out: one in :data:`HELD_OUT_ONE_IN`, by hash."""
    return _hash(name) % HELD_OUT_ONE_IN == 0


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
    for name, content in sorted(_documents(root), key=lambda document: _hash(document[0])):
        parts[is_held_out(name)].append(content + bytes([SEPARATOR]))
    if not parts[False] or not parts[True]:
        raise ValueError(
            f"data.path: expected enough documents to hold some out (one in {HELD_OUT_ONE_IN}), received "
            f"{len(parts[False])} to train on and {len(parts[True])} held out in {root}; give more text"
        )
    train, held_out = (np.frombuffer(b"".join(parts[key]), dtype=np.uint8) for key in (False, True))
    source = str(root) if path else f"Python {sysconfig.get_python_version()} standard library"
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

    def batch(self, indices: Sequence[int] | np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Tokens and targets of these samples, each int64 [len(indices), S], sharing no memory."""
        at = np.asarray(indices, dtype=np.int64)[:, None] * self.sequence_length + np.arange(self.sequence_length + 1)
        window = self.stream[at].astype(np.int64)
        return window[:, :-1].copy(), window[:, 1:].copy()


def ngram_bits_per_byte(
    train: np.ndarray, text: np.ndarray, positions: np.ndarray, context: int, smoothing: float = 0.01
) -> float:
    """Mean -log2 p of ``text[positions]`` under counts of the training bytes, add-``smoothing`` over 256 bytes.

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


def baselines(corpus: Corpus, sequence_length: int, indices: Sequence[int] | np.ndarray) -> dict[str, float]:
    """Bits per byte of simple models on just the bytes that these held-out samples predict.

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
    """A mean loss per byte, from nats to bits."""
    return loss / math.log(2)
