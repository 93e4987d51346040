"""Rates, memory and links of the ranks, stated with their sources or measured (:mod:`.measure`)."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Curve:
    """A positive quantity known at some points, between them linear in both logarithms, beyond them constant.

    points: (x, value), x rising.
    """

    points: tuple[tuple[float, float], ...]

    def __call__(self, x: float) -> float:
        """Return the value at ``x``."""
        if x <= self.points[0][0]:
            return self.points[0][1]
        for (left, low), (right, high) in zip(self.points, self.points[1:], strict=False):
            if x <= right:
                along = math.log(x / left) / math.log(right / left)
                return math.exp(math.log(low) + along * (math.log(high) - math.log(low)))
        return self.points[-1][1]


ONE = Curve(((1.0, 1.0),))

_UNITS = {"k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}
# Plain numbers below these (bytes, bytes/s, FLOP/s) or, of latencies, above (s) were meant in another unit.
_LEAST = {"memory": 2**20, "reserved": 2**20, "bandwidth": 1e6, "peak": 1e6}
_MOST_LATENCY = 1.0


@dataclass(frozen=True)
class Link:
    """Time of a message: latency in seconds, and bytes per second in one direction (the alpha-beta model)."""

    latency: float
    bandwidth: float

    def seconds(self, size: float) -> float:
        """Return the time of ``size`` bytes."""
        return self.latency + size / self.bandwidth


# How often a ring of n passes the whole tensor, as a multiple of (n - 1) / n (Thakur et al., 2005).
_PASSES = {"all_gather": 1.0, "reduce_scatter": 1.0, "all_reduce": 2.0}


@dataclass(frozen=True)
class Hardware:
    """One kind of rank, and the links between such ranks.

    peak: FLOP/s by dtype; matmul_fraction: what of it a matmul reaches, by its FLOPs; attention_fraction: and
    attention.
    bandwidth: memory's bytes/s; bandwidth_fraction: what of it an elementwise operation reaches, by the bytes of its
    result, which is a new tensor (on a CPU more than 1 in the caches, and far less where the system must first give it
    pages); stream_fraction: what of it an operation in place on large tensors reaches.
    memory: bytes a rank has; reserved: of which are gone before the first tensor.
    operation_s, block_s, step_s: host time of one operation, of one layer in one microbatch, and of one step.
    ranks_per_node; intra, inter: the links between ranks within a node, and of one rank to other nodes.
    overlap: the part of computing time behind which data-parallel communication can hide; contention: by what part of
    the hidden time computing slows down.
    slowdown: of each of k ranks that compute at once on one machine; memory_slowdown: the same of what is larger than
    caches; cores: how many ranks do not share one.
    fits: the measured time of ``collective:n:world``, in which every rank of a world takes part, in groups of n.
    """

    name: str
    device: str
    memory: int
    peak: Mapping[str, float]
    bandwidth: float
    intra: Link
    inter: Link
    reserved: int = 0
    matmul_fraction: Curve = ONE
    attention_fraction: float = 1.0
    bandwidth_fraction: Curve = ONE
    stream_fraction: float = 1.0
    operation_s: float = 0.0
    block_s: float = 0.0
    step_s: float = 0.0
    ranks_per_node: int = 8
    overlap: float = 0.0
    contention: float = 0.0
    slowdown: Curve = ONE
    memory_slowdown: Curve = ONE
    cores: int = 0
    fits: Mapping[str, Link] = field(default_factory=dict)
    sources: Mapping[str, str] = field(default_factory=dict)

    def matmul_s(self, flops: float, size: float, dtype: str) -> float:
        """Return the time of one matmul by the roofline, with ``size`` bytes of operands and result."""
        if flops <= 0:
            return 0.0
        rate = self._peak(dtype) * self.matmul_fraction(flops)
        return max(flops / rate, size / (self.bandwidth * self.bandwidth_fraction(size))) + self.operation_s

    def attention_s(self, flops: float, dtype: str) -> float:
        """Return the time of attention's core."""
        return flops / (self._peak(dtype) * self.attention_fraction) + self.operation_s

    def memory_s(self, size: float, tensor: float, calls: float = 1) -> float:
        """Return the time of ``calls`` operations on tensors of ``tensor`` bytes that read and write ``size`` bytes."""
        return size / (self.bandwidth * self.bandwidth_fraction(max(tensor, 1))) + calls * self.operation_s

    def stream_s(self, size: float) -> float:
        """Return the time of reading and writing ``size`` bytes in place, in large tensors."""
        return size / (self.bandwidth * self.stream_fraction)

    def collective_s(self, collective: str, size: float, ranks: int, stride: int, world: int) -> float:
        """Return the time of one collective.

        Args:
            collective: ``all_gather``, ``reduce_scatter``, ``all_reduce`` or ``send`` (to the next of the group).
            size: bytes of the whole tensor: gathered, before it is scattered, reduced, or sent.
            ranks: of the group.
            stride: how far apart in rank its neighbours are.
            world: ranks that are in such a group at once.
        """
        if ranks == 1 or size <= 0:
            return 0.0
        fit = self.fits.get(f"{collective}:{ranks}:{world}")
        if fit is not None:
            return fit.seconds(size)
        near = max(1, min(ranks, self.ranks_per_node // stride if stride < self.ranks_per_node else 1))
        link = self.intra
        if near < ranks:
            # The ring leaves the node over as many adapters as the group has ranks in it.
            link = Link(self.inter.latency, min(self.intra.bandwidth, near * self.inter.bandwidth))
        if collective == "send":
            return link.seconds(size)
        passes = _PASSES[collective]
        slow = self.slowdown(world) if self.device == "cpu" else 1.0
        return slow * passes * ((ranks - 1) * link.latency + (ranks - 1) / ranks * size / link.bandwidth)

    def _peak(self, dtype: str) -> float:
        if dtype not in self.peak:
            raise ValueError(
                f"dtype: hardware {self.name!r} states no rate for {dtype!r}; use one of {', '.join(self.peak)}"
            )
        return self.peak[dtype]

    def as_dict(self) -> dict[str, Any]:
        """Return plain values, which :func:`from_dict` reads back."""
        return asdict(self)


def from_dict(values: Mapping[str, Any]) -> Hardware:
    """Return hardware from plain values, as in ``hardware.json``.

    Sizes and rates are numbers in bytes, bytes/s and FLOP/s, or of bytes texts with their unit, such as "80GB".

    Raises:
        ValueError: a key that is missing or unknown, or a number that can be in no such unit.
    """
    found = {key: _in_bytes(key, value) for key, value in values.items()}
    for dtype, rate in (found["peak"] if isinstance(found.get("peak"), Mapping) else {}).items():
        _check_unit(f"peak.{dtype}", rate, "FLOP/s", _LEAST["peak"])
    for key in ("matmul_fraction", "bandwidth_fraction", "slowdown", "memory_slowdown"):
        if key in found:
            points = found[key]["points"] if isinstance(found[key], Mapping) else found[key]
            found[key] = Curve(tuple((float(x), float(y)) for x, y in points))
    for key in ("intra", "inter"):
        if key in found:
            found[key] = _link(key, found[key])
    found["fits"] = {key: _link(f"fits.{key}", value) for key, value in found.get("fits", {}).items()}
    try:
        return Hardware(**found)
    except TypeError as error:
        raise ValueError(f"--gpu: not a description of hardware: {error}") from None


def bytes_of(text: str, name: str = "--memory") -> int:
    """Return ``80GB`` (10^9) or ``80GiB`` (2^30) in bytes.

    Args:
        text: a number and its unit.
        name: of the option or key, for the error.

    Raises:
        ValueError: no such size, or a number without a unit.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]i?)?b?\s*", text.lower())
    if match is None or float(match[1]) == 0:
        raise ValueError(f"{name}: expected a size such as 80GB or 75GiB, received {text!r}")
    if match[2] is None:
        number = match[1]
        raise ValueError(
            f"{name}: expected a size with its unit, received {text!r}; write {number}GB (10^9 bytes) or {number}GiB "
            "(2^30 bytes)"
        )
    return int(float(match[1]) * _UNITS[match[2]])


def _in_bytes(key: str, value: Any) -> Any:
    """Return the value of ``memory``, ``reserved`` or ``bandwidth``, of which a text has a unit; any other as it is."""
    if key in ("memory", "reserved", "bandwidth") and isinstance(value, str):
        return bytes_of(value.removesuffix("/s"), f"--gpu: {key}")
    # Nothing may be reserved.
    if key in ("memory", "bandwidth") or (key == "reserved" and value != 0):
        _check_unit(key, value, "bytes/s" if key == "bandwidth" else "bytes", _LEAST[key])
    return value


def _link(key: str, values: Mapping[str, Any]) -> Link:
    found = Link(**{name: _in_bytes(name, value) for name, value in values.items()})
    if not 0 <= found.latency <= _MOST_LATENCY:
        raise ValueError(f"--gpu: {key}.latency: expected seconds, received {found.latency!r}; 5 microseconds are 5e-6")
    return found


def _check_unit(key: str, value: Any, unit: str, least: float) -> None:
    if not isinstance(value, (int, float)) or not value >= least:
        raise ValueError(f'--gpu: {key}: expected {unit}, such as 80e9 (or of bytes "80GB"), received {value!r}')


def named_hardware() -> dict[str, dict[str, Any]]:
    """Return every entry of ``hardware.json``."""
    text = resources.files(__package__).joinpath("hardware.json").read_text(encoding="utf-8")
    table: dict[str, dict[str, Any]] = json.loads(text)
    return table


def find_hardware(name: str) -> Hardware:
    """Return hardware by its name in ``hardware.json``, or from a JSON file of the same keys.

    Raises:
        ValueError: neither.
    """
    known = named_hardware()
    if name.lower() in known:
        return from_dict({"name": name.lower(), **known[name.lower()]})
    if not Path(name).is_file():
        raise ValueError(
            f"--gpu: expected local (measure this machine), {', '.join(known)}, or a JSON file, received {name!r}"
        )
    try:
        return from_dict(json.loads(Path(name).read_text(encoding="utf-8")))
    except (OSError, json.JSONDecodeError, TypeError, AttributeError) as error:
        raise ValueError(f"--gpu: expected a JSON file with hardware's keys, received {name!r}: {error}") from error
