"""Which parameters of a kernel point at memory that it may write."""

from __future__ import annotations

from .ptx import Addr, Instruction, Kernel, Reg, Sym


def written_parameters(kernel: Kernel) -> set[str] | None:
    """Return the names of parameters from which the address of a store may come; None if that cannot be told.

    The order of the instructions is not looked at: an address may come from all that ever flows into its register.
    """
    sources: dict[str, set[str]] = {}
    flows = [(ins.writes, ins.reads) for ins in kernel.instructions if ins.parts[0] not in ("ld", "atom")]
    for ins in kernel.instructions:
        if ins.parts[0] == "ld" and "param" in ins.parts and isinstance(ins.operands[1].base, Sym):
            for name in ins.writes:
                sources.setdefault(name, set()).add(ins.operands[1].base.name)
    changed = True
    while changed:
        changed = False
        for writes, reads in flows:
            found = set().union(*(sources.get(name, ()) for name in reads))
            for name in writes if found else ():
                known = sources.setdefault(name, set())
                if not found <= known:
                    known |= found
                    changed = True
    written: set[str] = set()
    for ins in kernel.instructions:
        if not _stores(ins):
            continue
        target = next((x for x in ins.operands if isinstance(x, Addr)), None)
        base = target.base if target is not None else None
        of = sources.get(base.name) if isinstance(base, Reg) else None
        if not of:
            return None
        written |= of
    return written


def _stores(ins: Instruction) -> bool:
    """Return whether an instruction writes to global memory."""
    kind = ins.parts[0]
    if kind in ("st", "red", "atom"):
        return not any(x.split("::")[0] in ("shared", "local", "param") for x in ins.parts)
    return kind == "cp" and "bulk_group" in ins.parts and "global" in ins.parts
