"""Every wait for other ranks says on stderr, after a while, what it waits for. Imports no torch."""

from __future__ import annotations

import contextlib
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator

# Seconds before a wait is told, and between further tellings.
FIRST, AGAIN = 10.0, 60.0


@contextlib.contextmanager
def told(describe: Callable[[], str]) -> Iterator[None]:
    """Say what the block waits for once it has taken 10 s, and each minute from then on.

    Args:
        describe: called then, in a thread of its own; the text that follows "waited 10 s for", "" for none.
    """
    done, began = threading.Event(), time.monotonic()

    def tell() -> None:
        wait = FIRST
        while not done.wait(wait):
            wait = AGAIN
            text = describe()
            if text and not done.is_set():
                print(f"fusemesh: waited {time.monotonic() - began:.0f} s for {text}", file=sys.stderr, flush=True)

    thread = threading.Thread(target=tell, daemon=True, name="fusemesh: what is waited for")
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join(0.2)


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message: those of torch's C++ go on with the stack."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def ranks_text(ranks: Iterable[int]) -> str:
    """Return ranks as text: ``rank 3``, ``ranks 0-2, 5``, ``no rank``."""
    found = sorted(ranks)
    spans: list[list[int]] = []
    for rank in found:
        if spans and rank == spans[-1][-1] + 1:
            spans[-1] = [spans[-1][0], rank]
        else:
            spans.append([rank])
    if not spans:
        return "no rank"
    text = ", ".join("-".join(map(str, span)) for span in spans)
    return f"rank{'s' if len(found) > 1 else ''} {text}"
