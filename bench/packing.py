"""How much faster is training on packed rows than on padded ones?

    python -m bench.packing [--runs 5] [--rows 4] [--threads 2]

A small Llama with SmolLM-135M's proportion of head to blocks (8 blocks of width 384, 8192 tokens, attention ours) takes
rows of 512 tokens in fp32, forward, the loss and backward, in one process on two threads. Documents are random tokens;
their lengths are those of the standard library's docstrings, four bytes a token, or log-normal ones of which padded
rows are 39 % full, little below the 40 % up to which packing must double the speed. The contenders take turns, on other
rows each time; a ratio is of a pair of turns, and the median counts; beside it that of processors' time, which other
programs on the machine change less. Both are first compared: the loss of the same documents.

What is measured is target tokens per second: padding is computed and counts for nothing. The head's products are of
rows that count alone, packed or not, so packing gains in the blocks only.

Prediction, written before the first run, when the fills were known: packed rows are 99.9 % full, so the blocks do
0.999 / 0.39 = 2.55 times less. The head, whose products with targets are as many either way, takes 4.2 where blocks
take 12.5, so the speed is 2.2 times at 39 %, a little more by attention to short documents. Docstrings fill padded rows
by 10 %: 10 times less in the blocks, 8 times the speed.

Found on two cores of an AMD EPYC (family 26), idle, torch 2.13, seven pairs: 3.16 times (1.56 to 7.09, as padded rows
differ in how full they are) at 39 %, and 9.17 (3.07 to 15.85) with docstrings; in processors' time the same. Both are
more than predicted; the reason was not looked for.
"""

from __future__ import annotations

import argparse
import ast
import json
import os
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fusemesh.hybrid.hugging_face.families import prepare
from fusemesh.hybrid.hugging_face.stages import as_trainable
from fusemesh.integrations.transformers import register
from fusemesh.kernels.measure import results
from fusemesh.tasks.base import IGNORED, Dataset
from fusemesh.tasks.corpus import read_documents
from fusemesh.tokenized.document import Document
from fusemesh.tokenized.documents import Documents
from fusemesh.tokenized.packing import PackedRows
from fusemesh.tokenized.padded import PaddedRows

LENGTH, VOCABULARY = 512, 8192
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 384,
    "intermediate_size": 1024,
    "num_hidden_layers": 8,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": LENGTH,
    "use_cache": False,
}
FLOOR, FULL = 2.0, 0.4  # the speed where padded rows are less than so full
_DOCUMENTS = 8000
_BYTES = 4  # of a token


def lengths_of(kind: str) -> np.ndarray:
    """Return the lengths of documents in tokens, each of which fits a row."""
    draw = np.random.default_rng(0)
    if kind == "log-normal":
        lengths = draw.lognormal(np.log(158), 0.85, _DOCUMENTS)
    else:
        lengths = draw.permutation([len(text.encode()) for text in docstrings()]) / _BYTES
    return np.clip(lengths, 2, LENGTH + 1).astype(np.int64)


def docstrings() -> list[str]:
    """Return the docstrings of the standard library."""
    documents, _ = read_documents("", "data.path", "")
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    trees = (ast.parse(text) for text in documents.values())
    nodes = (node for tree in trees for node in ast.walk(tree) if isinstance(node, kinds))
    return [text for node in nodes if (text := ast.get_docstring(node))]


def make_documents(lengths: np.ndarray) -> Documents:
    """Return random documents, all of whose tokens but the first count."""
    draw = np.random.default_rng(1)
    return Documents(
        Document(draw.integers(1, VOCABULARY, size).astype(np.int32), np.arange(size) > 0) for size in lengths.tolist()
    )


def make_model() -> Any:
    """Return the model, in training."""
    import transformers

    register()
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(
        transformers.LlamaConfig(**SIZES), attn_implementation="fusemesh"
    )
    prepare(model)
    return as_trainable(model).train()


def take(model: Any, samples: Dataset, rows: np.ndarray) -> tuple[int, float, tuple[float, float]]:
    """Do forward and backward of some rows; return the targets, the summed loss, and seconds: the wall's, and the
    processors'."""
    batch = samples.batch(rows)
    tokens, targets = torch.from_numpy(batch.tokens), torch.from_numpy(batch.targets)
    inputs = {name: torch.from_numpy(values) for name, values in batch.inputs.items()}
    count = int((batch.targets != IGNORED).sum())
    model.zero_grad()
    start, spent = time.perf_counter(), time.process_time()
    loss = model.loss_and_gradients(tokens, targets, count, **inputs)
    return count, float(loss), (time.perf_counter() - start, time.process_time() - spent)


def compare(model: Any) -> None:
    """Check that the loss of some documents is the same packed and padded."""
    documents = make_documents(lengths_of("log-normal")[:12])
    found = []
    for kind in (PaddedRows, PackedRows):
        samples = kind(documents, LENGTH, 0)
        count, loss, _ = take(model, samples, np.arange(len(samples)))
        found.append((count, loss))
    (count, loss), (packed_count, packed_loss) = found
    assert count == packed_count, found
    assert abs(packed_loss - loss) <= 1e-5 * abs(loss), found


def measure(model: Any, kind: str, runs: int, rows: int) -> dict[str, Any]:
    """Return target tokens per second, padded and packed, and the ratios of their times and of processors' time."""
    documents = make_documents(lengths_of(kind))
    samples: dict[str, Any] = {
        "padded": PaddedRows(documents, LENGTH, 0),
        "packed": PackedRows(documents, LENGTH, 0),
    }
    inputs = int((documents.lengths - 1).sum())
    fills = {name: inputs / (LENGTH * len(found)) for name, found in samples.items()}
    rates: dict[str, list[np.ndarray]] = {name: [] for name in samples}
    for run in range(-1, runs):  # the first warms up
        # Each is first in every other run.
        for name in sorted(samples, reverse=bool(run % 2)):
            numbers = np.random.default_rng(run + 1).choice(len(samples[name]), rows, replace=False)
            count, _, seconds = take(model, samples[name], numbers)
            if run >= 0:
                rates[name].append(count / np.array(seconds))
    ratios = np.stack(rates["packed"]) / np.stack(rates["padded"])
    ratio, of_cpu = np.median(ratios, axis=0).tolist()
    return {
        "lengths": kind,
        "fills": fills,
        "tokens_per_s": {name: np.stack(found)[:, 0].tolist() for name, found in rates.items()},
        "ratios": ratios[:, 0].tolist(),
        "ratio": ratio,
        "ratio_of_cpu": of_cpu,
    }


def main() -> None:
    """Measure, print a table, and write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--threads", type=int, default=2)
    chosen = parser.parse_args()
    torch.set_num_threads(chosen.threads)
    model = make_model()
    compare(model)
    record, loads = results.machine(), [os.getloadavg()[0]]
    found = []
    print(f"{'lengths':12} {'':7} {'full':>6} {'targets/s':>10} {'ratio':>6}   {'of the runs':13} of processors' time")
    for kind in ("log-normal", "docstrings"):
        row = measure(model, kind, chosen.runs, chosen.rows)
        found.append(row)
        said = f"{row['ratio']:6.2f}   {min(row['ratios']):.2f} to {max(row['ratios']):5.2f}  {row['ratio_of_cpu']:.2f}"
        for name, ratio in (("padded", ""), ("packed", said)):
            rate = statistics.median(row["tokens_per_s"][name])
            print(f"{kind:12} {name:7} {row['fills'][name]:6.1%} {rate:10.0f} {ratio}", flush=True)
        assert row["fills"]["padded"] < FULL
    loads.append(os.getloadavg()[0])
    target = Path(__file__).parent / "results" / results.machine_name(record)
    target.mkdir(parents=True, exist_ok=True)
    written = {
        "stage": "packing",
        "machine": record,
        "load": loads,
        "threads": chosen.threads,
        "rows": chosen.rows,
        "results": found,
    }
    (target / "packing.json").write_text(json.dumps(written, indent=1) + "\n", encoding="utf-8")
    slow = [row["lengths"] for row in found if row["ratio"] < FLOOR]
    if slow:
        raise SystemExit(f"packed rows are less than {FLOOR} times as fast: {', '.join(slow)}")


if __name__ == "__main__":
    main()
