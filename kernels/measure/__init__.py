"""Measuring kernels: cases, timing, checked comparisons, results, the tuner of tiles. Of the lower floor alone.

Nothing that computes imports this package; tests, benchmarks and the commands that measure do.
"""

from __future__ import annotations

from .results import gpu_state, machine, machine_name, ratio_table, refused, row, write_results
from .timing import Clock, Roofline, Timing, cache_flusher, measure_roofline, summarise, time_call

__all__ = [
    "Clock",
    "Roofline",
    "Timing",
    "cache_flusher",
    "gpu_state",
    "machine",
    "machine_name",
    "measure_roofline",
    "ratio_table",
    "refused",
    "row",
    "summarise",
    "time_call",
    "write_results",
]
