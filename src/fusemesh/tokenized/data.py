"""The documents that a pretrained language model is trained and evaluated on: records, texts, token files, mixtures."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fusemesh.tasks.base import Dataset, held_out_names
from fusemesh.tasks.corpus import some_of

from .document import Document
from .documents import Documents, DocumentSource, Selection
from .encoder import LEFT_OUT, Counts, Encoder
from .file import TokenFile, is_token_file
from .mixture import sources_in
from .packing import PackedRows
from .padded import Mixture
from .records import Columns
from .sources import Read, Source, has_records

if TYPE_CHECKING:
    from fusemesh.config import DataConfig
    from fusemesh.pretrained.tokenizer import FolderTokens

_SHOWN = 600  # characters of the sample that is shown


@dataclass(frozen=True)
class Loaded:
    """The documents of one source.

    held_out: bool [N], by the hashes of names. wheres: of each document file and line; [] for a token file, whose
    ``path`` and the document's number stand for them. counts, left_out: records without a target, and files of another
    encoding. plain: all tokens of all documents count, so that a long one can be cut into several samples.
    """

    path: str
    documents: DocumentSource
    held_out: np.ndarray
    wheres: Sequence[str]
    counts: Counts
    left_out: tuple[str, ...] = ()
    plain: bool = False

    def where(self, number: int) -> str:
        """Return where a document stands, for messages."""
        return self.wheres[number] if len(self.wheres) else f"{self.path}, document {number + 1}"


@dataclass(frozen=True)
class Chosen:
    """The documents to train on, or those held out, of one source.

    Of a record with a prompt at most ``data.sequence_length`` tokens are taken. cut: how many records are longer. lost:
    how many have no target within that length, and are left out; first: where the first of these stands.
    """

    documents: DocumentSource
    weight: int
    cut: int
    lost: int
    first: str


def is_documents(data: DataConfig) -> bool:
    """Return whether data are read as documents: records, token files, or several sources."""
    for path in filter(None, (data.path, data.held_out)):
        found = sources_in(path)
        if len(found) > 1 or is_token_file(path) or has_records(path):
            return True
    return False


class DocumentData:
    """The documents of ``data.path`` and ``data.held_out``, read when they are first asked for.

    Args:
        data: the configuration's section.
        tokens: the tokenizer.
        rows: makes samples of ``data.sequence_length`` tokens of documents.
    """

    def __init__(self, data: DataConfig, tokens: FolderTokens, rows: Callable[[DocumentSource, int], Dataset]) -> None:
        self.data, self.tokens, self.rows = data, tokens, rows

    @functools.cached_property
    def _train(self) -> list[tuple[Loaded, int]]:
        return self._load(self.data.path, "data.path")

    @functools.cached_property
    def _held_out(self) -> list[tuple[Loaded, int]]:
        return self._load(self.data.held_out, "data.held_out") if self.data.held_out else self._train

    def _load(self, path: str, key: str) -> list[tuple[Loaded, int]]:
        divided = not self.data.held_out
        return [
            (load(item.path, key, self.data, self.tokens, divided=divided), item.weight)
            for item in sources_in(path, key)
        ]

    def parts(self, part: str, length: int) -> list[Chosen]:
        """Return the documents of each source to train on, or to evaluate on.

        Raises:
            ValueError: there are none, or none of them has a target within ``length`` tokens.
        """
        chosen: list[Chosen] = []
        of_path = not self.data.held_out
        for loaded, weight in self._of(part):
            numbers = np.arange(len(loaded.documents))
            if of_path:
                numbers = numbers[loaded.held_out == (part == "held_out")]
            most = None if loaded.plain else length
            firsts = loaded.documents.first_targets[numbers]
            kept, lost = (numbers, numbers[:0]) if most is None else (numbers[firsts < most], numbers[firsts >= most])
            cut = 0 if most is None else int((loaded.documents.lengths[kept] > most).sum())
            first = loaded.where(int(lost[0])) if len(lost) else ""
            chosen.append(Chosen(Selection(loaded.documents, kept, most), weight, cut, len(lost), first))
        if sum(part.lost for part in chosen) and not any(len(part.documents) for part in chosen):
            first = next(part.first for part in chosen if part.first)
            raise ValueError(
                f"data.sequence_length: expected so many tokens that targets are among them, received {length}, within "
                f"which no record has one: the first target of {first} stands behind; give a larger "
                "data.sequence_length, or shorter prompts"
            )
        empty = [one.path for (one, _), part in zip(self._of(part), chosen, strict=True) if not len(part.documents)]
        if empty:
            raise ValueError(
                f"data.path: expected enough records in each source to train on and to hold some out, received "
                f"{empty[0]!r}; give more, or some to evaluate on as data.held_out"
            )
        return chosen

    def _of(self, part: str) -> list[tuple[Loaded, int]]:
        return self._train if part == "train" else self._held_out

    def dataset(self, part: str, length: int) -> Dataset:
        """Return the samples to train on, or to evaluate on; raise ValueError as :meth:`parts`."""
        parts = self.parts(part, length)
        made = [self.rows(part.documents, length) for part in parts]
        return made[0] if len(made) == 1 else Mixture(made, [part.weight for part in parts])

    def packed(self, samples: Dataset, length: int) -> dict[str, Any]:
        """Return of samples how many documents they are, in how many rows, how full these are (0 to 1), and how many
        documents are cut into pieces of several rows; nothing if they are not packed."""
        parts = samples.datasets if isinstance(samples, Mixture) else [samples]
        rows = [part for part in parts if isinstance(part, PackedRows)]
        if not rows:
            return {}
        return {
            "documents": sum(len(part.documents) for part in rows),
            "rows": len(samples),
            "fill": round(sum(part.filled for part in rows) / (length * len(samples)), 4),
            "in_pieces": sum(part.in_pieces for part in rows),
        }

    def longest(self) -> int:
        """Return a length that 99 in 100 documents to train on fit into."""
        lengths = np.sort(np.concatenate([loaded.documents.lengths for loaded, _ in self._train]))
        return int(lengths[-(-99 * len(lengths) // 100) - 1])

    def tokens_in_all(self) -> int:
        """Return how many tokens the documents to train on have together."""
        return sum(int(loaded.documents.lengths.sum()) for loaded, _ in self._train)

    def cuts(self, part: str, length: int) -> dict[str, int]:
        """Return how many records there are, how many are cut, and how many are left out, and why."""
        loaded, parts = self._of(part), self.parts(part, length)
        return {
            "records": sum(len(part.documents) + part.lost for part in parts),
            "cut": sum(part.cut for part in parts),
            "longest": max(int(source.documents.lengths.max()) for source, _ in loaded),
            "targets_cut_off": sum(part.lost for part in parts),
            "without_target": sum(source.counts.without_target for source, _ in loaded),
            "files_left_out": sum(len(source.left_out) for source, _ in loaded),
        }

    def say_cuts(self, part: str, length: int) -> str:
        """Return :meth:`cuts` as a sentence, with the first record of each kind; "" if nothing is cut or left out."""
        counts, loaded, parts = self.cuts(part, length), self._of(part), self.parts(part, length)
        said = []
        if counts["cut"]:
            said.append(
                f"{counts['cut']} of {counts['records']} records are cut at data.sequence_length = {length} tokens "
                f"(the longest takes {counts['longest']})"
            )
        if counts["targets_cut_off"]:
            first = next(part.first for part in parts if part.first)
            said.append(
                f"{counts['targets_cut_off']} are left out, whose targets stand behind these tokens, the first at "
                f"{first}"
            )
        if counts["without_target"]:
            first = next(source.counts.first for source, _ in loaded if source.counts.first)
            said.append(f"{counts['without_target']} are left out {LEFT_OUT}, the first at {first}")
        if files := [text for source, _ in loaded for text in source.left_out]:
            said.append(f"{len(files)} files are left out: {some_of(files)}")
        title = "records to train on" if part == "train" else "held-out records"
        return f"{title}: {'; '.join(said)}" if said else ""

    def shown(self, length: int) -> str:
        """Return the first document to train on as text, with what is trained between marks."""
        found: Document = self.parts("train", length)[0].documents[0]
        text = marked(found, self.tokens.tokenizer.decode)
        return text if len(text) <= _SHOWN else f"{text[:_SHOWN]} ... ({len(found.ids)} tokens)"


def marked(document: Document, decode: Callable[[list[int]], str]) -> str:
    """Return a document as text, with what counts between ⟦ and ⟧."""
    edges = np.flatnonzero(np.diff(document.counts)) + 1
    text = ""
    for begin, end in zip([0, *edges], [*edges, len(document.ids)], strict=True):
        part = decode(document.ids[begin:end].tolist())
        text += f"⟦{part}⟧" if document.counts[begin] else part
    return text


def load(path: str, key: str, data: DataConfig, tokens: FolderTokens, *, divided: bool = False) -> Loaded:
    """Return the documents of one source; a process that asks again has them at once.

    Args:
        path: a file or a folder.
        key: of the configuration that names it.
        data: the configuration's section.
        tokens: the tokenizer.
        divided: see :class:`fusemesh.tokenized.sources.Source`.

    Raises:
        ValueError: it cannot be used; names file, line and remedy.
    """
    if path and is_token_file(path):
        return _load_tokens(path, tokens)
    source = Source(path, Columns(data.columns), data.encoding, key, divided)
    parts = source.parts()
    times = tuple(os.stat(file).st_mtime_ns for part in parts for _, file, _, _ in part.files)
    known = (source, tokens.path, tuple(parts), times)
    if known not in _loaded:
        # A process asks for the same few: to choose the length, to check the run, to train.
        while len(_loaded) >= 4:
            _loaded.pop(next(iter(_loaded)))
        counts, read = Counts(), Read()
        documents, names, wheres = [], [], []
        encoder = Encoder(tokens)
        for part in parts:
            for entry, document in encoder.documents(source.entries(part, read), counts):
                documents.append(document)
                names.append(entry.name)
                wheres.append(entry.where)
        source.check(read, parts)
        counts.check()
        chosen = held_out_names(names)
        held_out = np.array([name in chosen for name in names], bool)
        plain = all(document.counts[1:].all() for document in documents)
        left_out = tuple(read.undecoded)
        _loaded[known] = Loaded(path, Documents(documents), held_out, wheres, counts, left_out, plain)
    return _loaded[known]


_loaded: dict[object, Loaded] = {}


def _load_tokens(path: str, tokens: FolderTokens) -> Loaded:
    found = TokenFile(Path(path).expanduser())
    found.check_tokenizer(tokens.hashes, tokens.path)
    header = found.header
    counts = Counts(header["records"], header["chats"], header["without_target"], header["first_without_target"])
    left_out = (header["left_out"],) if header["files_left_out"] else ()
    return Loaded(path, found, found.held_out, (), counts, left_out, "counts" not in header["arrays"])
