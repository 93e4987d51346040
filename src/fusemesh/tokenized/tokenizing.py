"""A corpus as a token file: parts of its files become tokens in several processes, and one file in the end.

Each part is written to a file of its own, which appears when it is whole, so that a run that was killed goes on behind
it. The parts follow from the sources alone, and so do the bytes of the token file.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from fusemesh.hybrid.outputs import writing
from fusemesh.tasks.base import HELD_OUT_ONE_IN, hash_of
from fusemesh.tasks.corpus import some_of

from .encoder import Counts, Encoder
from .file import Writer, packed_bits
from .records import Columns
from .sources import PART_BYTES, Part, Read, Source, located

_OUT = "--out"
_PLAN = "plan.json"


@dataclass(frozen=True)
class Job:
    """What is to be made tokens of.

    paths: files and folders, in order. model: the folder with the tokenizer. columns, encoding: as those of
    :class:`fusemesh.tokenized.sources.Source`.
    """

    paths: tuple[str, ...]
    model: str
    columns: str = ""
    encoding: str = ""

    def sources(self) -> list[Source]:
        """Return the sources of the paths."""
        return [Source(path, Columns(self.columns), self.encoding, "DATA") for path in self.paths]


@dataclass(frozen=True)
class _Task:
    """One part of one source, and the file that takes its tokens."""

    source: Source
    part: Part
    model: str
    file: str


def tokenize(
    job: Job, out: Path, *, workers: int = 1, size: int = PART_BYTES, on_bytes: Callable[[int], None] | None = None
) -> dict[str, Any]:
    """Write a token file; return its header.

    Args:
        job: the sources and the tokenizer.
        out: the file, which must not exist.
        workers: processes.
        size: bytes of a part.
        on_bytes: is told of each part that is done how many bytes of the sources it has.

    Raises:
        ValueError: the data, the tokenizer or the place of the file cannot be used; names file, line and remedy.
        RuntimeError: a worker died.
    """
    from fusemesh.pretrained.tokenizer import FolderTokens

    if out.exists():
        raise ValueError(
            f"{_OUT}: expected a file that is not there, received {str(out)!r}; remove it, or name another"
        )
    tokens, sources = FolderTokens(job.model), job.sources()
    planned = [(source, source.parts(size)) for source in sources]
    tasks: list[_Task] = []
    folder = out.with_name(f"{out.name}.parts")
    for source, parts in planned:
        for part in parts:
            file = folder / f"{len(tasks):07d}.npz"
            tasks.append(_Task(source, part, job.model, str(file)))
    plan = _plan(job, tasks, tokens.hashes)
    with writing(folder, what=_OUT):
        _begin(folder, plan)
    for task in _run(tasks, workers):
        if on_bytes is not None:
            on_bytes(task.part.size)
    files = [Path(task.file) for task in tasks]
    _check(planned, files)
    with writing(out, what=_OUT):
        header = _merge(files, out, tokens, list(job.paths))
    shutil.rmtree(folder, ignore_errors=True)
    return header


def size_of(job: Job) -> int:
    """Return how many bytes the sources have."""
    return sum(part.size for source in job.sources() for part in source.parts())


def _plan(job: Job, tasks: Sequence[_Task], hashes: dict[str, str]) -> str:
    """Return what the parts depend on: where it is the same, those that are done stay."""
    files = [
        [file, begin, end, os.stat(path).st_size, os.stat(path).st_mtime_ns]
        for task in tasks
        for file, path, begin, end in task.part.files
    ]
    return json.dumps({**asdict(job), "tokenizer": hashes, "files": files}, sort_keys=True)


def _begin(folder: Path, plan: str) -> None:
    """Make the folder of the parts; empty it if they are of another plan."""
    file = folder / _PLAN
    if file.is_file() and file.read_text(encoding="utf-8") == plan:
        return
    if folder.exists():
        shutil.rmtree(folder)
    folder.mkdir(parents=True)
    _replace(file, lambda path: path.write_text(plan, encoding="utf-8"))


def _replace(file: Path, write: Callable[[Path], Any]) -> None:
    """Let a file appear when it is whole."""
    temporary = file.with_name(f"{file.stem}.{os.getpid()}.tmp{file.suffix}")
    write(temporary)
    os.replace(temporary, file)


def _run(tasks: Sequence[_Task], workers: int) -> Iterator[_Task]:
    """Make tokens of the parts that are not there yet; yield each part that is done."""
    left = []
    for task in tasks:
        if os.path.exists(task.file):
            yield task
        else:
            left.append(task)
    if workers == 1 or len(left) < 2:
        for task in left:
            _work(task)
            yield task
        return
    # Forked, a worker has the tokenizer at once; its own threads would compete with the other workers'.
    kind = "fork" if sys.platform == "linux" else "spawn"
    context = multiprocessing.get_context(kind)
    with ProcessPoolExecutor(workers, context, initializer=_alone) as pool:
        rest = iter(left)
        running = {pool.submit(_work, task): task for task in islice(rest, 2 * workers)}
        try:
            while running:
                done, _ = wait(running, return_when=FIRST_COMPLETED)
                for future in done:
                    task = running.pop(future)
                    future.result()
                    yield task
                    if (following := next(rest, None)) is not None:
                        running[pool.submit(_work, following)] = following
        except BrokenProcessPool:
            raise RuntimeError(
                "a worker died, as it does where memory runs out; start again, with fewer --workers: parts that are "
                "done are kept"
            ) from None
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def _alone() -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"


def _work(task: _Task) -> None:
    """Make tokens of a part and write them."""
    from fusemesh.pretrained.tokenizer import FolderTokens

    tokens, counts, read = FolderTokens(task.model), Counts(), Read()
    ids, targets, hashes = [np.zeros(0, np.int32)], [np.zeros(0, bool)], []
    lengths, firsts = [], []
    plain = True
    for entry, document in Encoder(tokens).documents(task.source.entries(task.part, read), counts):
        ids.append(document.ids)
        targets.append(document.counts)
        lengths.append(len(document.ids))
        firsts.append(int(document.counts.argmax()))
        plain = plain and bool(document.counts[1:].all())
        hashes.append(hash_of(entry.name))
    said = {**asdict(counts), **asdict(read), "first": located(counts.first, task.part), "plain": plain}

    def write(path: Path) -> None:
        np.savez(
            path,
            ids=np.concatenate(ids),
            counts=np.concatenate(targets),
            lengths=np.array(lengths, np.int64),
            first_targets=np.array(firsts, np.int32),
            hashes=np.array(hashes, np.uint64),
            said=np.frombuffer(json.dumps(said).encode(), np.uint8),
        )

    with writing(task.file, what=_OUT):
        _replace(Path(task.file), write)


def _parts(files: Sequence[Path], name: str) -> Iterator[np.ndarray]:
    """Yield one array of each part."""
    for file in files:
        with np.load(file) as found:
            yield found[name]


def _said(files: Sequence[Path]) -> list[dict[str, Any]]:
    return [json.loads(part.tobytes()) for part in _parts(files, "said")]


def _check(planned: Sequence[tuple[Source, list[Part]]], files: Sequence[Path]) -> None:
    """Check that each source had text, and something to learn."""
    at = 0
    for source, parts in planned:
        read, counts = Read(), Counts()
        for said in _said(files[at : at + len(parts)]):
            read.texts += said["texts"]
            read.undecoded += said["undecoded"]
            counts.records += said["records"]
            counts.without_target += said["without_target"]
            counts.first = counts.first or said["first"]
        at += len(parts)
        source.check(read, parts)
        counts.check()


def _held_out(files: Sequence[Path]) -> np.ndarray:
    """Return which documents are held out, by their names' hashes: at least one, and not all."""
    hashes = np.concatenate([np.zeros(0, np.uint64), *_parts(files, "hashes")])
    found: np.ndarray = hashes % np.uint64(HELD_OUT_ONE_IN) == 0
    if not found.any() and len(hashes) and hashes.min() < hashes.max():
        found = hashes == hashes.min()
    elif found.all():
        found = hashes != hashes.max()
    return found


def _merge(files: Sequence[Path], out: Path, tokens: Any, names: list[str]) -> dict[str, Any]:
    """Write the token file of the parts."""
    said = _said(files)
    vocabulary = len(tokens.tokenizer)
    plain = all(part["plain"] for part in said)
    lengths = np.concatenate([np.zeros(0, np.int64), *_parts(files, "lengths")])
    targets = sum(int(part.sum()) for part in _parts(files, "counts"))
    writer = Writer(out)
    try:
        writer.add("offsets", "<i8", [np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths)])])
        writer.add("ids", "<u2" if vocabulary <= 1 << 16 else "<i4", _parts(files, "ids"))
        if not plain:
            writer.add("counts", "|u1", packed_bits(_parts(files, "counts")))
            writer.add("first_targets", "<i4", _parts(files, "first_targets"))
        held_out = _held_out(files)
        writer.add("held_out", "|u1", packed_bits([held_out]))
        undecoded = [error for part in said for error in part["undecoded"]]
        return writer.finish(
            {
                "tokenizer": tokens.hashes,
                "vocabulary": vocabulary,
                "source": names,
                "documents": len(lengths),
                "held_out": int(held_out.sum()),
                "tokens": int(lengths.sum()),
                "targets": targets,
                "records": sum(part["records"] for part in said),
                "chats": sum(part["chats"] for part in said),
                "without_target": sum(part["without_target"] for part in said),
                "first_without_target": next((part["first"] for part in said if part["first"]), ""),
                "files_left_out": len(undecoded),
                "left_out": some_of(undecoded),
            }
        )
    except BaseException:
        writer.drop()
        raise


def say(header: dict[str, Any]) -> str:
    """Return in a line what a token file holds, and in further ones what was left out of it."""
    lines = [
        f"{header['documents']} documents, {header['tokens']} tokens, {header['targets']} of them targets; "
        f"{header['held_out']} documents are held out"
    ]
    if header["without_target"]:
        lines.append(
            f"left out: {header['without_target']} of {header['records']} records without a target, the first at "
            f"{header['first_without_target']}"
        )
    if header["files_left_out"]:
        lines.append(f"left out: {header['files_left_out']} files of another encoding: {header['left_out']}")
    return "\n".join(lines)
