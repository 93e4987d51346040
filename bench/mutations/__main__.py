"""Plant one fault after the other in compiled kernels, and print how many of each kind are noticed.

    python -m bench.mutations [--kernel REGEX] [--target sm_80 sm_90] [--kind REGEX] [--most N] [--output FILE]

Each place of a kernel that its calls execute is changed by itself, and run on small inputs of many lengths until a
check of the emulator raises or a bit of the result differs. What nothing notices is listed with a reason; one without
a reason, or a hazard where nothing is changed, makes the exit status 1. The table is written to
bench/results/<machine>/mutations.json.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import sys
import time
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

from fusemesh import kernels
from fusemesh.kernels.emulator.mutants import Outcome, Subject, record
from fusemesh.kernels.emulator.mutations import KINDS, ORDER, Mutation, mutations
from fusemesh.kernels.measure import results

from . import proofs, reasons
from .calls import FAMILIES

FEW = range(4)  # the calls by which fences are tried that the control flow proves to order nothing
OUTPUT = Path(__file__).parents[1] / "results"


def main(arguments: list[str] | None = None) -> int:
    """Run the command; return 1 where something that nothing notices has no reason, else 0."""
    parser = argparse.ArgumentParser(prog="python -m bench.mutations", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--kernel", default=".", help="names of kernels, a regular expression")
    parser.add_argument("--family", nargs="+", default=list(FAMILIES), choices=tuple(FAMILIES))
    parser.add_argument("--target", nargs="+", default=["sm_80", "sm_90"])
    parser.add_argument("--kind", default=".", help="kinds of changes, a regular expression")
    parser.add_argument(
        "--most", type=int, default=1 << 30, help="places in each kernel, by a seed, of kinds not of order"
    )
    parser.add_argument("--output", type=Path, help="default: bench/results/<machine>/mutations.json; - for none")
    parser.add_argument("--report", type=Path, nargs="+", help="run nothing: join these files, with today's reasons")
    options = parser.parse_args(arguments)
    if options.report:
        return report(options.report, options.output)
    rows: list[dict[str, Any]] = []
    survivors: list[dict[str, Any]] = []
    faults: list[str] = []
    start = time.process_time()
    for target in options.target:
        for family in options.family:
            for subject in subjects(family, target, options.kernel):
                added, left = table(subject, family, options.kind, options.most)
                rows += added
                survivors += left
                faults += [f"{subject.name} {target} {fault}" for fault in subject.faults]
                write(options.output, rows, survivors, faults, time.process_time() - start)
    return conclude(rows, survivors, faults, time.process_time() - start)


def report(paths: list[Path], output: Path | None) -> int:
    """Join results files, of which the later counts for a kernel's kind, with reasons looked up anew; return status."""
    rows: list[dict[str, Any]] = []
    survivors: list[dict[str, Any]] = []
    faults: list[str] = []
    seconds = 0
    for path in paths:
        part = json.loads(path.read_text(encoding="utf-8"))
        again = {of(row) for row in part["rows"]}
        rows = [row for row in rows if of(row) not in again] + part["rows"]
        survivors = [s for s in survivors if of(s) not in again] + part["survivors"]
        faults += part["faults"]
        seconds += part["cpu_seconds"]
    for s in survivors:
        s["code"] = source_line(s["source"])
        s["reason"] = s["proof"] or reasons.reason(s)
        print(line(s))
    write(output, rows, survivors, faults, seconds)
    return conclude(rows, survivors, faults, seconds)


def of(row: dict[str, Any]) -> tuple[str, ...]:
    """Return the family, kernel, target and kind of a row or survivor."""
    return row["family"], row["kernel"], row["target"], row["kind"]


def conclude(rows: list[dict[str, Any]], survivors: list[dict[str, Any]], faults: list[str], seconds: float) -> int:
    """Print the table of all kinds; return main's exit status."""
    print(summary(rows))
    for fault in faults:
        print(f"without a change already: {fault}")
    unexplained = [s for s in survivors if not s["reason"]]
    print(f"{len(survivors)} survive, {len(unexplained)} without a reason; {seconds:.0f} s of CPU")
    return 1 if unexplained or faults else 0


def line(s: dict[str, Any]) -> str:
    """Return what is known of a survivor as a line of text."""
    where = f"{s['kernel']} {s['target']} line {s['line']} ({s['source'].split(',')[0]})"
    return f"    {s['kind']}: {where}: {s['text'][:80]} | {s['evidence']} | {s['reason'] or 'NO REASON'}"


def subjects(family: str, target: str, pattern: str = ".") -> list[Subject]:
    """Return the text of each kernel that most of a family's calls launch, with its launches."""
    calls, kernels = FAMILIES[family]
    chosen = [k for k in kernels if re.search(pattern, k)]
    if not chosen:
        return []
    most: dict[str, Subject] = {}
    faults: dict[str, list[str]] = defaultdict(list)
    for subject in record(target, calls(), lambda name: name.startswith(tuple(chosen))):
        if subject.name not in most or len(subject.cases) > len(most[subject.name].cases):
            most[subject.name] = subject
        faults[subject.name] += subject.faults
    for name, subject in most.items():
        subject.faults = faults[name]
    return list(most.values())


def table(subject: Subject, family: str, pattern: str, most: int) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Return a row for each kind of change of one text, and what nothing noticed."""
    start = time.process_time()
    places: dict[str, list[Mutation]] = defaultdict(list)
    for m in mutations(subject.machine):
        if re.search(pattern, m.kind):
            places[m.kind].append(m)
    caught: dict[str, Counter[str]] = defaultdict(Counter)
    survivors, pick = [], random.Random(0)
    chosen = {}
    for kind, all_ in places.items():
        chosen[kind] = all_ if kind in ORDER or len(all_) <= most else pick.sample(all_, most)
    every = [m for all_ in chosen.values() for m in all_]
    proven = {m: proofs.proof(subject.machine, m) for m in every if m.kind in ORDER}
    left: dict[str, list[Outcome]] = defaultdict(list)
    for outcome in subject.outcomes(every, {m: FEW for m, why in proven.items() if why and m.kind == "fence deleted"}):
        (m,) = outcome.mutations
        caught[m.kind][outcome.caught_by or "survives"] += 1
        if outcome.caught_by is None:
            left[m.kind].append(outcome)
    for kind, outcomes in left.items():
        unproven = [outcome for outcome in outcomes if not proven.get(outcome.mutations[0])]
        together = at_once(subject, unproven) if kind in ORDER and len(unproven) > 1 else ""
        for outcome in outcomes:
            why = proven.get(outcome.mutations[0], "")
            survivors.append(survivor(subject, family, outcome, "" if why else together, why))
    seconds = time.process_time() - start
    rows = []
    for kind in KINDS:
        if kind in chosen:
            tried = len(chosen[kind])
            head = {"family": family, "kernel": subject.name, "target": subject.target, "kind": kind}
            rows.append({**head, "places": len(places[kind]), "tried": tried, "by": dict(caught[kind])})
    n = sum(row["tried"] for row in rows)
    counts = f"{n} changes, {len(survivors)} survive, {len(subject.cases)} calls, {seconds:.1f} s"
    print(f"{subject.target} {family} {subject.name}: {counts}, {seconds / max(n, 1):.3f} s each", flush=True)
    for s in survivors:
        print(line(s), flush=True)
    return rows, survivors


def at_once(subject: Subject, outcomes: list[Outcome]) -> str:
    """Return by what all of the changes are noticed when they are made together."""
    by = subject.outcome(*(m for outcome in outcomes for m in outcome.mutations)).caught_by
    return f"; all {len(outcomes)} such ones at once: " + (by or "not noticed either")


def survivor(subject: Subject, family: str, outcome: Outcome, together: str = "", proof: str = "") -> dict[str, Any]:
    """Return what is known of a change that nothing noticed."""
    (m,) = outcome.mutations
    evidence = f"{outcome.tried} runs{together}"
    if outcome.is_idle:
        does = {"guard dropped": "hides no thread", "copy deleted": "copies nothing"}
        evidence = f"{does.get(m.kind, 'gives no thread another value')} in all {len(subject.cases)} calls"
    found = {
        "family": family,
        "kernel": subject.name,
        "target": subject.target,
        "kind": m.kind,
        "line": m.old.line,
        "source": m.old.source,
        "code": source_line(m.old.source),
        "text": m.old.text,
        "new": m.new,
        "idle": outcome.is_idle,
        "evidence": evidence,
        "proof": proof,
    }
    return {**found, "reason": found["proof"] or reasons.reason(found)}


def source_line(source: str) -> str:
    """Return the first line of our own kernels that ``file:line, inlined at file:line`` names."""
    for place in source.split(", inlined at "):
        name, _, number = place.partition(":")
        for path in sorted(Path(kernels.__file__).parent.rglob(name)):
            lines = path.read_text(encoding="utf-8").split("\n")
            if number.isdigit() and int(number) <= len(lines):
                return lines[int(number) - 1].strip()
    return ""


def summary(rows: list[dict[str, Any]]) -> str:
    """Return the table of all kinds: kernels, places, tried, caught, and by what."""
    lines = [f"{'kind':22}{'target':8}{'kernels':>8}{'places':>8}{'tried':>8}{'caught':>8}{'survive':>8}  by"]
    for kind in KINDS:
        for target in sorted({row["target"] for row in rows}):
            mine = [row for row in rows if row["kind"] == kind and row["target"] == target]
            if not mine:
                continue
            by: Counter[str] = Counter()
            for row in mine:
                by.update(row["by"])
            left, tried = by.pop("survives", 0), sum(row["tried"] for row in mine)
            places = sum(row["places"] for row in mine)
            how = ", ".join(f"{name} {n}" for name, n in by.most_common())
            lines.append(f"{kind:22}{target:8}{len(mine):8}{places:8}{tried:8}{tried - left:8}{left:8}  {how}")
    return "\n".join(lines)


def write(
    output: Path | None,
    rows: list[dict[str, Any]],
    survivors: list[dict[str, Any]],
    faults: list[str],
    seconds: float,
) -> None:
    """Write the results so far."""
    if output == Path("-"):
        return
    machine = results.machine()
    path = output or OUTPUT / results.machine_name(machine) / "mutations.json"
    payload = {"stage": "mutations", "machine": machine, "cpu_seconds": round(seconds), "rows": rows}
    results.write_results(path, {**payload, "survivors": survivors, "faults": faults})


if __name__ == "__main__":
    sys.exit(main())
