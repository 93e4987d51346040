"""Which parameters of a kernel point at memory that it may write."""

from __future__ import annotations

from .ptx import Addr, Instruction, Kernel, Reg, Sym


def written_parameters(kernel: Kernel) -> set[str] | None:
    """Return the names of parameters from which the address of a store may come; None if that cannot be told.

    The order of the instructions is not looked at: an address may come from all that ever flows into its register.
    """
    sources: dict[str, int] = {}  # register -> which parameters flow into it, as bits
    names = [name for name, _ in kernel.params]
    flows = []
    for ins in kernel.instructions:
        if ins.parts[0] == "ld":
            base = ins.operands[1].base if "param" in ins.parts else None
            if isinstance(base, Sym):
                for name in ins.writes:
                    sources[name] = sources.get(name, 0) | 1 << names.index(base.name)
        elif ins.parts[0] != "atom" and ins.reads and ins.writes:
            flows.append((ins.writes, ins.reads))
    changed = True
    while changed:
        changed = False
        for writes, reads in flows:
            found = 0
            for name in reads:
                found |= sources.get(name, 0)
            for name in writes if found else ():
                if found & ~sources.get(name, 0):
                    sources[name] = sources.get(name, 0) | found
                    changed = True
    written = 0
    for ins in kernel.instructions:
        if not _stores(ins):
            continue
        target = next((x for x in ins.operands if isinstance(x, Addr)), None)
        reg = target.base if target is not None else None
        of = sources.get(reg.name, 0) if isinstance(reg, Reg) else 0
        if not of:
            return None
        written |= of
    return {name for n, name in enumerate(names) if written >> n & 1}


def _stores(ins: Instruction) -> bool:
    """Return whether an instruction writes to global memory."""
    kind = ins.parts[0]
    if kind in ("st", "red", "atom"):
        return not any(x.split("::")[0] in ("shared", "local", "param") for x in ins.parts)
    return kind == "cp" and "bulk_group" in ins.parts and "global" in ins.parts
