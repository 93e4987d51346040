"""Records of three kinds in .jsonl files and token files, and what runs on them take."""

from __future__ import annotations

import json
from pathlib import Path

from fusemesh.config import Config
from fusemesh.tasks.registry import build_task
from fusemesh.tokenized.tokenizing import Job, tokenize

from . import runs
from .chats import chat, lines

CHATS = [chat(f"What is {n}?", f"It is {n} and a fox.", "And?", "The dog " * (n % 5 + 1)) for n in range(60)]
TEXTS = [{"text": f"{n}: the lazy dog sleeps on. " * (n % 9 + 1)} for n in range(40)]
PROMPTS = [{"prompt": f"{n} " + "What? " * (n % 24 + 1), "completion": " It."} for n in range(60)]


def make_data(path: Path, folder: Path) -> Path:
    """Write the records of each kind, and the token files of the tokenizer of ``folder``; return the path."""
    for name, items in (("chats", CHATS), ("texts", TEXTS), ("prompts", PROMPTS)):
        (path / f"{name}.jsonl").write_text(lines(items), encoding="utf-8")
        tokenize(Job((str(path / f"{name}.jsonl"),), str(folder)), path / f"{name}.tokens", size=700)
    return path


def settings(folder: Path, path: Path | str, directory: Path | str = "unused", **more: str) -> Config:
    """The configuration of a run."""
    # A sample each, unless more says otherwise.
    own = {"data__sequence_length": "48", "data__packing": "false", "training__steps": "3", **more}
    return runs.settings(folder, str(path), Path(directory), **own)


def rows_of(configured: Config, part: str = "train") -> list[tuple[list[int], list[int]]]:
    """Tokens and targets of all samples."""
    samples = getattr(build_task(configured), part)
    batch = samples.batch(range(len(samples)))
    return [(tokens.tolist(), targets.tolist()) for tokens, targets in zip(batch.tokens, batch.targets, strict=True)]


def samples_of(directory: Path) -> list[int]:
    """The samples of all steps in order, those of all replicas."""
    found: dict[tuple[int, int], list[int]] = {}
    for path in sorted((directory / "samples").glob("*.jsonl")):
        for line in map(json.loads, path.read_text().splitlines()):
            found[line["step"], line["replica"]] = line["samples"]
    return [number for key in sorted(found) for number in found[key]]
