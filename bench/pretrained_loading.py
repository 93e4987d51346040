"""How fast, and in how much memory, is a Hugging Face folder of at least 1 GiB on 1, 2 and 4 local ranks?

    python -m bench.pretrained_loading [--runs 3] [--ranks 1,2,4] [--folder DIR]

The folder, random bf16 weights of Qwen3-0.6B's sizes in files of 300 MB, is made in a temporary directory and deleted,
unless ``--folder`` names one. Its files are in the page cache: what is timed is the loading and not the disk. The
contenders, each on a model that is built on meta anew:

- fusemesh: ``load_pretrained`` of the path into the model on its mesh, memory for it included;
- torch: ``to_empty`` and ``torch.distributed.checkpoint.load`` by its HuggingFaceStorageReader into the same;
- transformers: ``from_pretrained``, which builds the model too, in every rank, whole.

Each then reads every value once, which is when a memory map reads its file. They run in a shuffled order, on ranks
whose large allocations are always fresh pages. Times are the slowest rank's from a barrier to the next; beside them the
processors' time of all ranks, which other programs on the machine change less. Memory is the most by which a rank's
peak resident set exceeds what it held before, file pages (maps) included and apart; ``bytes`` is what fusemesh asked of
the files, all ranks, over their size.

Prediction, written before the first run: one copy in the place of two, and no fresh memory for slices, makes it 2 to
2.5 times as fast as torch's reader on every number of ranks, in processors' time as in the wall's; a rank's memory is
its part of the folder and at most 20 MiB. from_pretrained, which maps the files and copies once, takes 1.3 times as
long on one rank, and with 4 ranks 4 times, because each loads all.

Found, on an idle machine: the memory is as predicted (1 MiB beside its part), the speed is not. It is 1.5 times
torch's reader on one rank, 0.92 to 0.95 over fsdp and 0.80 over tp, whose slices of rows are thousands of short reads
(the reader copies them out of a map). The first touch of fresh pages, which both have, is most of it: a GiB by large
reads takes 0.06 s where memory is warm and 0.41 s where it is not. Huge pages (madvise) took 0.18 s for it where the
host had pages ready, and 1.7 s where not, which lost more than it won; they are not used. from_pretrained, whose
weights stay maps of the files, takes a sixth on one rank.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import os
import random
import resource
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from fusemesh.hybrid.apply import parallelize
from fusemesh.hybrid.hugging_face.folder import read_folder
from fusemesh.hybrid.hugging_face.load import load_pretrained
from fusemesh.hybrid.layout import Layout
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
# Large allocations are mappings of their own, which end when they are freed: each take touches fresh pages.
GIVE_BACK = {"MALLOC_MMAP_THRESHOLD_": str(1 << 18)}
CONTENDERS = ("fusemesh", "torch", "transformers")


def make(path: Path) -> None:
    """Write the folder."""
    import transformers

    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(transformers.Qwen3Config(**SIZES), dtype=torch.bfloat16)
    model.to_empty(device="cpu").tie_weights()
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.data.view(torch.int16).random_(-(2**14), 2**14, generator=generator)
    model.save_pretrained(path, max_shard_size="300MB")


def load(world: World, path: str, layout_text: str, contender: str) -> dict[str, Any]:
    """Load once on this rank; return seconds, bytes, and a sum of the values to compare contenders by."""
    import transformers
    from torch.distributed import checkpoint

    layout = Layout.parse(layout_text)
    mesh = build_mesh(layout, world)
    with torch.device("meta"):
        model: Any = transformers.AutoModelForCausalLM.from_config(
            transformers.AutoConfig.from_pretrained(path), dtype=torch.bfloat16
        )
    parallelize(model, mesh, layout)
    if contender == "transformers":
        del model
    gc.collect()
    before, mapped = _status("VmRSS"), _status("RssFile")
    Path("/proc/self/clear_refs").write_text("5")  # the peak is that from here on
    dist.barrier()
    start, spent = time.perf_counter(), time.process_time()
    requested = 0
    if contender == "fusemesh":
        requested = load_pretrained(model, path).bytes_requested
    elif contender == "torch":
        model.to_empty(device="cpu")
        state = model.state_dict()
        # The files have a tied weight once, under its first name.
        del state["lm_head.weight"]
        checkpoint.load(state, storage_reader=checkpoint.HuggingFaceStorageReader(path), no_dist=layout.world_size == 1)
    else:
        model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16)
    own = {id(x): (x.to_local() if isinstance(x, DTensor) else x).detach() for x in model.parameters()}
    # Each value is used once: maps would otherwise have read nothing.
    checked = sum(int(x.flatten().view(torch.int64).sum()) for x in own.values())
    spent = time.process_time() - spent
    dist.barrier()
    seconds = time.perf_counter() - start
    peak, files = _status("VmHWM") - before, _status("RssFile") - mapped
    return {
        "seconds": seconds,
        "cpu_seconds": spent,
        "peak": peak,
        "files": files,
        "own": sum(x.nbytes for x in own.values()),
        "requested": requested,
        "checked": checked,
        "faults": resource.getrusage(resource.RUSAGE_SELF).ru_minflt,
    }


def _status(name: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name + ":"))
    return int(line.split()[1]) * 1024


def measure(path: str, numbers: list[int], runs: int) -> list[dict[str, Any]]:
    """Return a row for each layout and contender."""
    wanted = [(layout, contender) for number in numbers for layout in LAYOUTS[number] for contender in CONTENDERS]
    found: dict[tuple[str, str], list[list[dict[str, Any]]]] = {one: [] for one in wanted}
    todo = wanted * runs
    random.Random(0).shuffle(todo)
    with RankPool(max(numbers), env=GIVE_BACK, timeout=600.0) as pool:
        for layout in dict.fromkeys(layout for layout, _ in wanted):
            # Not counted: what is imported and compiled at first use.
            pool.run(load, path, layout, "fusemesh", ranks=Layout.parse(layout).world_size)
        for layout, contender in todo:
            take = pool.run(load, path, layout, contender, ranks=Layout.parse(layout).world_size)
            print(layout, contender, f"{max(rank['seconds'] for rank in take):.2f} s", flush=True)
            found[layout, contender].append(take)
    size = read_folder(path).nbytes
    rows = []
    for (layout, contender), takes in found.items():
        reader = statistics.median(max(rank["seconds"] for rank in take) for take in found[layout, "torch"])
        reader_cpu = statistics.median(sum(rank["cpu_seconds"] for rank in take) for take in found[layout, "torch"])
        seconds = statistics.median(max(rank["seconds"] for rank in take) for take in takes)
        cpu = statistics.median(sum(rank["cpu_seconds"] for rank in take) for take in takes)
        worst = max((rank for take in takes for rank in take), key=lambda rank: rank["peak"] - rank["own"])
        rows.append(
            {
                "layout": layout,
                "contender": contender,
                "seconds": seconds,
                "all_seconds": [max(rank["seconds"] for rank in take) for take in takes],
                "cpu_seconds": cpu,
                "faster_than_reader": reader / seconds,
                "faster_than_reader_cpu": reader_cpu / cpu,
                "peak": worst["peak"],
                "file_pages": worst["files"],
                "own": worst["own"],
                "bytes_over_file": sum(rank["requested"] for rank in takes[0]) / size or None,
            }
        )
        if contender != "transformers":
            sums = {tuple(rank["checked"] for rank in take) for one in CONTENDERS[:2] for take in found[layout, one]}
            assert len(sums) == 1, (layout, sums)
    return rows


def main() -> None:
    """Measure, print a table, and write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--ranks", default="1,2,4")
    parser.add_argument("--folder", default=None)
    chosen = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    with contextlib.ExitStack() as stack:
        path = chosen.folder
        if path is None:
            path = stack.enter_context(tempfile.TemporaryDirectory(prefix="fusemesh-loading-"))
            make(Path(path))
        size = read_folder(path).nbytes
        for file in Path(path).glob("*.safetensors"):
            file.read_bytes()
        rows = measure(path, [int(number) for number in chosen.ranks.split(",")], chosen.runs)
    print(f"{size / 2**30:.2f} GiB; s and cpu s: medians of {chosen.runs}; x: torch's reader over it; MiB: of one rank")
    print(
        f"{'layout':8} {'':13} {'s':>7} {'x':>6} {'cpu s':>7} {'x':>6} {'peak':>7} {'files':>7} {'own':>7} {'bytes':>6}"
    )
    for row in rows:
        print(
            f"{row['layout']:8} {row['contender']:13} {row['seconds']:7.2f} {row['faster_than_reader']:6.2f} "
            f"{row['cpu_seconds']:7.2f} {row['faster_than_reader_cpu']:6.2f} {row['peak'] / 2**20:7.0f} "
            f"{row['file_pages'] / 2**20:7.0f} {row['own'] / 2**20:7.0f} {row['bytes_over_file'] or 0:6.3f}"
        )
    record = results.machine()
    target = Path(__file__).parent / "results" / results.machine_name(record)
    target.mkdir(parents=True, exist_ok=True)
    written = {"stage": "pretrained_loading", "machine": record, "bytes": size, "runs": chosen.runs, "rows": rows}
    (target / "pretrained_loading.json").write_text(json.dumps(written, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
