"""This machine as hardware: a few seconds of the operations and collectives of a training step, on local processes.

Ranks on one machine share its cores and its memory, so rates are timed of one rank alone and of as many at once as
there are cores; more ranks than cores take turns. Collectives are timed in the world that is planned for, too.
"""

from __future__ import annotations

import os
import statistics
import time
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional as F

from fusemesh.kernels.attention.dense.api import flash_attention
from fusemesh.kernels.matmul.parallel import all_gather, all_reduce, reduce_scatter

from ..apply import parallelize
from ..layout import Layout
from ..ranks.join import World, build_mesh, distributed
from ..ranks.local import LocalRanks
from ..tensor.modules import ColumnParallelLinear, RMSNorm, RowParallelLinear
from .hardware import Curve, Hardware, Link

# [m, k] x [k, n]; bytes of a tensor of elementwise operations; [m, k, n] of the matmul before a collective, whose bytes
# follow.
_MATMULS = ((16, 64, 64), (128, 128, 256), (256, 512, 512), (512, 1024, 1024))
_TENSORS = (1 << 14, 1 << 18, 1 << 21, 1 << 24, 1 << 26)
_WORK = (256, 1024, 512)
_MESSAGES = (1 << 12, 1 << 16, 1 << 20, 1 << 23, 1 << 25)
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}


def measure(world: int, *, dtype: str = "float32", threads: int = 1) -> Hardware:
    """Measure this machine for ``world`` ranks with ``threads`` threads each; ten to thirty seconds.

    Returns:
        Hardware whose memory is each rank's part of the machine's.

    Raises:
        ValueError: a number below 1, or a dtype that ranks on a CPU do not train in.
    """
    if world < 1:
        raise ValueError(f"--world: expected at least 1 rank, received {world}")
    if dtype not in _DTYPES:
        raise ValueError(f"dtype: expected one of {', '.join(_DTYPES)}, received {dtype!r}")
    cores = os.cpu_count() or 1
    full = max(1, min(cores // threads, world))
    found: dict[int, dict[str, Any]] = {}
    with LocalRanks(world, {"OMP_NUM_THREADS": str(threads)}) as ranks:
        for count in sorted({1, full, world}):
            results = ranks.call(_measure_rank, dtype, threads, ranks=count, timeout=300)
            found[count] = {key: _middle([result[key] for result in results]) for key in results[0]}
    alone = found[1]
    peak = max(alone[f"matmul {i}"] for i in range(len(_MATMULS)))
    stream = alone["stream"]
    fits = {}
    for count, values in found.items():
        for key in {key.rpartition(" ")[0] for key in values if key.startswith(("all_", "reduce_", "send"))}:
            fits[f"{key}:{count}"] = _fit([(size, values[f"{key} {size}"]) for size in _MESSAGES])
    return Hardware(
        name="local",
        device="cpu",
        memory=_memory() // world,
        reserved=int(alone["resident"]),
        peak={dtype: peak},
        matmul_fraction=Curve(
            tuple((2.0 * m * k * n, alone[f"matmul {i}"] / peak) for i, (m, k, n) in enumerate(_MATMULS))
        ),
        attention_fraction=alone["attention"] / peak,
        bandwidth=stream,
        bandwidth_fraction=Curve(tuple((float(size), alone[f"tensor {size}"] / stream) for size in _TENSORS)),
        block_s=alone["block"],
        step_s=alone["step"],
        ranks_per_node=max(world, 1),
        intra=fits.get(f"send:{world}:{world}", Link(1e-4, 1e9)),
        inter=fits.get(f"send:{world}:{world}", Link(1e-4, 1e9)),
        slowdown=_slowdown([f"matmul {i}" for i in range(2, len(_MATMULS))], found, full, world),
        memory_slowdown=_slowdown(["stream", *(f"tensor {s}" for s in _TENSORS[-2:])], found, full, world),
        cores=full,
        fits=fits,
        sources={"everything": f"measured here, {threads} thread(s) a rank, {cores} cores"},
    )


def _middle(values: Sequence[float]) -> float:
    return statistics.median(values)


def _slowdown(keys: Sequence[str], found: dict[int, dict[str, float]], full: int, world: int) -> Curve:
    """Return the factor by which each of k ranks is slower than one alone, where ``full`` of them take all cores.

    Up to there it is the geometric middle of the rates of ``keys``; beyond, ranks take turns, and lose some time by it.
    """
    alone, together = found[1], found[full]
    shared = max(1.0, statistics.geometric_mean(alone[key] / together[key] for key in keys))
    points = {1.0: 1.0, float(full): shared if full > 1 else 1.0}
    if world > full:
        turns = world / full
        points[float(world)] = points[float(full)] * turns * max(1.0, found[world]["turn"] / (alone["turn"] * turns))
    return Curve(tuple(points.items()))


def _fit(points: Sequence[tuple[int, float]]) -> Link:
    """Return the latency and bandwidth whose relative errors at (bytes, seconds) are least in squares."""
    ones = [1 / t for _, t in points]
    sizes = [size / t for size, t in points]
    aa, ab, bb = (
        sum(x * y for x, y in zip(u, v, strict=True)) for u, v in ((ones, ones), (ones, sizes), (sizes, sizes))
    )
    a, b = sum(ones), sum(sizes)
    determinant = aa * bb - ab * ab
    latency, per_byte = (a * bb - b * ab) / determinant, (b * aa - a * ab) / determinant
    if latency <= 0 or per_byte <= 0:  # noise: the smallest and the largest message say it
        latency = points[0][1]
        per_byte = max(points[-1][1] - latency, 1e-3 * points[-1][1]) / points[-1][0]
    return Link(latency, 1 / per_byte)


def _memory() -> int:
    """Return the bytes of memory that this machine has free for new processes."""
    try:
        with open("/proc/meminfo") as file:
            lines = dict(line.split(":", 1) for line in file)
        return int(lines["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        return int(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")) if hasattr(os, "sysconf") else 1 << 34


def resident() -> int:
    """Return the bytes of memory that this process holds now; 0 where the system does not say."""
    try:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, IndexError):
        return 0


def _measure_rank(dtype: str, threads: int) -> dict[str, float]:
    """Return rates in FLOP/s and bytes/s, times in seconds, of this rank among the others."""
    torch.set_num_threads(threads)
    found: dict[str, float] = {"resident": float(resident())}
    with distributed("cpu") as world:
        kind = _DTYPES[dtype]
        for index, (m, k, n) in enumerate(_MATMULS):
            x, w = torch.randn(m, k, dtype=kind), torch.randn(n, k, dtype=kind)
            found[f"matmul {index}"] = 2.0 * m * k * n / _time(partial(F.linear, x, w))
        found["turn"] = _time_together(partial(F.linear, x, w))
        for size in _TENSORS:
            a, b = torch.ones(size // 4), torch.ones(size // 4)
            # Results are kept for a while, as activations and gradients are: what was just freed is still in caches.
            kept = deque((torch.ones(size // 4) for _ in range(4)), maxlen=4)
            found[f"tensor {size}"] = 3.0 * size / _time(partial(_add_and_keep, a, b, kept))
        large, other = torch.ones(_TENSORS[-1] // 4), torch.ones(_TENSORS[-1] // 4)
        found["stream"] = 3.0 * _TENSORS[-1] / _time(partial(large.add_, other))
        found["attention"] = _attention_rate(kind)
        if world.world_size == 1:
            found["block"], found["step"] = _host_times(world)
        found.update(_collectives(world))
    return found


def _add_and_keep(a: torch.Tensor, b: torch.Tensor, kept: deque[torch.Tensor]) -> None:
    kept.append(torch.add(a, b))


def _time(call: Callable[[], Any], *, seconds: float = 0.05) -> float:
    """Return the seconds of a call without collectives, after one to warm up; all ranks start at once.

    The best of three means over ``seconds`` each. With one thread they are seconds of this process on a core, so that
    other programs, and ranks that share the core, do not count, while waiting for the memory that they share does.
    """
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    call()
    dist.barrier()
    means = []
    for _ in range(3):
        count, began = 0, clock()
        while (elapsed := clock() - began) < seconds or count < 2:
            call()
            count += 1
        means.append(elapsed / count)
    return min(means)


def _time_together(call: Callable[[], Any]) -> float:
    """Return the median seconds until every rank has made three calls and knows it of the others, by the wall's clock.

    Where ranks share cores this is more than what they take one after the other: who is done waits for its turn to hear
    of it, and who is late is waited for.
    """
    times = []
    for _ in range(12):
        start = time.perf_counter()
        for _ in range(3):
            call()
        dist.barrier()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def _attention_rate(dtype: torch.dtype) -> float:
    """Return FLOP/s of causal attention, forward and backward, counted as :mod:`.operations` counts them."""
    batch, heads, length, dim = 2, 4, 256, 32
    q, k, v = (torch.randn(batch, heads, length, dim, dtype=dtype, requires_grad=True) for _ in range(3))

    def step() -> None:
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        torch.autograd.grad(out.sum(), (q, k, v))

    return 1.75 * 4.0 * batch * heads * length * length * dim / _time(step)


class _Block(nn.Module):
    """A layer too small for its arithmetic to take time: what remains is what the host does for it."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.norms = nn.ModuleDict({name: RMSNorm(width) for name in ("attention", "mlp")})
        self.inputs = nn.ModuleDict({n: ColumnParallelLinear(width, width, num_heads=2, enter=False) for n in "qkv"})
        self.output, self.down = RowParallelLinear(width, width), RowParallelLinear(width, width)
        self.gate = ColumnParallelLinear(width, width, activation="silu", gated=True)

    def forward(self, h: torch.Tensor) -> torch.Tensor:
        x = self.norms["attention"](h)
        q, k, v = (self.inputs[name](x).unflatten(-1, (2, -1)).transpose(1, 2) for name in "qkv")
        # As many small operations as rotary positions take.
        q, k = (torch.cat([y * 0.5, y * 0.5 - y * 0.5], -1)[..., : y.shape[-1]] for y in (q, k))
        y = flash_attention(q, k, v, causal=True)
        assert isinstance(y, torch.Tensor)
        h = self.output(y.transpose(1, 2).flatten(2), h)
        return self.down(self.gate(self.norms["mlp"](h)), h)


class _Stack(nn.Module):
    def __init__(self, layers: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(_Block() for _ in range(layers))
        self.norm = RMSNorm(16)

    def forward(self, h: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            h = block(h)
        return self.norm(h).sum()


def _host_times(world: World) -> tuple[float, float]:
    """Return the seconds of Python, autograd and fully_shard alone, for a layer and for a step besides its layers.

    Of one process, for :func:`_time` calls as often as there is time, which collectives must not be called.
    """
    times, layout = [], Layout()
    mesh = build_mesh(layout, world)
    x = torch.randn(1, 16, 16)
    for layers in (1, 4):
        model = parallelize(_Stack(layers), mesh, layout)
        optimizer = torch.optim.AdamW(model.parameters(), fused=True)

        def step(model: nn.Module = model, optimizer: torch.optim.Optimizer = optimizer) -> None:
            optimizer.zero_grad(set_to_none=True)
            model(x).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()

        times.append(_time(step, seconds=0.1))
    block = max(0.0, (times[1] - times[0]) / 3)
    return block, max(0.0, times[0] - block)


def _collectives(world: World) -> dict[str, float]:
    """Return the seconds of ``collective:n size``, in groups of n ranks of the world, all of them at once.

    Each follows some computing, as in a training step: where ranks share cores, one that is ready to go on waits for
    its turn, which ranks that do nothing but communicate would not see.
    """
    found = {}
    ranks = world.world_size
    x = torch.randn(_WORK[:2])
    work = partial(F.linear, x, torch.randn(_WORK[2], _WORK[1]))
    computing = _time(work) * max(1.0, ranks * torch.get_num_threads() / (os.cpu_count() or 1))
    for n in (n for n in range(2, ranks + 1) if ranks % n == 0):
        groups = [dist.new_group(list(range(first, first + n))) for first in range(0, ranks, n)]
        group = groups[world.rank // n]
        place = world.rank % n
        for size in _MESSAGES:
            whole, part = torch.ones(size // 4), torch.ones(size // 4 // n)
            calls: dict[str, Callable[[], Any]] = {
                "all_gather": partial(all_gather, part, group, 0),
                "reduce_scatter": partial(reduce_scatter, whole, group, 0),
                "all_reduce": partial(all_reduce, whole, group),
                "send": partial(_pass_on, whole, world.rank - place, place, n),
            }
            for name, call in calls.items():
                found[f"{name}:{n} {size}"] = _time_collective(call, work, computing)
    return found


def _pass_on(x: torch.Tensor, first: int, place: int, n: int) -> None:
    """Send to the successor in the group and receive from the predecessor, as every rank does."""
    into = torch.empty_like(x)
    to, source = first + (place + 1) % n, first + (place - 1) % n
    for work in dist.batch_isend_irecv([dist.P2POp(dist.isend, x, to), dist.P2POp(dist.irecv, into, source)]):
        work.wait()


def _time_collective(call: Callable[[], Any], work: Callable[[], Any], computing: float) -> float:
    """Return the median seconds that a call adds to ``work``, which takes ``computing``, over a few rounds.

    Their number is fixed, because every rank takes part in each.
    """
    call()
    dist.barrier()
    times = []
    for _ in range(7):
        start = time.perf_counter()
        work()
        call()
        times.append(time.perf_counter() - start)
    return max(statistics.median(times) - computing, 1e-6)
