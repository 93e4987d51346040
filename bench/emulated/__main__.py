"""Every kernel as it is compiled for a GPU, run on this CPU by the emulator and held to the error budget.

    python -m bench.emulated                                  # both targets, about an hour of one core
    python -m bench.emulated --target sm_90 --only "linear bf16"       # a part; writes no file
    python -m bench.emulated --short                          # the part that `make test` runs; writes no file
    python -m bench.emulated --rows rows.jsonl                # goes on where a run with this file stopped

Prints a line for each case, and a table of the largest shares of the budget, which it writes with the machine to
bench/results/<machine>/emulated.json. A case that fails makes it exit non-zero, after everything is written.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from bench.emulated import tables
from bench.emulated.verification import tried
from bench.gpu.tables import in_turn
from fusemesh.kernels.measure import results

FOLDER = Path(__file__).resolve().parents[1] / "results"


def summary(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return a row for each target, operation and dtype: cases, the largest share of the budget, CTAs, seconds."""
    groups: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["target"], row["op"], row["dtype"]), []).append(row)
    found = []
    for (target, op, dtype), group in groups.items():
        right = [row for row in group if row["check"] == "ok"]
        shares = [(value, name, row["case"]) for row in right for name, value in row["share_of_budget"].items()]
        share, tensor, case = max(shares, default=(0.0, "", ""))
        found.append(
            {
                "target": target,
                "op": op,
                "dtype": dtype,
                "cases": len(group),
                "failed": len(group) - len(right),
                "largest_share_of_budget": share,
                "of": f"{tensor} of {case}",
                "ctas": sum(row["ctas"] for row in right),
                "seconds": round(sum(row["seconds"] for row in group), 1),
            }
        )
    return found


def table(rows: list[dict[str, Any]]) -> str:
    """Return the summary as aligned columns."""
    lines = [tuple(rows[0])] if rows else []
    lines += [tuple(str(value) for value in row.values()) for row in rows]
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))] if lines else []
    return "\n".join("  ".join(f"{cell:{width}}" for cell, width in zip(line, widths, strict=True)) for line in lines)


def known_rows(path: Path | None) -> dict[tuple[str, str], dict[str, Any]]:
    """Return the rows of an earlier run's file by target and case."""
    lines = path.read_text(encoding="utf-8").splitlines() if path is not None and path.exists() else []
    rows = [json.loads(line) for line in lines]
    return {(row["target"], f"{row['op']} {row['case']}"): row for row in rows}


def described(row: dict[str, Any]) -> str:
    """Return a row as a line of text."""
    shares = row.get("share_of_budget", {})
    largest = max(shares, key=lambda name: shares[name], default="")
    found = f"{shares[largest]:.2f} of the budget ({largest})" if largest else row["check"]
    return f"{row['target']} {row['op']} {row['case']}: {found}, {row['seconds']} s"


def main(arguments: list[str] | None = None) -> int:
    """Run the cases that the command line asks for; return the exit status."""
    parser = argparse.ArgumentParser(prog="bench.emulated", description=str(__doc__).split("\n")[0])
    parser.add_argument("--target", choices=tables.EMULATED, action="append", help="default: all of them")
    parser.add_argument("--only", default="", help="cases whose operation and name hold this text")
    parser.add_argument("--short", action="store_true", help="the part that `make test` runs")
    parser.add_argument(
        "--rows", type=Path, help="file of rows, one a line: cases in it are not run again, others added"
    )
    asked = parser.parse_args(arguments)
    chosen = tables.short if asked.short else tables.entries
    targets = asked.target or tables.EMULATED
    known = known_rows(asked.rows)
    rows: list[dict[str, Any]] = []
    for target, entry in in_turn(*([(target, entry) for entry in chosen(target)] for target in targets)):
        if asked.only not in str(entry):
            continue
        row = known.get((target, str(entry)))
        if row is None:
            row = tried(entry, target)
            print(described(row), flush=True)
            if asked.rows is not None:
                with asked.rows.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(row) + "\n")
        rows.append(row)
    found = summary(rows)
    print(table(found))
    failures = [row for row in rows if row["check"] != "ok"]
    if not (asked.target or asked.only or asked.short):
        machine = results.machine()
        payload = {"machine": machine, "rows": found, "failures": failures}
        print(results.write_results(FOLDER / results.machine_name(machine) / "emulated.json", payload))
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
