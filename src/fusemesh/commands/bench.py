"""``fusemesh bench``: time the Triton kernels on this GPU: their tiles, or against PyTorch's kernels."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from .options import Outcome

NAME = "bench"
SUMMARY = "which tiles of the Triton kernels, or which backend, is fastest on this GPU"
USAGE = "--tune | --compare | --forget [options]"


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of the command."""
    parser.add_argument("--tune", action="store_true", help="time the shipped tiles and their neighbours")
    parser.add_argument(
        "--compare",
        action="store_true",
        help="time the Triton kernels against PyTorch's for classes of calls; from then on auto takes the faster",
    )
    parser.add_argument("--forget", action="store_true", help="remove what --compare has written")
    parser.add_argument(
        "--minutes", type=float, default=7.5, metavar="M", help="no tile and no class starts later; default: 7.5"
    )
    parser.add_argument(
        "--out", "--output", "-o", metavar="FILE", help="of --tune; default: bench/results/<machine>/tune.json"
    )


def run(options: argparse.Namespace) -> Outcome:
    """Time what is asked for and write it."""
    if sum((options.tune, options.compare, options.forget)) != 1:
        raise ValueError(
            "--tune: expected one of --tune, --compare and --forget, which are all that this command does; the "
            "comparison with other libraries is `make bench` in a clone"
        )
    if not options.minutes > 0:
        raise ValueError(f"--minutes: expected more than 0, received {options.minutes:g}")
    if options.out and not options.tune:
        raise ValueError(
            "--out: expected --tune beside it; the table of --compare is in the cache folder (FUSEMESH_CACHE)"
        )
    if options.forget:
        return _forget()
    return _tune(options) if options.tune else _compare(options)


def _devices() -> list[tuple[Any, str]]:
    """Return the GPUs, one of each name, with their names.

    Raises:
        ValueError: there is none.
    """
    import torch

    named = {torch.cuda.get_device_name(index): index for index in reversed(range(torch.cuda.device_count()))}
    if not named:
        raise ValueError(
            "bench: expected a GPU that this torch can use, received none; speed is measured on a GPU alone"
        )
    return [(torch.device("cuda", index), name) for name, index in named.items()]


def _compare(options: argparse.Namespace) -> Outcome:
    from fusemesh.hybrid.outputs import make_folder, writing
    from fusemesh.kernels import measure
    from fusemesh.kernels.measure import comparison
    from fusemesh.kernels.proof import preferences

    devices, folder = _devices(), preferences.folder()
    if folder is None:
        raise ValueError("FUSEMESH_CACHE: expected a folder for the table, received none, and no home folder is known")
    make_folder(folder, what="FUSEMESH_CACHE")
    result: dict[str, Any] = {"stage": "compare", "machine": measure.machine(), "devices": []}
    lines = []
    for device, name in devices:
        clock = measure.Clock(options.minutes / len(devices))
        found = comparison.compare_on(device, clock)
        with writing(folder, what="FUSEMESH_CACHE"):
            written = preferences.write(name, found["classes"])
        result["devices"].append({"device": name, **found, "written": str(written)})
        wrong = [
            f"{x['op']} {x['direction']} {x['case']} {x['contender']}: {x['check']}"
            for x in found["rows"]
            if x["check"] != "ok"
        ]
        left_out = [f"left out for {text}" for text in found["left_out"]]
        lines += [
            name,
            comparison.table(found["classes"]),
            *left_out,
            *wrong,
            f"auto takes the faster from now on: {written}",
        ]
    is_wrong = any(row["check"].startswith("WRONG") for found in result["devices"] for row in found["rows"])
    return Outcome(result, "\n".join(lines), int(is_wrong))


def _forget() -> Outcome:
    from fusemesh.kernels.proof import preferences

    removed = preferences.forget()
    return Outcome({"removed": removed}, "\n".join([*removed, f"{len(removed)} tables removed"]))


def _tune(options: argparse.Namespace) -> Outcome:
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
