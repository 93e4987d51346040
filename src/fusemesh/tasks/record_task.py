"""A task whose data are records of a user's file, or of a default corpus."""

from __future__ import annotations

import functools
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

from .base import Examples, Task
from .records import Record, load_records, read_records


class RecordTask(Task):
    """``fields`` names the values of a record; ``split_by`` is the one whose hash decides that a record is held out,
    where no file of them is given; ``corpus`` names the default corpus."""

    fields: Sequence[str]
    split_by = 0
    corpus: str

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

    def metadata_of(self, records: Sequence[Record]) -> Mapping[str, Any]:
        """Return the metadata that these records to train on give."""
        return {}

    @property
    def source(self) -> str:
        """Where the data are from."""
        return self.config.data.path or self.corpus

    def find_metadata(self) -> Mapping[str, Any]:
        return self.metadata_of(self._records[0])

    @functools.cached_property
    def _records(self) -> tuple[list[Record], list[Record]]:
        return load_records(self.config.data, self.fields, self.default_records, self.split_by)

    @functools.cached_property
    def held_out_records(self) -> list[Record]:
        """The records of ``held_out``."""
        data = self.config.data
        if data.held_out and "_records" not in vars(self):
            return read_records(data.held_out, self.fields, data.columns)
        return self._records[1]

    def read_train(self) -> Examples:
        return self.examples(self._records[0])

    def read_held_out(self) -> Examples:
        return self.examples(self.held_out_records)
