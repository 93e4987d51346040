"""How fast are records made a token file, beside the tokenizer alone?

    python -m bench.tokenising [--runs 3] [--megabytes 30] [--workers 2]

The texts are the standard library's source, repeated to so many megabytes, as JSON lines of {"text"} and as chats of
two turns; the tokenizer is a byte-level BPE of 8,000 tokens trained on a part of them. The contenders, in a shuffled
order:

- tokenizer: ``encode_batch_fast`` of the tokenizers package on the same texts, which are in memory already, 256 at a
  time, on its own threads. What is timed ends with its own objects: nobody has asked for the ids yet;
- ids: the same, and the ids of each text as an array, which is the least that anybody can use;
- texts, chats: ``fusemesh tokenize`` of the file: reading, JSON, tokens, targets, hashes, parts on disk, the whole
  file.

MB are of the texts, without JSON. Times are the wall's on a machine that others use, so processors' time stands beside
it: of this process, its threads and its workers.

Prediction, written before the first run: of the processors' time the tokenizer takes nine tenths, so texts run at 0.85
to 0.95 of the tokenizer alone with as many workers as cores. transformers' lists of ids and the arrays made of them are
most of the rest. Chats render and encode the first turn a second time: 0.5 to 0.6.

Found on two cores of an AMD EPYC (family 26), idle, 2 workers: the tokenizer alone 9.7 MB/s, texts 6.4 (0.66 of it),
chats 3.5 (0.36), less than predicted. transformers' encode_batch, which keeps offsets that nobody asks for, costs a
fifth more than encode_batch_fast; the rest is lists of ids and JSON. Of these chats, cut anywhere, one in six has an
answer that begins with blanks and is encoded a second time, in pieces.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from fusemesh.kernels.measure import results
from fusemesh.tasks.corpus import in_order, read_documents
from fusemesh.tokenized.tokenizing import Job, tokenize

_TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
_BATCH = 256
_CHARACTERS = 4000  # of a record


def texts_of(size: int) -> list[str]:
    """Return texts of about so many bytes together."""
    documents, _ = read_documents("", "data.path", "")
    whole = [text.decode("utf-8", "replace") for text in in_order(documents)]
    pieces = [text[at : at + _CHARACTERS] for text in whole for at in range(0, len(text), _CHARACTERS)]
    found, total = [], 0
    while total < size:
        for piece in pieces:
            found.append(piece)
            total += len(piece.encode())
            if total >= size:
                break
    return found


def make_model(path: Path, texts: list[str]) -> None:
    """Write a folder with a tokenizer, and a configuration."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<pad>", "</s>", "<|im_start|>", "<|im_end|>"]
    tokenizer.train_from_iterator(
        texts[:500], trainers.BpeTrainer(vocab_size=8000, special_tokens=special, show_progress=False)
    )
    made = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>")
    made.add_special_tokens({"additional_special_tokens": special[2:]})
    made.chat_template = _TEMPLATE
    made.save_pretrained(path)
    transformers.LlamaConfig(
        vocab_size=8000, hidden_size=32, num_attention_heads=2, num_hidden_layers=1
    ).save_pretrained(path)


def _spent() -> float:
    own, workers = resource.getrusage(resource.RUSAGE_SELF), resource.getrusage(resource.RUSAGE_CHILDREN)
    return own.ru_utime + own.ru_stime + workers.ru_utime + workers.ru_stime


def contenders(folder: Path, texts: list[str], workers: int) -> dict[str, Callable[[], Any]]:
    """Return what is timed by its name."""
    model = folder / "model"
    make_model(model, texts)
    half = _CHARACTERS // 2
    chats = [
        {"messages": [{"role": "user", "content": t[:half]}, {"role": "assistant", "content": t[half:]}]} for t in texts
    ]
    for name, items in (("texts", [{"text": text} for text in texts]), ("chats", chats)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items), encoding="utf-8")
    plain = Tokenizer.from_file(str(model / "tokenizer.json"))

    def alone(ids: bool) -> None:
        for first in range(0, len(texts), _BATCH):
            encodings = plain.encode_batch_fast(texts[first : first + _BATCH])
            if ids:
                _ = [np.asarray(encoding.ids, np.int32) for encoding in encodings]

    def made(name: str) -> None:
        out = folder / f"{name}.tokens"
        tokenize(Job((str(folder / f"{name}.jsonl"),), str(model)), out, workers=workers)
        out.unlink()

    return {
        "tokenizer": lambda: alone(False),
        "ids": lambda: alone(True),
        "texts": lambda: made("texts"),
        "chats": lambda: made("chats"),
    }


def measure(size: int, runs: int, workers: int) -> list[dict[str, Any]]:
    """Return a row for each contender."""
    texts = texts_of(size)
    total = sum(len(text.encode()) for text in texts)
    takes: dict[str, list[tuple[float, float]]] = {}
    with tempfile.TemporaryDirectory(prefix="fusemesh-tokenising-") as folder:
        found = contenders(Path(folder), texts, workers)
        todo = list(found) * runs
        random.Random(0).shuffle(todo)
        for name in todo:
            start, spent = time.perf_counter(), _spent()
            found[name]()
            takes.setdefault(name, []).append((time.perf_counter() - start, _spent() - spent))
            print(name, f"{takes[name][-1][0]:.2f} s, {takes[name][-1][1]:.2f} s of processors", flush=True)
    rows = []
    for name in found:
        seconds, cpu = (statistics.median(take[which] for take in takes[name]) for which in (0, 1))
        rows.append({"contender": name, "seconds": seconds, "cpu_seconds": cpu, "bytes": total})
    for row in rows:
        row["mb_per_s"] = total / row["seconds"] / 1e6
        row["of_tokenizer"] = rows[0]["seconds"] / row["seconds"]
        row["of_tokenizer_cpu"] = rows[0]["cpu_seconds"] / row["cpu_seconds"]
    return rows


def main() -> None:
    """Measure, print a table, and write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--megabytes", type=int, default=30)
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    chosen = parser.parse_args()
    rows = measure(chosen.megabytes * 1_000_000, chosen.runs, chosen.workers)
    print(f"{'':10} {'MB/s':>7} {'of it':>6} {'cpu s':>7} {'of it':>6}")
    for row in rows:
        print(
            f"{row['contender']:10} {row['mb_per_s']:7.2f} {row['of_tokenizer']:6.2f} {row['cpu_seconds']:7.2f} "
            f"{row['of_tokenizer_cpu']:6.2f}"
        )
    record = results.machine()
    target = Path(__file__).parent / "results" / results.machine_name(record)
    target.mkdir(parents=True, exist_ok=True)
    written = {"stage": "tokenising", "machine": record, "workers": chosen.workers, "runs": chosen.runs, "rows": rows}
    (target / "tokenising.json").write_text(json.dumps(written, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
