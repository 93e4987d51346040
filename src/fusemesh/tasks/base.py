"""The interface of a task for the trainer, the evaluator and the predictor: examples, kind of model, and metrics.

Texts are bytes of UTF-8 unless a task says otherwise. Four bytes, which no text holds, are control tokens: PAD, BEGIN,
END and SEPARATOR. A text that is longer than ``data.sequence_length`` allows is cut at its end, between two characters.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

if TYPE_CHECKING:
    import torch

    from fusemesh.config import Config
    from fusemesh.transformer import Transformer, TransformerConfig

VOCAB_SIZE = 256
PAD, BEGIN, END, SEPARATOR = 0, 1, 2, 3
IGNORED = -100  # target that does not count
HELD_OUT_ONE_IN = 16

_PARTS = {"train": "records to train on", "held_out": "held-out records"}
Indices = Sequence[int] | np.ndarray


@dataclass(frozen=True)
class Batch:
    """Some samples: tokens int64 [B, S]; targets int64 [B, n], :data:`IGNORED` where one does not count; what else the
    model takes by name, int64 [B, ...]; and ``aside`` what the task needs with predictions and the model does not take.
    """

    tokens: np.ndarray
    targets: np.ndarray
    inputs: dict[str, np.ndarray] = field(default_factory=dict)
    aside: dict[str, np.ndarray] = field(default_factory=dict)


class Dataset(Protocol):
    """Samples by number."""

    def __len__(self) -> int: ...

    def batch(self, indices: Indices) -> Batch:
        """Return these samples."""
        ...

    def targets_in(self, indices: Indices) -> int:
        """Return the number of targets of these samples that count."""
        ...


class Examples:
    """A dataset in memory: each array's rows are the samples'."""

    def __init__(
        self, tokens: np.ndarray, targets: np.ndarray, *, whole: Sequence[int] | np.ndarray = (), **inputs: np.ndarray
    ) -> None:
        """Keep the samples.

        Args:
            whole: of each text that the samples were made of, the tokens that it takes uncut.
        """
        self.tokens, self.targets, self.inputs = tokens, targets, inputs
        # ``counts`` is what else a task says of them, by name.
        self.whole = np.array(whole, np.int64)
        self.counts: dict[str, int] = {}
        self._counted = (targets != IGNORED).sum(axis=1)

    def __len__(self) -> int:
        return len(self.tokens)

    def batch(self, indices: Indices) -> Batch:
        at = np.asarray(indices, dtype=np.int64)
        inputs = {name: values[at].astype(np.int64) for name, values in self.inputs.items()}
        return Batch(self.tokens[at].astype(np.int64), self.targets[at].astype(np.int64), inputs)

    def targets_in(self, indices: Indices) -> int:
        return int(self._counted[np.asarray(indices, dtype=np.int64)].sum())


class Task(ABC):
    """Data, model and metric of one use.

    ``metadata`` is JSON: everything beside weights and configuration that a trained model needs to answer. It is saved
    with the model, and from it and the configuration a task is made without any data. ``train`` and ``held_out`` are
    datasets, read when they are first asked for, and ``source`` says where they are from.

    ``metric`` names the first of the numbers that :meth:`score` makes of predictions; "" if the loss says all.
    ``stacks`` is 2 for an encoder-decoder, which has ``model.num_layers`` blocks in each. ``continues_texts`` says
    whether ``fusemesh generate`` can have the task's model continue a text; then :meth:`encode_prompt` and
    :meth:`token_decoder` are defined.
    """

    metric = ""
    # The metadata of models that were saved without any (format 2 of checkpoints); None if only the data have them.
    old_metadata: Mapping[str, Any] | None = {}
    stacks = 1
    continues_texts = False

    def __init__(self, config: Config, metadata: Mapping[str, Any] | None = None) -> None:
        """Read all data and find the metadata in them; or take those of a trained model, and read nothing yet.

        Raises:
            ValueError: the data cannot be used; names file, line and remedy.
        """
        self.config = config
        if not config.data.sequence_length:
            data = dataclasses.replace(config.data, sequence_length=self.choose_length())
            self.config = dataclasses.replace(config, data=data)
        self.metadata: dict[str, Any] = dict(self.find_metadata() if metadata is None else metadata)
        if metadata is None:
            # Whatever is wrong with the data comes out now.
            _ = self.train, self.held_out

    @property
    @abstractmethod
    def source(self) -> str:
        """Where the data are from, for reports."""

    @staticmethod
    @abstractmethod
    def default_version() -> str:
        """Return the name and the version of what the default corpus is made from."""

    @staticmethod
    def files_of(path: str) -> Iterator[tuple[str, bytes]]:
        """Yield name and content of the files that ``data.path`` or ``data.held_out`` stands for, in a fixed order; a
        single file has the name ""."""
        yield "", Path(path).expanduser().read_bytes()

    def check_packages(self) -> None:  # noqa: B027 (most tasks need nothing more)
        """Check that the packages are there that the task needs at the end of a run.

        Raises:
            ValueError: one is not; says how to install it.
        """

    @abstractmethod
    def choose_length(self) -> int:
        """Return a ``data.sequence_length`` that suits the data; that of the task's defaults for its own corpus."""

    def cuts(self, part: str) -> dict[str, int]:
        """Return how many records ``train`` or ``held_out`` was made of, how many of them are cut, how many tokens the
        longest takes, and what the task counts beside; nothing if it has no records."""
        samples = getattr(self, part)
        if not isinstance(samples, Examples) or not len(samples.whole):
            return {}
        cut = int((samples.whole > self.config.data.sequence_length).sum())
        return {"records": len(samples.whole), "cut": cut, "longest": int(samples.whole.max()), **samples.counts}

    def say_cuts(self, part: str) -> str:
        """Return :meth:`cuts` as a sentence, "" if nothing is cut or counted."""
        counts = self.cuts(part)
        said = [text for text in [self.say_cut_lengths(getattr(getattr(self, part), "whole", ()))] if text]
        more = {name: counts[name] for name in counts if name not in ("records", "cut", "longest")}
        said += [f"{count} {name.replace('_', ' ')}" for name, count in more.items() if count]
        return f"{_PARTS[part]}: {'; '.join(said)}" if said else ""

    def say_cut_lengths(self, whole: Sequence[int] | np.ndarray) -> str:
        """Return how many of some texts are cut, given the tokens that each takes uncut; "" if none is."""
        length = self.config.data.sequence_length
        cut = int((np.asarray(whole, np.int64) > length).sum())
        if not cut:
            return ""
        share = f"{cut} of {len(whole)} {'is' if cut == 1 else 'are'}"
        return f"{share} cut at data.sequence_length = {length} tokens (the longest takes {max(whole)})"

    def sample_text(self) -> str:
        """Return one sample to train on as text, with its targets between marks; "" where all tokens are targets."""
        return ""

    def find_metadata(self) -> Mapping[str, Any]:
        """Return the metadata that the data to train on give; see the class."""
        return {}

    @functools.cached_property
    def train(self) -> Dataset:
        """The samples to train on."""
        return self.read_train()

    @functools.cached_property
    def held_out(self) -> Dataset:
        """The samples to evaluate on."""
        return self.read_held_out()

    @abstractmethod
    def read_train(self) -> Dataset:
        """Return the samples to train on, in terms of the metadata; raise ValueError as the constructor does."""

    @abstractmethod
    def read_held_out(self) -> Dataset:
        """Return the samples to evaluate on, in terms of the metadata, without the data to train on if they are in a
        file of their own; raise ValueError as the constructor does."""

    def pretrained_config(self) -> dict[str, Any]:
        """Return what of a pretrained model's configuration the metadata decide, such as the labels of its head."""
        return {}

    @abstractmethod
    def model_config(self) -> TransformerConfig:
        """Return the sizes of the model, from the configuration and the metadata."""

    def sizes(self, *, vocab_size: int = VOCAB_SIZE, **kind: Any) -> TransformerConfig:
        """Return the configured sizes with the kind of model."""
        from fusemesh.transformer import TransformerConfig

        shape = {name: size for name, size in vars(self.config.model).items() if name != "pretrained"}
        length = self.config.data.sequence_length
        return TransformerConfig(vocab_size=vocab_size, max_sequence_length=length, **shape, **kind)

    @abstractmethod
    def predict(self, model: Transformer, batch: Batch, device: torch.device) -> torch.Tensor:
        """Return the model's predictions, int64 [B, width], with one width for all batches.

        Every rank of all replicas calls it for equally many batches of one size.
        """

    @abstractmethod
    def score(self, loss: float, predictions: np.ndarray | None, count: int) -> dict[str, float]:
        """Return the metrics of the loss and the predictions [count, width] for the first ``count`` held-out samples.

        Those of a baseline are among them, named for it. Without a ``metric`` there are no predictions.
        """

    def draw(self, predictions: np.ndarray, folder: Path) -> None:  # noqa: B027 (most tasks have nothing to show)
        """Write drawings of the predictions into a run's folder, if the task has any."""

    @abstractmethod
    def examples_of(self, lines: Sequence[str], first: int = 1) -> Examples:
        """Return a user's questions, one a line, as samples without targets.

        Args:
            first: the number of the first line, for messages.

        Raises:
            ValueError: a line that is no question, by its number.
        """

    @abstractmethod
    def answer(self, prediction: np.ndarray, line: str) -> str:
        """Return one row of :meth:`predict` as text, for the line that it answers."""

    @abstractmethod
    def predict_scored(
        self, model: Transformer, batch: Batch, device: torch.device
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return predictions as :meth:`predict` does, and their scores, fp64 [B, n] with one n for all batches."""

    def named_scores(self, scores: np.ndarray) -> dict[str, Any]:
        """Return one row of the scores of :meth:`predict_scored` as JSON."""
        return {"log_likelihood": float(scores[0])}

    def encode_prompt(self, text: str, most: int) -> list[int]:
        """Return the last tokens of a text to continue, at most ``most``."""
        raise NotImplementedError(f"task {self.config.task} continues no texts")

    def token_decoder(self) -> Callable[[Sequence[int], bool], str]:
        """Return a function that turns the next tokens of a text into characters; its second argument marks the last.

        Tokens of an unfinished character wait for the next call.
        """
        raise NotImplementedError(f"task {self.config.task} continues no texts")


def encode(text: str, most: int | None = None) -> bytes:
    """Return the bytes of a text, without the four control tokens; all, or :func:`shortened` to ``most``."""
    data = text.translate({PAD: None, BEGIN: None, END: None, SEPARATOR: None}).encode()
    return data if most is None else shortened(data, most)


def shortened(data: bytes, most: int) -> bytes:
    """Return at most ``most`` bytes of a text, cut between characters."""
    return data if len(data) <= most else data[:most].decode(errors="ignore").encode()


def decode(tokens: np.ndarray) -> str:
    """Return the text of tokens up to the first END or PAD."""
    stop = np.flatnonzero((tokens == END) | (tokens == PAD))
    return bytes(tokens[: stop[0] if len(stop) else None].astype(np.uint8)).decode(errors="replace")


def padded(rows: Sequence[bytes], length: int) -> tuple[np.ndarray, np.ndarray]:
    """Return rows as uint8 [n, length], filled up with PAD, and their lengths, int64 [n]."""
    found = np.full((len(rows), length), PAD, np.uint8)
    for row, data in zip(found, rows, strict=True):
        row[: len(data)] = np.frombuffer(data, np.uint8)
    return found, np.array([len(data) for data in rows], np.int64)


def padded_rows(rows: Sequence[Sequence[int]], length: int, pad: int) -> tuple[np.ndarray, np.ndarray]:
    """Return rows of tokens as int32 [n, length], filled up with ``pad``, and their lengths, int64 [n]."""
    found = np.full((len(rows), length), pad, np.int32)
    for row, tokens in zip(found, rows, strict=True):
        row[: len(tokens)] = tokens
    return found, np.array([len(tokens) for tokens in rows], np.int64)


def is_held_out(name: str) -> bool:
    """Return whether the example of this name is held out: one in :data:`HELD_OUT_ONE_IN`, by a fixed hash."""
    return hash_of(name) % HELD_OUT_ONE_IN == 0


def held_out_names(names: Iterable[str]) -> set[str]:
    """Return which of some names are held out: by :func:`is_held_out`, but at least one, and not all.

    Where the rule takes none, it is the one with the smallest hash; where it takes all, the one with the largest stays.
    """
    ordered = sorted(set(names), key=lambda name: (hash_of(name), name))
    found = {name for name in ordered if is_held_out(name)}
    if not found:
        return set(ordered[:1]) if len(ordered) > 1 else set()
    return found - set(ordered[-1:]) if len(found) == len(ordered) else found


def hash_of(name: str) -> int:
    """Return 64 bits that depend on the name alone."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big")
