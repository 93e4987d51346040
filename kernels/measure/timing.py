"""Times of calls, the time that a stage may take, and the two ceilings of a machine.

A time is a median; on a GPU it is taken with events, after the L2 cache was overwritten, with a pause before each case
so that one case does not heat the next.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch


class Clock:
    """The time that a stage of several cases may take."""

    def __init__(self, minutes: float) -> None:
        self._start = time.monotonic()
        self._seconds = 60 * minutes
        self._longest = 0.0

    @property
    def elapsed(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self._start

    @property
    def left(self) -> float:
        """Seconds that remain; 0 once they are used up."""
        return max(self._seconds - self.elapsed, 0.0)

    def allows_another(self) -> bool:
        """Return whether a case as slow as the slowest so far still fits."""
        return self.elapsed + self._longest <= self._seconds

    def took(self, seconds: float) -> None:
        """Note how long a case took."""
        self._longest = max(self._longest, seconds)


@dataclass(frozen=True)
class Timing:
    """Seconds of one call: median, 10th and 90th percentile over ``runs`` calls."""

    median: float
    low: float
    high: float
    runs: int


def time_call(
    fn: Callable[[], Any],
    device: torch.device | str,
    *,
    seconds: float = 0.2,
    least: int = 5,
    most: int = 200,
    pause: float = 0.1,
) -> Timing:
    """Time ``fn``.

    Args:
        fn: the call; its result is dropped.
        device: where it runs. On ``cuda`` each call is timed by two events, its inputs flushed from the L2 cache before
            the first; on ``cpu`` by the host's clock.
        seconds: about how long to measure for, after warming up (two calls).
        least, most: bounds of the number of measured calls.
        pause: seconds of rest before the case.
    """
    device = torch.device(device)
    once = _cuda_timer(device) if device.type == "cuda" else _cpu_timer
    for _ in range(2):
        estimate = once(fn)
    time.sleep(pause)
    runs = max(least, min(most, int(seconds / max(estimate, 1e-9))))
    return summarise([once(fn) for _ in range(runs)])


def summarise(samples: Sequence[float]) -> Timing:
    """Return the :class:`Timing` of measured seconds, at least one of them."""
    ordered = sorted(samples)
    last = len(ordered) - 1
    return Timing(statistics.median(ordered), ordered[round(0.1 * last)], ordered[round(0.9 * last)], len(ordered))


def _cpu_timer(fn: Callable[[], Any]) -> float:
    start = time.perf_counter()
    fn()
    return time.perf_counter() - start


def cache_flusher(device: torch.device | str) -> Callable[[], None]:
    """Return a function that evicts everything from a GPU's L2 cache (on a CPU it does nothing)."""
    device = torch.device(device)
    if device.type != "cuda":
        return lambda: None
    # Twice the cache and never less than 256 MB.
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    written = torch.empty(max(2 * cache, 1 << 28), dtype=torch.int8, device=device)

    def flush() -> None:
        written.zero_()

    return flush


def _cuda_timer(device: torch.device) -> Callable[[Callable[[], Any]], float]:
    flush = cache_flusher(device)

    def once(fn: Callable[[], Any]) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        flush()
        start.record()
        fn()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3

    return once


@dataclass(frozen=True)
class Roofline:
    """The two ceilings of a machine, as measured on it, and where."""

    dtype: str
    matmul_flops: float  # per second, of PyTorch's own product of two square matrices in dtype
    copy_bytes: float  # per second, read plus written, of a large copy

    def percent(self, flops: float, bytes_moved: float, seconds: float) -> dict[str, float]:
        """Return the percent of each ceiling that a call came to."""
        return {
            "percent_of_matmul_peak": 100 * flops / seconds / self.matmul_flops,
            "percent_of_copy_bandwidth": 100 * bytes_moved / seconds / self.copy_bytes,
        }


def measure_roofline(device: torch.device | str, dtype: torch.dtype, size: int | None = None) -> Roofline:
    """Measure both ceilings, on random data (zeros run faster: less of the chip switches).

    ``size`` is that of the matrices, and the copy has size^2 * 16 bytes; by default 8192 on a GPU and 1024 on a CPU.
    """
    device = torch.device(device)
    size = size or (8192 if device.type == "cuda" else 1024)
    copied = 16 * size**2
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    product = time_call(lambda: a @ b, device)
    source = torch.randint(0, 100, (copied,), dtype=torch.int8, device=device)
    target = torch.empty_like(source)
    copy = time_call(lambda: target.copy_(source), device)
    return Roofline(str(dtype).removeprefix("torch."), 2 * size**3 / product.median, 2 * copied / copy.median)
