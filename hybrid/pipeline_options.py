"""Options of pipeline parallel: micro-batches, schedule, stages on a rank. Pure: torch is not imported."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from dataclasses import dataclass

SCHEDULES = ("gpipe", "1f1b", "interleaved1f1b")
# Micro-batches for each rank where the number is left open: the pipeline then idles a fifth of the time at most.
_PER_RANK = 4


@dataclass(frozen=True)
class PipelineOptions:
    """Micro-batches, schedule and virtual stages of pipeline parallel; without pp they are ignored.

    Args:
        microbatches: parts into which a replica's batch is cut in training; 0 takes the smallest legal number of at
            least four for each rank of pp, or else the largest legal one. Evaluation always does that.
        schedule: one of :data:`SCHEDULES`.
        virtual_stages: stages on each rank; more than one with the interleaved schedule alone.

    Raises:
        ValueError: an unknown schedule, a number out of range, or a schedule that does not fit virtual_stages.
    """

    microbatches: int = 0
    schedule: str = "1f1b"
    virtual_stages: int = 1

    def __post_init__(self) -> None:
        if self.schedule not in SCHEDULES:
            raise ValueError(f"pipeline.schedule: expected one of {SCHEDULES}, received {self.schedule!r}")
        for name, least in (("microbatches", 0), ("virtual_stages", 1)):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise ValueError(f"pipeline.{name}: expected an integer of at least {least}, received {value!r}")
        if (self.virtual_stages > 1) != (self.schedule == "interleaved1f1b"):
            raise ValueError(
                "pipeline.virtual_stages: expected at least 2 with pipeline.schedule interleaved1f1b and 1 with the "
                f"others, received {self.virtual_stages} with {self.schedule}"
            )

    def evaluating(self) -> PipelineOptions:
        """Return the options of an evaluation, whose batches are not those that ``microbatches`` was chosen for."""
        return dataclasses.replace(self, microbatches=0)

    def legal_microbatches(self, pp: int, batch: int) -> list[int]:
        """Return the numbers of parts into which the schedule can cut ``batch`` samples on ``pp`` ranks, ascending."""
        numbers = [number for number in range(1, batch + 1) if batch % number == 0]
        if self.schedule == "gpipe":
            return numbers
        numbers = [number for number in numbers if number >= pp]
        if self.schedule == "interleaved1f1b":
            # It works in rounds of at least pp micro-batches, all equally long.
            numbers = [number for number in numbers if number % (number // pp) == 0]
        return numbers

    def microbatches_of(self, pp: int, batch: int, key: str = "batch") -> int:
        """Return the number of micro-batches for a replica's ``batch`` samples.

        Args:
            key: the name of the user's setting of the batch, for the error.

        Raises:
            ValueError: the batch, or the number asked for, does not fit the schedule; names legal ones.
        """
        legal = self.legal_microbatches(pp, batch)
        each = "" if self.schedule == "gpipe" else f", at least {pp} of them"
        if not legal:
            raise ValueError(
                f"{key}: {self.schedule} on pp{pp} cuts a replica's batch into equal micro-batches{each}, received "
                f"{batch} samples a replica; use a multiple of {pp} samples a replica, or fewer ranks on pp"
            )
        if self.microbatches == 0:
            return next((number for number in legal if number >= _PER_RANK * pp), legal[-1])
        if self.microbatches not in legal:
            raise ValueError(
                f"pipeline.microbatches: {self.schedule} on pp{pp} cuts the {batch} samples that a replica gets at a "
                f"time ({key}) into equal micro-batches{each}, received {self.microbatches}; use one of {legal}, or 0 "
                "to have it chosen"
            )
        return self.microbatches


def check_holders(name: str, stages: Sequence[int], pp: int, virtual_stages: int) -> None:
    """Check that the stages that hold a copy of a parameter are on different ranks.

    Args:
        name: of the parameter.
        stages: numbers of the stages that hold it.
        pp, virtual_stages: ranks, and stages on each.

    Raises:
        ValueError: two are on one rank, where a parameter cannot be a part of both.
    """
    if len({stage % pp for stage in stages}) < len(stages):
        raise ValueError(
            f"pipeline.virtual_stages: expected a number with which the stages that share {name} are on different "
            f"ranks, received {virtual_stages} on pp{pp}, whose stages {' and '.join(map(str, stages))} are on one; "
            "use another, schedule 1f1b or gpipe, or do not tie the embeddings"
        )


def deal_blocks(blocks: int, stages: int) -> list[range]:
    """Deal consecutive blocks to stages, equally many or one more, but never more for the last, which has the head."""
    ends = [-(-blocks * number // stages) for number in range(stages + 1)]
    return [range(start, end) for start, end in itertools.pairwise(ends)]
