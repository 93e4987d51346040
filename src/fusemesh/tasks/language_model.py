"""Byte-level language modelling on text files, by default the Python standard library's own source.

A corpus is two streams of bytes, for training and held out. Documents go to one or the other as a whole, by a hash of
their relative path, so that no held-out text has a part in training and the split is the same on every rank and in
every run. A sample is a fixed-length window of a stream, known by its global index.
"""

from __future__ import annotations

import codecs
import functools
import gzip
import logging
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
    held_out_names,
    padded,
    shortened,
)
from .encodings import check_characters, decode_text, is_wide
from .files import read_bytes

if TYPE_CHECKING:
    import torch

    from fusemesh.config import Config
    from fusemesh.transformer import Transformer, TransformerConfig

DEFAULTS: Mapping[str, Any] = {"data.sequence_length": 256}
SEPARATOR = PAD  # ends every document; NUL does not occur in source text

# Not the library's source: installed packages, compiled files, tests, and text that a program wrote.
_EXCLUDED_FOLDERS = {"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test", "pydoc_data"}
_EXCLUDED_PREFIX = "_sysconfigdata"
_SOURCE_SUFFIX = ".py"
_SHOWN = 3  # files in a message
_LEAST_LENGTH = 16  # that is chosen
logger = logging.getLogger("fusemesh")


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


def load_corpus(path: str = "", held_out: str = "", *, encoding: str = "") -> Corpus:
    """Read a corpus.

    Args:
        path: a text file, a folder of text files, or "" for the standard library's source.
        held_out: the same for the held-out part; "": one in 16 of the documents, but at least one, by hash.
        encoding: of the files, see :func:`fusemesh.tasks.encodings.decode_text`.

    Raises:
        ValueError: nothing is there, it is in another encoding, or one document has no two lines to divide.
    """
    documents = _read(path, "data.path", encoding)
    if held_out:
        parts = [documents, _read(held_out, "data.held_out", encoding)]
    else:
        documents = _at_least_two(documents)
        chosen = held_out_names(documents)
        if not chosen:
            raise ValueError(
                f"data.path: expected enough documents to hold some out, received {len(documents)} of one line in "
                f"{path!r}; give more text, or some to evaluate on as data.held_out"
            )
        parts = [{n: text for n, text in documents.items() if (n in chosen) == part} for part in (False, True)]
    return Corpus(_stream(parts[0]), _stream(parts[1]), len(parts[0]), len(parts[1]), _source(path))


def _stream(documents: dict[str, bytes]) -> np.ndarray:
    """Return documents as one stream, in the order of their hashes: its first part is then a random choice of them."""
    names = sorted(documents, key=lambda name: hash_of(name))
    return np.frombuffer(b"".join(documents[name] + bytes([SEPARATOR]) for name in names), dtype=np.uint8)


def _source(path: str) -> str:
    return str(_root(path)) if path else _library()


def _root(path: str) -> Path:
    return Path(path).expanduser().resolve() if path else standard_library()


def _read(path: str, key: str, encoding: str) -> dict[str, bytes]:
    """Return the documents of a file or a folder by name, in UTF-8; say which files have another encoding."""
    root = _root(path)
    if root.is_file():
        text = decode_text(read_bytes(root, key, "text"), encoding, str(root)).encode()
        if not text or b"\0" in text:
            what = "which holds bytes of 0" if text else "an empty file"
            raise ValueError(f"{key}: expected text, received {path!r}, {what}; give another")
        return _parts(root.name, text)
    if not root.is_dir():
        is_there = "neither file nor folder" if root.exists() else "not found"
        raise ValueError(f"{key}: expected a text file or a folder of text files, received {path!r}: {is_there}")
    found, undecoded = {}, []
    for name, content in _files(root):
        try:
            text = _utf8(content, encoding, name) if path else content
        except ValueError as error:
            undecoded.append(str(error))
            continue
        # A NUL byte marks a binary file, and would be taken for the end of a document.
        if text and b"\0" not in text:
            found[name] = text
    if undecoded:
        more = f"; and {len(undecoded) - _SHOWN} others" if len(undecoded) > _SHOWN else ""
        line = f"{len(undecoded)} of {len(undecoded) + len(found)} files of {path!r} cannot be read and are left out: "
        line += "; ".join(sorted(undecoded)[:_SHOWN]) + more
        if len(undecoded) > len(found):
            raise ValueError(f"{key}: expected text in {encoding or 'UTF-8'}, received other files: {line}")
        logger.warning("%s: %s", key, line)
    if not found:
        raise ValueError(f"{key}: expected a folder of text files, received {path!r}, which has no text; give another")
    return found


def _files(root: Path) -> Iterator[tuple[str, bytes]]:
    """Yield (relative path, content) of a folder's files; unreadable and hidden ones are left out."""
    suffix = _SOURCE_SUFFIX if root == standard_library() else ""
    for folder, folders, files in os.walk(root):
        folders[:] = [name for name in folders if name not in _EXCLUDED_FOLDERS and not name.startswith(".")]
        for name in files:
            if not name.endswith(suffix) or name.startswith((_EXCLUDED_PREFIX, ".")):
                continue
            path = Path(folder, name)
            try:
                content = read_bytes(path, "data.path", "text")
            except ValueError:
                continue
            yield path.relative_to(root).as_posix(), content


def _utf8(content: bytes, encoding: str, name: str) -> bytes:
    """Return a document in UTF-8; a binary one, which holds bytes of 0, as it is."""
    if b"\0" in content and not is_wide(content, encoding):
        return content
    return decode_text(content, encoding, name).encode()


def _parts(name: str, text: bytes) -> dict[str, bytes]:
    """Return the paragraphs of a text as documents by name."""
    blank = b"\r\n\r\n" if b"\r\n" in text else b"\n\n"
    return {f"{name}#{number}": part + blank for number, part in enumerate(text.split(blank)) if part.strip()}


def _at_least_two(documents: dict[str, bytes]) -> dict[str, bytes]:
    """Return the documents; of a single one its paragraphs, or its lines."""
    for cut in (_parts, _lines):
        if len(documents) == 1:
            ((name, text),) = documents.items()
            documents = cut(name, text)
    return documents


def _lines(name: str, text: bytes) -> dict[str, bytes]:
    """Return the lines of a text as documents by name."""
    return {f"{name}:{number}": line + b"\n" for number, line in enumerate(text.split(b"\n")) if line.strip()}


class Samples:
    """The windows of a stream: sample i predicts bytes i*S+1 ... (i+1)*S, each from those before it in the window.

    Args:
        stream: uint8 [bytes].
        sequence_length: S, in bytes.
        padded: a stream that is too short for one sample makes one, filled up with PAD that does not count.

    Raises:
        ValueError: the stream is too short for one sample.
    """

    def __init__(self, stream: np.ndarray, sequence_length: int, *, padded: bool = False) -> None:
        self.stream, self.sequence_length = stream, sequence_length
        self.count = (len(stream) - 1) // sequence_length
        self.missing = 0
        if self.count < 1 and padded:
            self.count, self.missing = 1, sequence_length + 1 - len(stream)
            self.stream = np.concatenate([stream, np.full(self.missing, PAD, np.uint8)])
        if self.count < 1:
            raise ValueError(
                f"data.sequence_length: expected at most {len(stream) - 1}, one less than the bytes of the stream, "
                f"received {sequence_length}; give more text or a smaller data.sequence_length"
            )

    def __len__(self) -> int:
        return self.count

    def targets_in(self, indices: Indices) -> int:
        """Return the number of targets of these samples: every byte of a window counts."""
        return len(indices) * (self.sequence_length - self.missing)

    def batch(self, indices: Indices) -> Batch:
        """Return tokens and targets of these samples, each int64 [len(indices), S], sharing no memory."""
        at = np.asarray(indices, dtype=np.int64)[:, None] * self.sequence_length + np.arange(self.sequence_length + 1)
        window = self.stream[at].astype(np.int64)
        targets = window[:, 1:].copy()
        targets[:, self.sequence_length - self.missing :] = IGNORED
        return Batch(window[:, :-1].copy(), targets)


class LanguageModel(Task):
    """See the module. Without a metric of predictions: the loss says all."""

    continues_texts = True

    def __init__(self, config: Config, metadata: Mapping[str, Any] | None = None) -> None:
        if config.data.columns:
            raise ValueError(
                "data.columns: expected nothing with task language_model, whose text has no records, received "
                f"{config.data.columns!r}"
            )
        super().__init__(config, metadata)

    @staticmethod
    def default_version() -> str:
        return _library()

    @staticmethod
    def files_of(path: str) -> Iterator[tuple[str, bytes]]:
        root = _root(path)
        if not root.is_dir():
            yield "", root.read_bytes()
        for name, content in sorted(_files(root)):
            if content and (b"\0" not in content or is_wide(content, "")):
                yield name, content

    @functools.cached_property
    def _corpus(self) -> Corpus:
        data = self.config.data
        return load_corpus(data.path, data.held_out, encoding=data.encoding)

    def choose_length(self) -> int:
        """Return the default, or less where the text to train on has too few bytes for it."""
        default: int = DEFAULTS["data.sequence_length"]
        fits = (len(self._corpus.train) - 1) // _LEAST_LENGTH * _LEAST_LENGTH
        return min(default, max(fits, _LEAST_LENGTH))

    @property
    def source(self) -> str:
        """Where the text is from."""
        return _source(self.config.data.path)

    def read_train(self) -> Samples:
        return Samples(self._corpus.train, self.config.data.sequence_length)

    def read_held_out(self) -> Samples:
        data = self.config.data
        if data.held_out and "_corpus" not in vars(self):
            # The data to train on need not be there.
            found = _stream(_read(data.held_out, "data.held_out", data.encoding))
        else:
            found = self._corpus.held_out
        return Samples(found, data.sequence_length, padded=True)

    def model_config(self) -> TransformerConfig:
        return self.sizes()

    def score(self, loss: float, predictions: np.ndarray | None, count: int) -> dict[str, float]:
        return {"bits_per_byte": bits_per_byte(loss)}

    def examples_of(self, lines: Sequence[str], first: int = 1) -> Examples:
        """Return lines as beginnings of a text; half of the sequence length is kept for the continuation."""
        length = self.config.data.sequence_length // 2
        data = [encode(line) for line in lines]
        tokens, lengths = padded([shortened(line, length) or b"\n" for line in data], length)
        # Uncut, a line takes as much again for its continuation.
        whole = [2 * len(line) for line in data]
        return Examples(tokens, np.full((len(lines), 1), IGNORED, np.int64), whole=whole, lengths=lengths)

    def predict(self, model: Transformer, batch: Batch, device: torch.device) -> torch.Tensor:
        """Return the bytes that come next, up to the end of the line, [B, S / 2], filled up with PAD."""
        return self.predict_scored(model, batch, device)[0]

    def predict_scored(
        self, model: Transformer, batch: Batch, device: torch.device
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the same, and the log-likelihood of each, [B, 1]."""
        import torch

        from fusemesh.transformer.generation import generate

        length = self.config.data.sequence_length // 2
        prompts = [
            torch.from_numpy(row[:size]).to(device)
            for row, size in zip(batch.tokens, batch.inputs["lengths"], strict=True)
        ]
        scores = [0.0] * len(prompts)
        found = generate(model, prompts, max_new_tokens=length, end=ord("\n"), on_score=scores.__setitem__)
        rows = torch.stack([torch.nn.functional.pad(row, (0, length - len(row)), value=PAD) for row in found])
        return rows, torch.tensor([[score] for score in scores], dtype=torch.float64, device=device)

    def answer(self, prediction: np.ndarray, line: str) -> str:
        return decode(prediction)

    def encode_prompt(self, text: str, most: int) -> list[int]:
        check_characters(text, "the prompt")
        # Not from the middle of a character on.
        return list(text.encode()[-most:].decode(errors="ignore").encode())

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
    positions = positions[positions < len(corpus.held_out)]
    result = {f"ngram{n}": ngram_bits_per_byte(corpus.train, corpus.held_out, positions, n) for n in range(3)}
    text = corpus.held_out[positions].tobytes()
    result["gzip"] = 8 * len(gzip.compress(text, 9)) / len(text)
    return result


def bits_per_byte(loss: float) -> float:
    """Convert a mean loss per byte from nats to bits."""
    return loss / math.log(2)
