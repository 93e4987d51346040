"""The identity of a run's data: sizes and hashes, saved with each checkpoint, and what has changed since."""

from __future__ import annotations

import dataclasses
import hashlib
import os
from collections.abc import Mapping, Sequence
from typing import Any

from fusemesh.config import Config
from fusemesh.hybrid.outputs import size_text
from fusemesh.tasks.registry import task_class
from fusemesh.tokenized.mixture import absolute, sources_in

_PARTS = ("path", "held_out")


def with_absolute_paths(config: Config) -> Config:
    """Return the configuration with data and a pretrained model that are found from any folder."""

    def found(section: Any, names: Sequence[str]) -> Any:
        given = {name: getattr(section, name) for name in names}
        return dataclasses.replace(section, **{name: absolute(path) for name, path in given.items() if path})

    return dataclasses.replace(config, data=found(config.data, _PARTS), model=found(config.model, ("pretrained",)))


def fingerprint(config: Config) -> dict[str, Any]:
    """Return, for ``data.path`` and ``data.held_out``, the number of files and bytes and their SHA-256, in which names
    within a folder count; or the version of the default corpus, as ``corpus``.

    Raises:
        OSError: a file cannot be read.
    """
    kind = task_class(config.task)
    if not config.data.path:
        found: dict[str, Any] = {"corpus": kind.default_version()}
    else:
        found = {"path": _entry(kind, config.data.path)}
    if config.data.held_out:
        found["held_out"] = _entry(kind, config.data.held_out)
    return found


def evaluated(config: Config) -> Config:
    """Return the configuration with those data alone that an evaluation reads."""
    if not config.data.held_out:
        return config
    # The corpus of a task without data.path costs nothing.
    return dataclasses.replace(config, data=dataclasses.replace(config.data, path=""))


def _entry(kind: Any, path: str) -> dict[str, Any]:
    digest, files, size = hashlib.sha256(), 0, 0
    for name, content in kind.files_of(path):
        digest.update(f"{name}\0{len(content)}\0".encode())
        digest.update(content)
        files, size = files + 1, size + len(content)
    return {"files": files, "bytes": size, "sha256": digest.hexdigest()}


def places_of(config: Config) -> str:
    """Return a digest of where the data's files lie: their paths, devices, numbers there, sizes, and the times of their
    last changes; "" if there are none, or one cannot be found."""
    found = hashlib.sha256()
    given = [path for path in (config.data.path, config.data.held_out) if path]
    paths = [source.path for path in given for source in sources_in(path)]
    try:
        for top in paths:
            inner = [os.path.join(folder, name) for folder, _, names in os.walk(top) for name in names]
            for path in sorted(inner) if os.path.isdir(top) else [top]:
                stat = os.stat(path)
                found.update(
                    f"{path}\0{stat.st_dev}\0{stat.st_ino}\0{stat.st_size}\0{stat.st_mtime_ns}\0".encode(
                        errors="surrogateescape"
                    )
                )
    except OSError:
        return ""
    return found.hexdigest() if paths else ""


def changes(
    saved: Mapping[str, Any], now: Mapping[str, Any], *, before: str = "was", after: str = "and is"
) -> list[str]:
    """Return what differs between two fingerprints, as text; [] if nothing does."""
    found = []
    for part in ("corpus", *_PARTS):
        old, new = saved.get(part), now.get(part)
        if old != new:
            key = "data.path" if part == "corpus" else f"data.{part}"
            found.append(f"{key} {before} {_text(old, new)}, {after} {_text(new, old)}")
    return found


def _text(entry: Any, other: Any) -> str:
    if entry is None:
        return "not given"
    if not isinstance(entry, Mapping):
        return str(entry)
    files = f" in {entry['files']} files" if entry["files"] != 1 else ""
    text = f"{size_text(entry['bytes'])}{files}"
    if isinstance(other, Mapping):
        same = all(entry[key] == other[key] for key in ("files", "bytes"))
        text = f"of SHA-256 {entry['sha256'][:12]}..." if same else f"{entry['bytes']:,} bytes{files}"
    return text


def check_evaluated(saved: Mapping[str, Any] | None, config: Config, given: Mapping[str, str]) -> None:
    """Check that an evaluation's data are those of the command line, or those of the run, unchanged.

    Args:
        saved: the fingerprint saved with the model; None for a model of an older version.
        config: of the evaluation.
        given: the keys that the command line gives.

    Raises:
        ValueError: they are not; says how to evaluate on other records.
    """
    if "data.held_out" in given:
        return
    advice = "give the records to evaluate on as --data.held_out FILE"
    part = "held_out" if config.data.held_out else "path"
    path = getattr(config.data, part)
    if not path:
        here = task_class(config.task).default_version()
        if saved is not None and saved.get("corpus", here) != here:
            raise ValueError(
                f"data.path: the model was trained on the default corpus of {saved['corpus']}, and this is {here}, of "
                f"which other samples are held out; {advice}"
            )
        return
    try:
        for source in sources_in(path):
            os.stat(source.path)
        now = {} if saved is None else _entry(task_class(config.task), path)
    except OSError as error:
        raise ValueError(
            f"data.{part}: the held-out records are in {path!r}, and it cannot be read ({error.strerror}); {advice}"
        ) from error
    if saved is not None and saved.get(part) != now:
        raise ValueError(
            f"data.{part}: {path!r} is not what the model was trained with "
            f"(that was {_text(saved.get(part), now)}, this is {_text(now, saved.get(part))}); {advice}"
        )
