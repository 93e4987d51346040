"""A task whose data are records of a user's file, or of a default corpus."""

from __future__ import annotations

import functools
import math
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from fusemesh.models.registry import maker_of

from .base import Examples, Task
from .records import Fields, Record, load_records, read_held_out

if TYPE_CHECKING:
    from fusemesh.config import Config

_LEAST_LENGTH, _MOST_LENGTH = 16, 1024  # chosen, in tokens; multiples of the least
_COVERED = 0.99  # of the records


class RecordTask(Task):
    """``fields`` names the values of a record, and ``optional_fields`` those that it may have; ``split_by`` is the
    number of the one whose hash decides that a record is held out, where no file of them is given; ``corpus`` names the
    default corpus."""

    fields: Sequence[str]
    optional_fields: Sequence[str] = ()
    split_by = 0
    corpus: str

    def __init__(self, config: Config, metadata: Mapping[str, Any] | None = None) -> None:
        self.maker = maker_of(config)
        super().__init__(config, metadata)

    @staticmethod
    @abstractmethod
    def default_records() -> tuple[list[Record], list[Record]]:
        """Return the default corpus: records to train on, and held out ones."""

    @abstractmethod
    def examples(self, records: Sequence[Record]) -> Examples:
        """Return records as samples, in terms of the metadata.

        Raises:
            ValueError: a record that does not fit the task or the metadata; names file, line and remedy.
        """

    @abstractmethod
    def length_of(self, record: Record) -> int:
        """Return the ``data.sequence_length`` that a record takes uncut."""

    def lengths_of(self, records: Sequence[Record]) -> list[int]:
        """Return :meth:`length_of` of each record."""
        return [self.length_of(record) for record in records]

    def metadata_of(self, records: Sequence[Record]) -> Mapping[str, Any]:
        """Return the metadata that these records to train on give."""
        return {}

    @property
    def source(self) -> str:
        """Where the data are from."""
        return self.config.data.path or self.corpus

    def find_metadata(self) -> Mapping[str, Any]:
        return self.metadata_of(self._records[0])

    def choose_length(self) -> int:
        """Return a multiple of 16 that nearly all records fit into, 1024 at most, or what a pretrained model takes."""
        if not self.config.data.path and not self.maker.refines:
            from .registry import defaults_of

            default: int = defaults_of(self.config.task)["data.sequence_length"]
            return default
        lengths = sorted(length for part in self._records for length in self.lengths_of(part))
        most = min(_MOST_LENGTH, self.maker.longest) if self.maker.refines else _MOST_LENGTH
        covered = lengths[math.ceil(_COVERED * len(lengths)) - 1]
        return min(most, -(-max(covered, _LEAST_LENGTH) // _LEAST_LENGTH) * _LEAST_LENGTH)

    @functools.cached_property
    def _records(self) -> tuple[list[Record], list[Record]]:
        found = load_records(self.config.data, self._all_fields, self.default_records, self.split_by)
        return found if self.config.data.held_out or not self.config.data.path else self.balanced(*found)

    def balanced(self, train: list[Record], held_out: list[Record]) -> tuple[list[Record], list[Record]]:
        """Return what the hash chose to train on and to hold out, changed if the task cannot take it so."""
        return train, held_out

    @property
    def _all_fields(self) -> Fields:
        return Fields(self.fields, self.optional_fields)

    @functools.cached_property
    def held_out_records(self) -> list[Record]:
        """The records of ``held_out``."""
        if self.config.data.held_out and "_records" not in vars(self):
            return read_held_out(self.config.data, self._all_fields)
        return self._records[1]

    def read_train(self) -> Examples:
        return self.examples(self._records[0])

    def read_held_out(self) -> Examples:
        return self.examples(self.held_out_records)
