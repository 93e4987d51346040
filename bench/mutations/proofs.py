"""What the control flow of a kernel proves of a change that nothing notices."""

from __future__ import annotations

import re
from collections.abc import Iterator

from fusemesh.kernels.emulator.machine import Machine
from fusemesh.kernels.emulator.mutations import Mutation
from fusemesh.kernels.emulator.ptx import Instruction

_ASYNC = r"wgmma\.mma_async|(@\S+ )?cp\.async\.bulk"
# Accesses to shared memory through the generic proxy, those of cp.async where they are waited for.
_GENERIC = r"(@\S+ )?(st|ld|atom|red)\.(\w+\.)*shared|(@\S+ )?(st|ld)matrix|cp\.async\.(wait_|mbarrier)|mbarrier\."


def proof(machine: Machine, m: Mutation) -> str:
    """Return why deleting a statement changes nothing, as far as the paths behind it show that; else "".

    A fence is proven to order nothing. A group that joins the next one can still be waited for too late: that shows.
    """
    text, group = m.old.text, m.old.text.split(".commit_group")[0]
    if m.kind == "fence deleted" and text.startswith("wgmma.fence"):
        return "on every path another wgmma.fence lies behind the last access of each product's registers (check_fence)"
    if text.startswith("fence.proxy.async") and comes_first(machine, m, r"fence\.proxy\.async", _ASYNC):
        return "on every path the next such fence comes before the next access by the asynchronous proxy"
    if text.startswith("fence.proxy.async") and comes_last(machine, m, r"fence\.proxy\.async", _GENERIC):
        return "on every path the generic proxy accessed nothing since the last such fence"
    if m.kind == "commit deleted" and comes_first(machine, m, rf"{group}\.commit_group", rf"{group}\.wait_group"):
        return (
            "its copies join the next group, closed before the next wait; a wait for one without the other would show"
        )
    return ""


def comes_first(machine: Machine, m: Mutation, wanted: str, unwanted: str) -> bool:
    """Return whether on every path from a mutation's place ``wanted`` comes first, or none of the two."""
    firsts_ = firsts(machine, m, f"{wanted}|{unwanted}")
    return all(first is None or re.match(wanted, first.text) for first in firsts_)


def firsts(machine: Machine, m: Mutation, pattern: str) -> Iterator[Instruction | None]:
    """Yield, for every path from behind a mutation's place, the first statement that matches; None at the end."""
    blocks = machine.kernel.blocks
    seen: set[int] = set()
    todo = [(m.block, len(blocks[m.block].body) if m.at is None else m.at + 1)]
    while todo:
        block, start = todo.pop()
        found = next((x for x in blocks[block].body[start:] if re.match(pattern, x.text)), None)
        if found is not None:
            yield found
            continue
        after = [n for n, before in enumerate(machine.before) if block in before and n < len(blocks)]
        if not after:
            yield None
        for n in after:
            if n not in seen:
                seen.add(n)
                todo.append((n, 0))


def comes_last(machine: Machine, m: Mutation, wanted: str, unwanted: str) -> bool:
    """Return whether on every path to a mutation's place ``wanted`` comes last, or none of the two."""
    lasts_ = lasts(machine, m, f"{wanted}|{unwanted}")
    return all(last is None or re.match(wanted, last.text) for last in lasts_)


def lasts(machine: Machine, m: Mutation, pattern: str) -> Iterator[Instruction | None]:
    """Yield, for every path to a mutation's place, the last statement before it that matches; None at the start."""
    blocks = machine.kernel.blocks
    seen: set[int] = set()
    todo = [(m.block, blocks[m.block].body[: m.at])]
    while todo:
        block, body = todo.pop()
        found = next((x for x in reversed(body) if re.match(pattern, x.text)), None)
        if found is m.old:
            continue  # once around a loop: what lies before it is looked at already
        if found is not None:
            yield found
            continue
        before = machine.before[block]
        if not before:
            yield None
        for n in before - seen:
            seen.add(n)
            todo.append((n, blocks[n].body))
