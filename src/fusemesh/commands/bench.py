"""``fusemesh bench``: time the tiles of the Triton kernels on this GPU."""

from __future__ import annotations

import argparse
from pathlib import Path

from .options import Outcome

NAME = "bench"
SUMMARY = "which tiles of the Triton kernels are fastest on this GPU"
USAGE = "--tune [options]"


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of the command."""
    parser.add_argument("--tune", action="store_true", help="time the shipped tiles and their neighbours")
    parser.add_argument("--minutes", type=float, default=7.5, metavar="M", help="no tile starts later; default: 7.5")
    parser.add_argument("--out", "--output", "-o", metavar="FILE", help="default: bench/results/<machine>/tune.json")


def run(options: argparse.Namespace) -> Outcome:
    """Time the tiles and write the rows."""
    if not options.tune:
        raise ValueError(
            "--tune: expected it, which is all that this command does; the comparison with other libraries is "
            "`make bench` in a clone"
        )
    if not options.minutes > 0:
        raise ValueError(f"--minutes: expected more than 0, received {options.minutes:g}")
    import torch

    from fusemesh.hybrid.outputs import make_folder, writing
    from fusemesh.kernels import measure
    from fusemesh.kernels.measure import tune

    reason = tune.why_not_here()
    if reason is not None:
        raise ValueError(reason)
    record = measure.machine()
    path = Path(options.out or Path("bench", "results", measure.machine_name(record), "tune.json"))
    make_folder(path.parent, what="--out")
    result = tune.tune_tiles(torch.device("cuda"), measure.Clock(options.minutes))
    result = {"stage": "tune", "dry_run": False, "machine": record, **result}
    with writing(path, what="--out"):
        written = measure.write_results(path, result)
    wrong = [
        f"{row['op']} {row['kernel']} {row['entry']}: {row['check']}" for row in result["rows"] if row["check"] != "ok"
    ]
    if wrong:
        raise RuntimeError(f"{len(wrong)} kernels are wrong or did not run; see {written}\n" + "\n".join(wrong))
    left_out = [f"left out for lack of time: {name}" for name in result["left_out"]]
    text = "\n".join([tune.table(result["rows"]), *left_out, f"written to {written}"])
    return Outcome({**result, "written": str(written)}, text)
