"""Launches recorded with what they read and wrote, and run again with a changed text, to see what is noticed."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from ..runtime.launch import TARGETS, any_device, assume_target, intercept
from .hazard import Hazard, UnknownInstruction
from .launch.launching import Bound
from .machine import Machine
from .mutations import ORDER, Mutation, is_computation, is_idle, mutated, mutated_step
from .state import Step

ROUNDS = 16  # so many of the first cases go through the rounds of loops
_GAP = 1 << 16  # bytes that belong to nobody, before and behind each tensor


class Case:
    """One launch on memory of its own: each of its tensors lies far from every other."""

    def __init__(
        self, target: str, label: str, kernel: Any, grid: tuple[int, ...], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        self.label = label
        self._arenas: dict[int, torch.Tensor] = {}  # address of a storage -> its bytes and the gaps
        self._theirs: list[tuple[torch.Tensor, torch.Tensor]] = []
        self.bound = Bound(TARGETS[target], kernel, grid, self._moved(args), kwargs)
        self._first = {key: arena.clone() for key, arena in self._arenas.items()}
        self._right: dict[int, torch.Tensor] = {}
        self.steps = 0

    def _moved(self, x: Any) -> Any:
        if isinstance(x, tuple):
            items = [self._moved(item) for item in x]
            return type(x)(*items) if hasattr(x, "_fields") else tuple(items)
        if not isinstance(x, torch.Tensor) or x.numel() == 0:
            return x
        store = x.untyped_storage()
        key = store.data_ptr()
        if key not in self._arenas:
            raw = torch.full((store.nbytes() + 2 * _GAP + 512,), 0xFF, dtype=torch.uint8)
            start = -raw.data_ptr() % 256 + key % 256
            arena = self._arenas[key] = raw[start : start + store.nbytes() + 2 * _GAP]
            arena[_GAP : _GAP + store.nbytes()] = torch.empty(0, dtype=torch.uint8).set_(store)
        inside = self._arenas[key][_GAP : _GAP + store.nbytes()].view(x.dtype)
        mine = inside.as_strided(x.shape, x.stride(), inside.storage_offset() + x.storage_offset())
        self._theirs.append((x, mine))
        return mine

    def run(self, machine: Machine) -> None:
        """Run the launch from its first contents."""
        for key, arena in self._arenas.items():
            arena.copy_(self._first[key])
        machine.memory = self.bound.memory
        self.bound.run(machine)

    def learn(self, machine: Machine) -> None:
        """Run the launch with the text as it was compiled; what it leaves is kept, and put into the caller's."""
        before = machine.stats["instructions"]
        self.run(machine)
        self.steps = machine.stats["instructions"] - before
        self._right = {key: arena.clone() for key, arena in self._arenas.items()}
        with torch.no_grad():
            for theirs, mine in self._theirs:
                theirs.copy_(mine)

    def is_right(self) -> bool:
        """Return whether every byte is what :meth:`learn` has seen."""
        return all(torch.equal(self._right[key], arena) for key, arena in self._arenas.items())


def ways(cases: Sequence[Case], chosen: Sequence[Mutation]) -> Iterator[tuple[tuple[str, int | None], Case]]:
    """Yield the runs by which mutations are tried: copies that land late or early, warps in step or by seed.

    What the order of operations decides shows, or does not, with the number of a loop's rounds, which the first cases
    go through; edges of masks are the matter of the others.
    """
    order = bool(chosen) and all(m.kind in ORDER for m in chosen)
    for case in cases[:ROUNDS] if order else cases:
        yield ("late", None), case
    for way in (("early", None), ("late", 1), ("random", 2)):
        for case in cases[:2]:
            yield way, case


@dataclass
class Outcome:
    """Mutations planted together, and by what they were noticed, in which case, after how many runs."""

    mutations: tuple[Mutation, ...]
    caught_by: str | None  # a kind of hazard, "wrong result", "refused" by the emulator, None: not noticed
    message: str = ""
    case: str = ""
    tried: int = 0
    is_idle: bool = False  # what is changed does nothing in any case (see Subject.reached)


@dataclass
class Subject:
    """One compiled text and the recorded launches of it, in the order in which they are tried."""

    name: str
    target: str
    text: str
    machine: Machine
    cases: list[Case] = field(default_factory=list)
    faults: list[str] = field(
        default_factory=list
    )  # hazards of the text as it was compiled; those launches are no cases

    def outcome(self, *chosen: Mutation, only: Iterable[int] | None = None) -> Outcome:
        """Return by what mutations planted together are noticed, trying case after case until one notices.

        Args:
            chosen: the mutations.
            only: the numbers of the cases worth trying, where :meth:`reached` has found them.
        """
        machine, label, n = self.machine, "before it runs", 0
        cases = self.cases if only is None else [self.cases[i] for i in sorted(only)]
        try:
            with mutated(machine, *chosen):
                for n, (way, case) in enumerate(ways(cases, chosen), 1):
                    label, machine.most_steps = f"{case.label} {way}", 3 * case.steps + 10_000
                    machine.asynchrony, machine.seed = way
                    case.run(machine)
                    if not case.is_right():
                        return Outcome(chosen, "wrong result", "", label, n)
        except Hazard as error:
            return Outcome(chosen, error.kind, str(error), label, n)
        except UnknownInstruction as error:
            return Outcome(chosen, "refused", repr(error), label, n)
        return Outcome(chosen, None, tried=n)

    def reached(self, every: Iterable[Mutation]) -> dict[Mutation, set[int]]:
        """Return the cases in which a change does something, for those of which that is seen where they stand.

        A changed computation does if it gives a thread another value, a guard if it hides one, a copy if it copies.
        All are looked at in one run of each case.
        """
        found: dict[Mutation, set[int]] = {}
        places: dict[tuple[int, int], list[Mutation]] = defaultdict(list)
        for m in every:
            if m.at is not None and (is_computation(m) or is_idle(self.machine, m)):
                found[m] = set()
                places[m.block, m.at].append(m)
        seen: set[Mutation] = set()  # in the current case
        kept = list(self.machine.blocks)
        try:
            for (block, at), group in places.items():
                code = self.machine.blocks[block]
                body = list(code.body)
                body[at] = (self._watched(body[at][0], group, seen), *body[at][1:])
                self.machine.blocks[block] = code._replace(body=body)
            machine = self.machine
            machine.asynchrony, machine.seed, machine.most_steps = "late", None, 1 << 40
            for number, case in enumerate(self.cases):
                seen.clear()
                case.run(machine)
                assert case.is_right()
                for m in seen:
                    found[m].add(number)
        finally:
            self.machine.blocks[:] = kept
        return found

    def _watched(self, right: Step, group: list[Mutation], seen: set[Mutation]) -> Step:
        """Return a step that also adds to ``seen`` those of a place's mutations that do something."""
        machine, ins = self.machine, group[0].old
        idle = [(m, is_idle(machine, m)) for m in group]
        others = [(m, mutated_step(machine, m)[0]) for m in group if is_computation(m)]
        rows = [machine.row(r) for r in ins.operands[:2] if getattr(r, "name", None) in ins.writes]

        def run(mask: Any) -> None:
            seen.update(m for m, test in idle if test is not None and m not in seen and not test(mask))
            waiting = [(m, new) for m, new in others if m not in seen]
            before = [row.copy() for row in rows] if waiting else []
            right(mask)
            if not waiting:
                return
            was = [row.copy() for row in rows]
            for m, new in waiting:
                for row, value in zip(rows, before, strict=True):
                    row[...] = value
                new(mask)
                if any((row != value).any() for row, value in zip(rows, was, strict=True)):
                    seen.add(m)
            for row, value in zip(rows, was, strict=True):
                row[...] = value

        return run

    def outcomes(
        self, every: Sequence[Mutation], only: Mapping[Mutation, Iterable[int]] | None = None
    ) -> Iterator[Outcome]:
        """Yield what becomes of each mutation by itself; ``only``: the cases that are enough for some of them."""
        reached = self.reached(every)
        for m in every:
            if reached.get(m) or m not in reached:
                yield self.outcome(m, only=(only or {}).get(m, reached.get(m)))
            elif m.kind == "copy deleted":
                outcome = self.outcome(m)
                outcome.is_idle = outcome.caught_by is None
                yield outcome
            else:
                yield Outcome((m,), None, is_idle=True)


def record(
    target: str, calls: Iterable[tuple[str, Callable[[], Any]]], wanted: Callable[[str], bool], **options: Any
) -> list[Subject]:
    """Run calls of the Triton backend on CPU tensors, emulated; return a subject for each compiled text they launch.

    Args:
        target: "sm_80", "sm_90".
        calls: a label for each.
        wanted: which kernels, by name; the others run and are not recorded.
        options: of the machine.
    """
    subjects: dict[str, Subject] = {}
    label = ""

    def hook(kernel: Any, grid: tuple[int, ...], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if 0 in grid:
            return
        case = Case(target, label, kernel, grid, args, kwargs)
        compiled = case.bound.compiled
        subject = subjects.get(compiled.hash)
        if subject is None:
            machine = case.bound.machine(**options)
            subject = subjects[compiled.hash] = Subject(compiled.name, target, compiled.text, machine)
        subject.machine.asynchrony, subject.machine.seed = "late", None
        try:
            case.learn(subject.machine)
        except Hazard as error:
            subject.faults.append(f"{label}: {error}")
            return
        if wanted(compiled.name):
            subject.cases.append(case)

    # Outputs that a kernel leaves unwritten must not hold the right bits by chance: then torch.empty gives NaN.
    was = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        with assume_target(TARGETS[target]), any_device(), intercept(hook):
            for name, call in calls:
                label = name
                call()
    finally:
        torch.use_deterministic_algorithms(was)
    return [s for s in subjects.values() if wanted(s.name)]
