"""Layout: the axes of the mesh, the ranks on each, their demands on a model, and the place of each rank."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Axis:
    """One axis of the mesh.

    Args:
        name: in a layout's text, and the dimension's name in the mesh.
        title: in words, for errors.
        splits: what ranks that differ on this axis hold different parts of: ``samples``, ``parameters`` (gathered
            before they are used), ``features`` (of every matmul), ``layers``, ``sequence``.
        parts: what its degree counts, for :meth:`Layout.describe`.
        is_built: whether it has an implementation; one that has none parses, and :meth:`Layout.validate` refuses it.
    """

    name: str
    title: str
    splits: tuple[str, ...]
    parts: str
    is_built: bool = True

    @property
    def sums_losses(self) -> bool:
        """Return whether its ranks see different tokens, so that losses and gradients are summed over it."""
        return "samples" in self.splits or "sequence" in self.splits


# Slowest axis first: neighbouring ranks differ in tp, whose collectives are the largest and the most frequent.
# A new axis is a row here, a degree in Layout, and its implementation.
TABLE = (
    Axis("pp", "pipeline parallel", ("layers",), "stages of layers"),
    Axis("dp", "data parallel", ("samples",), "replicas of the model, each with its own samples"),
    Axis(
        "fsdp",
        "sharded data parallel",
        ("samples", "parameters"),
        "shards of the parameters, each with its own samples",
    ),
    Axis("cp", "context parallel", ("sequence",), "parts of the sequence", is_built=False),
    Axis("tp", "tensor parallel", ("features",), "parts of every matmul"),
)
AXES = tuple(axis.name for axis in TABLE)
# The axes whose ranks see different samples, and those over which losses are summed.
SAMPLE_AXES = tuple(axis.name for axis in TABLE if "samples" in axis.splits)
LOSS_AXES = tuple(axis.name for axis in TABLE if axis.sums_losses)

_TERM = re.compile(r"([a-z]+)\s*=?\s*(\d+)")


@dataclass(frozen=True)
class Layout:
    """The degree of each axis of the mesh; their product is the number of ranks.

    ``dp`` replicates the model and ``fsdp`` shards it over ranks that see different samples; ``tp`` splits every
    matmul; ``pp`` splits the layers into stages; ``cp`` splits the sequence (it parses, and :meth:`validate` refuses
    it: it is not there yet).

    Raises:
        ValueError: a degree is not a positive integer.
    """

    dp: int = 1
    fsdp: int = 1
    tp: int = 1
    cp: int = 1
    pp: int = 1

    def __post_init__(self) -> None:
        for axis in AXES:
            degree = getattr(self, axis)
            if not isinstance(degree, int) or isinstance(degree, bool) or degree < 1:
                raise ValueError(f"layout: {axis} must be a positive integer, received {degree!r}")

    @classmethod
    def parse(cls, text: str | Layout) -> Layout:
        """Return the layout that ``"dp2 x tp2"``, ``"fsdp4"``, ``"dp2xfsdp2xtp2"`` or ``"single"`` means.

        A layout is returned as it is, so that who was given either parses once and passes the layout on.

        Raises:
            ValueError: an unknown axis, an axis given twice, a degree below 1, or text that is no layout.
        """
        if isinstance(text, Layout):
            return text
        form = f"axes {', '.join(AXES)} with degrees, joined by x, such as 'dp2 x tp2', or 'single'"
        stripped = text.strip().lower()
        if stripped == "single":
            return cls()
        degrees: dict[str, int] = {}
        for term in re.split(r"(?<=\d)\s*[x*,]\s*|(?<=\d)\s+", stripped):
            match = _TERM.fullmatch(term)
            if match is None:
                raise ValueError(f"layout: expected {form}; received {text!r}, in which {term!r} is no axis and degree")
            axis, degree = match[1], int(match[2])
            if axis not in AXES:
                raise ValueError(f"layout: expected {form}; received {text!r} with the unknown axis {axis!r}")
            if axis in degrees:
                raise ValueError(f"layout: {axis} is given twice in {text!r}; give each axis once")
            degrees[axis] = degree
        return cls(**degrees)

    @property
    def shape(self) -> tuple[int, ...]:
        """The degrees in the order of :data:`AXES`."""
        return tuple(getattr(self, axis) for axis in AXES)

    @property
    def world_size(self) -> int:
        """Number of ranks."""
        return math.prod(self.shape)

    @property
    def replicas(self) -> int:
        """Number of groups of ranks that see different samples: dp times fsdp."""
        return math.prod(getattr(self, axis) for axis in SAMPLE_AXES)

    def stride(self, axis: str) -> int:
        """Return the distance between neighbours on ``axis``: the ranks of all faster axes."""
        return math.prod(self.shape[AXES.index(axis) + 1 :])

    def coordinates(self, rank: int) -> dict[str, int]:
        """Return the place of ``rank`` on each axis.

        Raises:
            ValueError: the rank is not below :attr:`world_size`.
        """
        if not 0 <= rank < self.world_size:
            raise ValueError(f"rank: layout {self} has ranks 0 to {self.world_size - 1}, received {rank}")
        return {axis: rank // self.stride(axis) % getattr(self, axis) for axis in AXES}

    def replica_of(self, rank: int) -> int:
        """Return the number of the replica that ``rank`` belongs to; ranks of one replica see the same samples."""
        at, replica = self.coordinates(rank), 0
        for axis in SAMPLE_AXES:
            replica = replica * getattr(self, axis) + at[axis]
        return replica

    def validate(
        self,
        *,
        world_size: int | None = None,
        num_layers: int | None = None,
        num_heads: int | None = None,
        num_kv_heads: int | None = None,
        intermediate_size: int | None = None,
        sequence_length: int | None = None,
        global_batch: int | None = None,
        sequence_parallel: bool = True,
        virtual_stages: int = 1,
    ) -> None:
        """Refuse what this layout cannot run, before any rank waits for another. What is None is not looked at.

        Args:
            world_size: ranks that were started.
            num_layers, num_heads, num_kv_heads, intermediate_size: of the model.
            sequence_length: tokens in one sample.
            global_batch: samples in one step, over all replicas.
            sequence_parallel: whether activations between the matmuls are split along the sequence over tp.
            virtual_stages: stages on each rank of pp.

        Raises:
            ValueError: names the key, the value received, and legal ones.
        """
        for axis in TABLE:
            if not axis.is_built and getattr(self, axis.name) != 1:
                built = ", ".join(other.name for other in TABLE if other.is_built)
                raise ValueError(
                    f"layout: {axis.title} ({axis.name}) is not there yet, received {self}; use {axis.name}1 with "
                    f"{built}"
                )
        if world_size is not None and world_size != self.world_size:
            raise ValueError(
                f"layout: {self} needs {self.world_size} ranks and {world_size} were started; start {self.world_size} "
                f"(--nproc {self.world_size}) or give degrees whose product is {world_size}"
            )
        if num_layers is not None and self.pp > 1:
            self._check_stages(num_layers, virtual_stages)
        if num_heads is not None and num_heads % self.tp != 0:
            raise ValueError(
                f"num_heads: {num_heads} heads cannot be split over tp{self.tp}; {_divisors(num_heads, 'tp')}"
            )
        if num_kv_heads is not None and num_kv_heads % self.tp != 0 and self.tp % num_kv_heads != 0:
            legal = sorted({t for t in range(1, 2 * self.tp + 1) if num_kv_heads % t == 0 or t % num_kv_heads == 0})
            raise ValueError(
                f"num_kv_heads: {num_kv_heads} key/value heads fit tp{self.tp} only if one divides the other; "
                f"use tp in {legal}"
            )
        if intermediate_size is not None and intermediate_size % self.tp != 0:
            raise ValueError(
                f"intermediate_size: {intermediate_size} cannot be split over tp{self.tp}; use a multiple of {self.tp}"
            )
        if sequence_length is not None and sequence_parallel and sequence_length % self.tp != 0:
            raise ValueError(
                f"sequence_length: {sequence_length} tokens cannot be split over tp{self.tp}; use a multiple of "
                f"{self.tp}, or sequence_parallel=False"
            )
        if global_batch is not None and global_batch % self.replicas != 0:
            raise ValueError(
                f"global_batch: {global_batch} samples cannot be dealt to {self.replicas} replicas (dp{self.dp} x "
                f"fsdp{self.fsdp}); use a multiple of {self.replicas}"
            )

    def _check_stages(self, num_layers: int, virtual_stages: int) -> None:
        stages = self.pp * virtual_stages
        if num_layers >= stages:
            return
        each = f" x {virtual_stages} virtual stages a rank" if virtual_stages > 1 else ""
        legal = [f"pp up to {max(1, num_layers // virtual_stages)}", f"at least {stages} layers"]
        if virtual_stages > 1 and num_layers >= self.pp:
            fewer = num_layers // self.pp
            legal.insert(1, f"pipeline.virtual_stages {fewer}" + (" and pipeline.schedule 1f1b" if fewer == 1 else ""))
        raise ValueError(
            f"num_layers: {num_layers} layers cannot be dealt to pp{self.pp}{each}, whose {stages} stages need one "
            f"each; use {', or '.join(legal)}"
        )

    def describe(self) -> str:
        """Return the layout in words, one line an axis."""
        lines = [f"{self}: {self.world_size} rank{'s' if self.world_size > 1 else ''}"]
        lines += [
            f"  {axis.name:<4} {degree} {axis.parts}"
            for axis, degree in zip(TABLE, self.shape, strict=True)
            if degree > 1
        ]
        return "\n".join(lines)

    def __str__(self) -> str:
        terms = [f"{axis}{degree}" for axis, degree in zip(AXES, self.shape, strict=True) if degree > 1]
        return " x ".join(terms) if terms else "single"


def check_heads(num_heads: int, num_kv_heads: int, prefix: str = "", of: str = "") -> None:
    """Check that each key/value head serves equally many query heads.

    Args:
        num_heads, num_kv_heads: of the model.
        prefix: stands before the two names in the error.
        of: says whose they are.

    Raises:
        ValueError: ``num_kv_heads`` is no divisor of ``num_heads``.
    """
    if num_heads % num_kv_heads:
        raise ValueError(
            f"{prefix}num_kv_heads: expected a divisor of {prefix}num_heads = {num_heads}{of}, received {num_kv_heads}"
        )


def _divisors(number: int, axis: str) -> str:
    return f"use {axis} in {[d for d in range(1, number + 1) if number % d == 0]}"
