"""The order in which the CTAs of a launch run: one after the other, or side by side where they may meet."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from typing import TYPE_CHECKING

from .hazard import Hazard

if TYPE_CHECKING:
    from .machine import Machine

Place = tuple[int, int, int]
PATIENCE = 50  # rounds in which nothing changes before waiting counts as waiting for ever


def run_grid(
    machine: Machine, params: dict[str, bytes], grid: Place, ctas: int | None = None, *, in_order: bool = False
) -> None:
    """Run every CTA of a grid, or the first ``ctas`` of them.

    Without a seed they start in ascending order. With one they start in any order, unless ``in_order``: a GPU promises
    none. Where CTAs may hear of each other through global memory, ``machine.resident`` of them run side by side, each
    in turn, or any by the seed; those that never get a place because all others wait for them are a deadlock.
    """
    places = [(x, y, z) for z, y, x in itertools.product(*(range(n) for n in reversed(grid)))][:ctas]
    chance = None if machine.seed is None else random.Random(machine.seed)
    if chance is not None and not in_order:
        chance.shuffle(places)
    if not any(code.synchronises for code in machine.blocks):
        for place in places:
            machine.run(params, place, grid)
        return
    _side_by_side(machine, params, grid, places, chance)


def _side_by_side(
    machine: Machine, params: dict[str, bytes], grid: Place, places: list[Place], chance: random.Random | None
) -> None:
    idle = [machine] + [machine.twin() for _ in range(min(machine.resident, len(places)) - 1)]
    running: list[tuple[Machine, Iterator[bool]]] = []
    fruitless: dict[Place, int] = {}  # how often in a row each CTA had its turn and could only wait
    changes, turn = machine.memory.changes, -1
    while places or running:
        while places and idle:
            each = idle.pop(0)
            running.append((each, each.begin(params, places.pop(0), grid)))
            fruitless = {}
        turn = (turn + 1) % len(running) if chance is None else chance.randrange(len(running))
        each, steps = running[turn]
        spins = next(steps, None)
        if spins is None:
            idle.append(each)
            del running[turn]
            turn -= 1
            fruitless = {}
        elif machine.memory.changes != changes:
            changes, fruitless = machine.memory.changes, {}
        elif spins:
            fruitless[each.place_in_grid] = fruitless.get(each.place_in_grid, 0) + 1
            if len(fruitless) == len(running) and min(fruitless.values()) > PATIENCE:
                raise _deadlock([x for x, _ in running], places)


def _deadlock(running: list[Machine], waiting: list[Place]) -> Hazard:
    """Return the error that says who waits for what."""
    parts = [f"CTA {each.place_in_grid}: {each.threads.describe()}" for each in running]
    if waiting:
        names = ", ".join(map(str, waiting[:8])) + (", ..." if len(waiting) > 8 else "")
        parts.append(f"no place is left for the {len(waiting)} CTAs {names}")
    return Hazard("deadlock", "CTAs wait for each other for ever | " + " | ".join(parts))
