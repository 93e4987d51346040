"""How fast, and in how much memory, does a model of at least 1 GiB become a Hugging Face folder on 1, 2 and 4 ranks?

    python -m bench.pretrained_export [--runs 3] [--ranks 1,2,4] [--at DIR]

The model, random bf16 weights of Qwen3-0.6B's sizes, is loaded in each layout from a folder of files of 300 MB, and
goes back into such files. The contenders:

- fusemesh: ``export_pretrained``: every rank writes its slices in place;
- gathered: ``whole_state_dict``, and transformers' ``save_pretrained`` of that on rank 0; on one rank
  transformers' own save_pretrained of a whole model.

They run in a shuffled order, each with ranks of its own, into new folders. Seconds are those of rank 0 from a barrier
until all files are on the disk (fsync, which export_pretrained does by itself); "returned" is without fsync for
save_pretrained. Beside them stands the processors' time of all ranks. Memory is the most by which a rank's peak
resident set exceeds what it held before.

Prediction, written before the first run: on one rank both copy each byte once into the page cache, and the disk
decides: 1.0 to 1.3 times as fast; where rank 0 gathers, it moves each byte twice more through gloo: twice as fast on 2
ranks and 4; memory beside the model at most 20 MiB a rank, where gathering takes the whole model on rank 0.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import os
import random
import shutil
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from fusemesh.hybrid.apply import parallelize
from fusemesh.hybrid.hugging_face.export import export_pretrained
from fusemesh.hybrid.hugging_face.folder import read_folder
from fusemesh.hybrid.hugging_face.load import load_pretrained
from fusemesh.hybrid.layout import Layout
from fusemesh.hybrid.placed import whole_state_dict
from fusemesh.hybrid.ranks.join import World, build_mesh
from fusemesh.hybrid.ranks.testing import RankPool
from fusemesh.kernels.measure import results

SIZES = {
    "vocab_size": 151936,
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "tie_word_embeddings": True,
    "dtype": "bfloat16",
}
LAYOUTS = {1: ("single",), 2: ("fsdp2", "tp2"), 4: ("fsdp4", "tp4")}
CONTENDERS = ("fusemesh", "gathered")
FILES = "300MB"


def make(path: Path) -> None:
    """Write the folder."""
    import transformers

    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(transformers.Qwen3Config(**SIZES), dtype=torch.bfloat16)
    model.to_empty(device="cpu").tie_weights()
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.data.view(torch.int16).random_(-(2**14), 2**14, generator=generator)
    model.save_pretrained(path, max_shard_size=FILES)


def save(world: World, path: str, target: str, layout_text: str, contender: str) -> dict[str, Any]:
    """Save once from this rank; return seconds and bytes."""
    import transformers

    layout = Layout.parse(layout_text)
    with torch.device("meta"):
        model: Any = transformers.AutoModelForCausalLM.from_config(
            transformers.AutoConfig.from_pretrained(path), dtype=torch.bfloat16
        )
    whole = contender == "gathered" and layout.world_size == 1
    if not whole:
        parallelize(model, build_mesh(layout, world), layout)
    load_pretrained(model, path)
    gc.collect()
    before = _status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak is that from here on
    dist.barrier()
    start, spent = time.perf_counter(), time.process_time()
    if contender == "fusemesh":
        export_pretrained(model, target, path)
        returned = time.perf_counter() - start
    else:
        # A whole model need not be gathered.
        state = None if whole else whole_state_dict(model)
        model.save_pretrained(target, state_dict=state, max_shard_size=FILES)
        returned = time.perf_counter() - start
        if world.rank == 0:
            for file in Path(target).iterdir():
                _sync(file)
    spent = time.process_time() - spent
    seconds = time.perf_counter() - start
    return {"seconds": seconds, "returned": returned, "cpu_seconds": spent, "peak": _status("VmHWM") - before}


def _sync(path: Path) -> None:
    file = os.open(path, os.O_RDONLY)
    os.fsync(file)
    os.close(file)


def _status(name: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name + ":"))
    return int(line.split()[1]) * 1024


def measure(path: Path, at: Path, numbers: list[int], runs: int) -> list[dict[str, Any]]:
    """Return a row for each layout and contender."""
    rows = []
    want = {file.name: file.stat().st_size for file in path.glob("*.safetensors")}
    for layout in (layout for number in numbers for layout in LAYOUTS[number]):
        number = Layout.parse(layout).world_size
        found: dict[str, list[list[dict[str, Any]]]] = {contender: [] for contender in CONTENDERS}
        todo = [contender for contender in CONTENDERS for _ in range(runs)]
        random.Random(0).shuffle(todo)
        for contender in todo:
            target = at / f"{layout}-{contender}"
            with RankPool(number, timeout=900.0) as pool:
                found[contender].append(pool.run(save, str(path), str(target), layout, contender))
            # Both write the same files, of the same bytes.
            assert {file.name: file.stat().st_size for file in target.glob("*.safetensors")} == want
            if len(found[contender]) == 1:
                assert all((target / name).read_bytes() == (path / name).read_bytes() for name in want)
            shutil.rmtree(target)
        for contender, takes in found.items():
            rows.append(
                {
                    "layout": layout,
                    "contender": contender,
                    "seconds": statistics.median(take[0]["seconds"] for take in takes),
                    "all_seconds": [take[0]["seconds"] for take in takes],
                    "returned": statistics.median(take[0]["returned"] for take in takes),
                    "cpu_seconds": statistics.median(sum(rank["cpu_seconds"] for rank in take) for take in takes),
                    "peak": max(rank["peak"] for take in takes for rank in take),
                }
            )
        ours, theirs = rows[-2:]
        for row in (ours, theirs):
            row["faster"] = theirs["seconds"] / row["seconds"]
            row["faster_cpu"] = theirs["cpu_seconds"] / row["cpu_seconds"]
            print(
                f"{row['layout']:8} {row['contender']:10} {row['seconds']:7.2f} {row['faster']:6.2f} "
                f"{row['returned']:8.2f} {row['cpu_seconds']:7.2f} {row['faster_cpu']:6.2f} "
                f"{row['peak'] / 2**20:7.0f}",
                flush=True,
            )
    return rows


def main() -> None:
    """Measure, print a table, and write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--ranks", default="1,2,4")
    parser.add_argument("--at", default=None, help="where folders are written; default: a temporary directory")
    chosen = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    with contextlib.ExitStack() as stack:
        at = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="fusemesh-export-", dir=chosen.at)))
        make(path := at / "source")
        size = read_folder(path).nbytes
        print(f"{size / 2**30:.2f} GiB; medians of {chosen.runs}; x: gathered over it; peak: MiB of one rank")
        print(f"{'layout':8} {'':10} {'s':>7} {'x':>6} {'returned':>8} {'cpu s':>7} {'x':>6} {'peak':>7}")
        rows = measure(path, at, [int(number) for number in chosen.ranks.split(",")], chosen.runs)
    record = results.machine()
    target = Path(__file__).parent / "results" / results.machine_name(record)
    target.mkdir(parents=True, exist_ok=True)
    written = {"stage": "pretrained_export", "machine": record, "bytes": size, "runs": chosen.runs, "rows": rows}
    (target / "pretrained_export.json").write_text(json.dumps(written, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
