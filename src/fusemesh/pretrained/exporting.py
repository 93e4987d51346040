"""The end of a run as a Hugging Face folder, as its checkpoints say: the folder that it came from may be gone."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fusemesh.hybrid.hugging_face.export import Options, export_state
from fusemesh.hybrid.hugging_face.exports import documents
from fusemesh.hybrid.hugging_face.exports.shards import SourceFiles


def export_as_planned(model: Any, target: Path, known: Mapping[str, Any], small: str | os.PathLike[str]) -> None:
    """Write a placed model as the folder that it was loaded from, with its new weights; every rank calls it.

    Args:
        known: as :func:`fusemesh.hybrid.hugging_face.merge.export_plan` gives it.
        small: the folder of the small files.
    """

    def write_documents(place: Path) -> None:
        documents.copy_small_files(Path(small), place)
        (place / documents.CONFIG).write_text(known["config"], encoding="utf-8", newline="")

    export_state(model, target, Options(SourceFiles.from_json(known["source"]), known["prefix"]), write_documents)
