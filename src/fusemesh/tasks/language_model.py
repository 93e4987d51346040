"""Language modelling on text files, by default the Python standard library's own source.

A sample is a fixed-length window of one of the corpus's two streams, known by its global index; see corpus.py. A new
model's tokens are bytes, a pretrained one's those of its tokenizer; see tokens.py. Samples of a pretrained model are
rows of whole documents, which do not see each other, unless ``data.packing`` is false; see fusemesh.tokenized.
"""

from __future__ import annotations

import functools
import gzip
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from fusemesh.models.registry import maker_of
from fusemesh.tokenized.questions import as_chat

from .base import IGNORED, PAD, VOCAB_SIZE, Batch, Dataset, Examples, Indices, Task, padded_rows
from .corpus import SEPARATOR as SEPARATOR  # public here
from .corpus import Corpus, in_order, library_version, read_documents, some_of, source_of
from .corpus import load_corpus as load_corpus
from .corpus import standard_library as standard_library
from .tokens import bits_per_byte as bits_per_byte

if TYPE_CHECKING:
    import torch

    from fusemesh.config import Config
    from fusemesh.tokenized.data import DocumentData
    from fusemesh.transformer import Transformer, TransformerConfig

    from .tokens import Asked

DEFAULTS: Mapping[str, Any] = {"data.sequence_length": 256}
_LEAST_LENGTH, _MOST_LENGTH = 16, 1024  # that is chosen; the most of a pretrained model
_NOTHING = -1  # behind the end of a continuation


class Samples:
    """The windows of a stream: sample i predicts tokens i*S+1 ... (i+1)*S, each from those before it in the window.

    Args:
        stream: integers [tokens].
        sequence_length: S, in tokens.
        padded: a stream that is too short for one sample makes one, filled up with ``pad`` that does not count.

    Raises:
        ValueError: the stream is too short for one sample.
    """

    def __init__(self, stream: np.ndarray, sequence_length: int, *, padded: bool = False, pad: int = PAD) -> None:
        self.stream, self.sequence_length = stream, sequence_length
        self.count = (len(stream) - 1) // sequence_length
        self.missing = 0
        if self.count < 1 and padded:
            self.count, self.missing = 1, sequence_length + 1 - len(stream)
            self.stream = np.concatenate([stream, np.full(self.missing, pad, stream.dtype)])
        if self.count < 1:
            raise ValueError(
                f"data.sequence_length: expected at most {len(stream) - 1}, one less than the tokens of the stream, "
                f"received {sequence_length}; give more text or a smaller data.sequence_length"
            )

    def __len__(self) -> int:
        return self.count

    def targets_in(self, indices: Indices) -> int:
        """Return the number of targets of these samples: every token of a window counts."""
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
        self.config, self.maker = config, maker_of(config)
        self.tokens = self.maker.tokens()
        # Whether the lines that are answered are JSON; None before the first.
        self._answers_json: bool | None = None
        for path in (config.data.path, config.data.held_out):
            if path.endswith(".tokens") and not self.maker.refines:
                raise ValueError(
                    f"data.path: expected text with a new model, whose tokens are bytes, received {path!r}; give the "
                    "model whose tokenizer made it as model.pretrained, or the text itself"
                )
        if config.data.columns and not self._has_records:
            raise ValueError(
                "data.columns: expected nothing with task language_model, whose text has no records (a pretrained "
                f"model takes those of .jsonl files), received {config.data.columns!r}"
            )
        super().__init__(config, metadata)

    @staticmethod
    def default_version() -> str:
        return library_version()

    @staticmethod
    def files_of(path: str) -> Iterator[tuple[str, bytes]]:
        from fusemesh.tokenized.mixture import files_of

        yield from files_of(path)

    @functools.cached_property
    def _is_documents(self) -> bool:
        """Whether samples are made of documents, in the place of windows of a stream: of a pretrained model records and
        token files always, and texts where they are packed."""
        return self.maker.refines and (self.config.data.packing or self._has_records)

    @property
    def _has_records(self) -> bool:
        if not self.maker.refines:
            return False
        from fusemesh.tokenized.data import is_documents

        return is_documents(self.config.data)

    @functools.cached_property
    def _documents(self) -> DocumentData:
        from fusemesh.tokenized.data import DocumentData
        from fusemesh.tokenized.packing import PackedRows
        from fusemesh.tokenized.padded import PaddedRows

        tokens: Any = self.tokens
        rows = PackedRows if self.config.data.packing else PaddedRows
        return DocumentData(self.config.data, tokens, lambda found, length: rows(found, length, tokens.pad))

    @functools.cached_property
    def _corpus(self) -> Corpus:
        data = self.config.data
        return load_corpus(data.path, data.held_out, encoding=data.encoding, join=self.tokens.stream)

    def choose_length(self) -> int:
        """Return the default, or what a pretrained model takes, or less where the text to train on is shorter.

        Of records what 99 in 100 fit into; packed rows are as long as the model takes, unless there are then fewer than
        a step takes.
        """
        default: int = min(self.maker.longest, _MOST_LENGTH) if self.maker.refines else DEFAULTS["data.sequence_length"]
        if self._is_documents:
            wanted = self._documents.longest()
            if self.config.data.packing:
                wanted = max(wanted, self._documents.tokens_in_all() // self.config.training.global_batch_size)
            return min(default, -(-wanted // _LEAST_LENGTH) * _LEAST_LENGTH)
        fits = (len(self._corpus.train) - 1) // _LEAST_LENGTH * _LEAST_LENGTH
        return min(default, max(fits, _LEAST_LENGTH))

    def cuts(self, part: str) -> dict[str, int]:
        if self._is_documents:
            return self._documents.cuts(part, self.config.data.sequence_length)
        found = self._left_out(part)
        return {"files_left_out": len(found)} if found else {}

    def say_cuts(self, part: str) -> str:
        """Return which files of the data have another encoding; a stream is cut into windows, and nothing is lost. Of
        documents, which are cut, and which are left out."""
        if self._is_documents:
            return self._documents.say_cuts(part, self.config.data.sequence_length)
        found = self._left_out(part)
        files = "1 file is" if len(found) == 1 else f"{len(found)} files are"
        return f"{files} left out: {some_of(found)}" if found else ""

    def _left_out(self, part: str) -> tuple[str, ...]:
        return self._corpus.train_left_out if part == "train" else self._held_out_text[1]

    @functools.cached_property
    def _held_out_text(self) -> tuple[np.ndarray, tuple[str, ...]]:
        """The stream of the held-out text, and the files left out of it."""
        data = self.config.data
        if data.held_out and "_corpus" not in vars(self):
            # The data to train on need not be there.
            documents, left_out = read_documents(data.held_out, "data.held_out", data.encoding)
            return self.tokens.stream(in_order(documents)), left_out
        return self._corpus.held_out, self._corpus.held_out_left_out

    @property
    def source(self) -> str:
        """Where the text is from."""
        return self.config.data.path if self._has_records else source_of(self.config.data.path)

    def packed(self) -> dict[str, Any]:
        if not self._is_documents:
            return {}
        return self._documents.packed(self.train, self.config.data.sequence_length)

    def sample_text(self) -> str:
        return self._documents.shown(self.config.data.sequence_length) if self._is_documents else ""

    def read_train(self) -> Dataset:
        if self._is_documents:
            return self._documents.dataset("train", self.config.data.sequence_length)
        return Samples(self._corpus.train, self.config.data.sequence_length)

    def read_held_out(self) -> Dataset:
        length = self.config.data.sequence_length
        if self._is_documents:
            return self._documents.dataset("held_out", length)
        return Samples(self._held_out_text[0], length, padded=True, pad=self.tokens.pad)

    def model_config(self) -> TransformerConfig:
        return self.sizes()

    def score(self, loss: float, predictions: np.ndarray | None, count: int) -> dict[str, float]:
        return self.tokens.metrics(loss)

    def examples_of(self, lines: Sequence[str], first: int = 1) -> Examples:
        """Return lines as beginnings of a text; half of the sequence length is kept for the continuation.

        To a pretrained model a line may be a chat or a prompt in JSON, and then all are: none of these is cut.
        """
        length = self.config.data.sequence_length // 2
        asked = [self.tokens.asked(line, f"line {number}") for number, line in enumerate(lines, first)]
        for number, one in enumerate(asked, first):
            self._answers_json = one is not None if self._answers_json is None else self._answers_json
            if self._answers_json != (one is not None):
                kinds = ["text", "JSON with messages or a prompt"]
                raise ValueError(
                    f"line {number}: expected {kinds[self._answers_json]}, as in the lines before it, received "
                    f"{kinds[not self._answers_json]}; give lines of each kind by themselves"
                )
        if questions := [one for one in asked if one is not None]:
            return self._questions(questions, first)
        found = [self.tokens.line(line, length) for line in lines]
        tokens, lengths = padded_rows([beginning for beginning, _ in found], length, self.tokens.pad)
        # Uncut, a line takes as much again for its continuation.
        return Examples(
            tokens,
            np.full((len(lines), 1), IGNORED, np.int64),
            whole=[2 * size for _, size in found],
            lengths=lengths,
        )

    def _questions(self, questions: Sequence[Asked], first: int) -> Examples:
        """Return prompts and chats as samples, with the tokens that end the answers."""
        length = self.config.data.sequence_length
        most = self.maker.longest - length // 2
        for number, question in enumerate(questions, first):
            if len(question.ids) > most:
                raise ValueError(
                    f"line {number}: expected at most {most} tokens, which the model's positions leave beside "
                    f"{length // 2} of an answer, received {len(question.ids)}; shorten the chat or the prompt"
                )
        tokens, lengths = padded_rows([one.ids for one in questions], max(len(one.ids) for one in questions), 0)
        every = sorted({token for one in questions for token in one.ends})
        ends = np.tile(np.array(every, np.int64), (len(questions), 1))
        nothing = np.full((len(questions), 1), IGNORED, np.int64)
        # None is cut.
        return Examples(tokens, nothing, whole=np.minimum(lengths, length), lengths=lengths, ends=ends)

    def predict(self, model: Transformer, batch: Batch, device: torch.device) -> torch.Tensor:
        """Return the tokens that come next, up to the end of the line or the answer, [B, S / 2], filled up with -1."""
        return self.predict_scored(model, batch, device)[0]

    def predict_scored(
        self, model: Transformer, batch: Batch, device: torch.device
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the same, and the log-likelihood of each, [B, 1]."""
        import torch

        length = self.config.data.sequence_length // 2
        prompts = [
            torch.from_numpy(row[:size]).to(device)
            for row, size in zip(batch.tokens, batch.inputs["lengths"], strict=True)
        ]
        scores = [0.0] * len(prompts)
        ends = batch.inputs["ends"][0].tolist() if "ends" in batch.inputs else self.tokens.line_ends
        found = self.maker.generate(model, prompts, max_new_tokens=length, ends=ends, on_score=scores.__setitem__)
        rows = torch.stack([torch.nn.functional.pad(row, (0, length - len(row)), value=_NOTHING) for row in found])
        return rows, torch.tensor([[score] for score in scores], dtype=torch.float64, device=device)

    def answer(self, prediction: np.ndarray, line: str) -> str:
        tokens = prediction[prediction != _NOTHING]
        return self.tokens.decoder()(tokens.tolist(), True) if self._answers_json else self.tokens.text(tokens)

    def encode_chat(self, text: str) -> Asked:
        found = self.tokens.asked(as_chat(json.dumps({"prompt": text}), "--prompt"), "--prompt")
        assert found is not None
        return found

    @property
    def ends(self) -> Sequence[int]:
        return self.tokens.ends

    def encode_prompt(self, text: str, most: int) -> list[int]:
        return self.tokens.prompt(text, most)

    def token_decoder(self) -> Callable[[Sequence[int], bool], str]:
        return self.tokens.decoder()


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
