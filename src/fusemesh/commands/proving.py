"""``fusemesh doctor --prove``: a standard set of calls by the Triton kernels, each checked on each GPU, now."""

from __future__ import annotations

from typing import Any

from fusemesh import standard_output

from .options import Outcome

NO_GPU = 3  # the exit status where there is nothing to prove kernels on
_WIDTHS = {"operation": 9, "case": 60, "verdict": 12, "share of budget": 15}


def run(*, quiet: bool) -> Outcome:
    """Prove the standard set on every GPU; rows are printed as they come unless ``quiet``."""
    from fusemesh.kernels.measure import standard
    from fusemesh.kernels.proof import first_use, store

    devices = standard.devices()
    if not devices:
        reason = (
            "no GPU that this torch can use, and a kernel proves itself on the GPU that runs it. To debug kernels "
            "without one, run them in Triton's interpreter (TRITON_INTERPRET=1), or run what Triton compiled by "
            "fusemesh.emulate; see docs/interpreter.md"
        )
        return Outcome({"devices": [], "rows": [], "why_not": reason}, reason, NO_GPU)
    rows: list[dict[str, Any]] = []
    for device in devices:
        name = standard.name_of(device)
        if not quiet:
            standard_output.write(f"{device}  {name}\n{_line({key: key for key in _WIDTHS}, 'ms')}")
        first_use.forget()
        with first_use.mode(first_use.ALWAYS):
            for row in standard.prove(device, standard.cases()):
                rows.append({**row, "name": name})
                if not quiet:
                    standard_output.write(_described(row))
    failed = sum(row["verdict"] != "right" for row in rows)
    folder = store.default().folder
    findings = {
        "devices": [{"device": str(device), "name": standard.name_of(device)} for device in devices],
        "rows": rows,
        "failed": failed,
        "folder": None if folder is None else str(folder),
    }
    if failed:
        text = f"{failed} of {len(rows)} cases failed; auto takes other backends for their kernels; see docs/proof.md"
    else:
        text = f"all {len(rows)} cases are right; verdicts on their kernels are kept in {folder or 'memory'}"
    return Outcome(findings, text, 1 if failed else 0)


def _described(row: dict[str, Any]) -> str:
    """Return a row as a line of the table, and below it why it failed."""
    share = "-" if row["share"] is None else f"{row['share']:.2f}"
    line = _line({**row, "share of budget": share}, f"{row['ms']:.0f}")
    return line if not row["why"] else line + "\n    " + row["why"].replace("\n", "\n    ")


def _line(cells: dict[str, Any], last: str) -> str:
    return "  ".join(f"{cells[name]:<{width}}" for name, width in _WIDTHS.items()) + f"  {last}"
