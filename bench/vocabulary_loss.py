"""How long does the loss of a language model take, and in how much memory, with logits and without?

    python -m bench.vocabulary_loss [--runs 3] [--rows 1024]

The head of a model of 150k tokens (hidden size 1024), forward and backward: F.linear and F.cross_entropy in fp32, as
Hugging Face's models compute it, against ``fused_linear_cross_entropy``; all rows counting, and one in four, as in
chats. Each contender is a process of its own, on two threads, whose peak resident set is compared with that before the
first call.

Prediction, written before the first run: it computes the logits twice, so it takes 4/3 of the time where all rows
count, and a third of the plain one's where one in four does; memory is some chunks of 64 MiB beside the gradients,
against three times the logits, 1.7 GiB in fp32.

Found on two cores of an AMD EPYC (family 26), torch 2.13: fp32 1.21 of the plain time where all rows count and 0.21
where one in four does; bf16 1.15 and 0.94. Memory 768 and 881 MiB against 1799 in fp32, 474 and 634 against 1793 in
bf16, of which the weight's gradient is 594 and 297.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F

import fusemesh
from fusemesh.kernels.measure import results

HIDDEN, VOCABULARY = 1024, 151936
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
CONTENDERS = ("plain", "fusemesh")


def _status(name: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name + ":"))
    return int(line.split()[1]) * 1024


def measure(contender: str, dtype: str, rows: int, one_in: int, runs: int) -> dict[str, Any]:
    """Return seconds of the runs, bytes beside what is there before, and the loss."""
    torch.set_num_threads(2)
    torch.manual_seed(0)
    h = torch.randn(rows, HIDDEN, dtype=DTYPES[dtype], requires_grad=True)
    weight = (0.02 * torch.randn(VOCABULARY, HIDDEN)).to(DTYPES[dtype]).requires_grad_()
    targets = torch.randint(0, VOCABULARY, (rows,))
    targets[torch.arange(rows) % one_in != 0] = -100
    # The gradients have their memory before: what is measured is beside them.
    h.grad, weight.grad = torch.zeros_like(h), torch.zeros_like(weight)

    def loss() -> torch.Tensor:
        if contender == "plain":
            return F.cross_entropy(F.linear(h, weight).float(), targets)
        count = (targets >= 0).sum()
        return fusemesh.fused_linear_cross_entropy(h, weight, targets).sum() / count

    before = _status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak is that from here on
    seconds = []
    for _ in range(runs):
        start = time.perf_counter()
        value = loss()
        value.backward()
        seconds.append(time.perf_counter() - start)
    return {"seconds": seconds, "bytes": _status("VmHWM") - before, "loss": value.item()}


def main() -> None:
    """Measure, print a table, and write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--rows", type=int, default=1024)
    parser.add_argument("--one", nargs=3, help=argparse.SUPPRESS)  # contender, dtype, one_in: in this process
    chosen = parser.parse_args()
    if chosen.one:
        contender, dtype, one_in = chosen.one
        print(json.dumps(measure(contender, dtype, chosen.rows, int(one_in), chosen.runs)))
        return
    rows: list[dict[str, Any]] = []
    print(f"{'dtype':9} {'counts':>7} {'':9} {'s':>7} {'x':>6} {'MiB':>7} {'loss':>9}   x: of the plain one's time")
    for dtype in DTYPES:
        for one_in in (1, 4):
            plain = 0.0
            for contender in CONTENDERS:
                command = [sys.executable, "-m", "bench.vocabulary_loss", "--one", contender, dtype, str(one_in)]
                command += ["--runs", str(chosen.runs), "--rows", str(chosen.rows)]
                done = subprocess.run(command, capture_output=True, text=True, check=True, env=dict(os.environ))
                found = json.loads(done.stdout.splitlines()[-1])
                seconds = statistics.median(found["seconds"])
                plain = seconds if contender == "plain" else plain
                rows.append({"dtype": dtype, "one_in": one_in, "contender": contender, **found})
                print(
                    f"{dtype:9} {f'1/{one_in}':>7} {contender:9} {seconds:7.2f} {seconds / plain:6.2f} "
                    f"{found['bytes'] / 2**20:7.0f} {found['loss']:9.5f}",
                    flush=True,
                )
    record = results.machine()
    target = Path(__file__).parent / "results" / results.machine_name(record)
    target.mkdir(parents=True, exist_ok=True)
    written = {"stage": "vocabulary_loss", "machine": record, "rows": chosen.rows, "runs": chosen.runs, "results": rows}
    (target / "vocabulary_loss.json").write_text(json.dumps(written, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
