"""The samples of each step: deterministic, dealt to replicas by global sample index, and resumable in any layout.

The order of the samples is one endless sequence: epoch after epoch, each a permutation of all samples that seed and
epoch fix. Step t takes ``global_batch_size`` of it, from position ``t * global_batch_size`` on; replica r takes the
r-th part of those. So the whole state of the data is the step, and a run that goes on with other degrees sees just the
samples that it would have seen: none lost, none twice.

The permutation is computed point by point (a Feistel network with cycle walking: Black and Rogaway, "Ciphers with
arbitrary finite domains", 2002), so it needs no memory, and does not change with the version of any library.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

_ROUNDS = 6


def _mix(value: np.ndarray) -> np.ndarray:
    """The finaliser of splitmix64 (Steele et al., 2014), elementwise on uint64."""
    value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return value ^ (value >> np.uint64(31))


def permute(indices: np.ndarray, length: int, *, seed: int, epoch: np.ndarray | int = 0) -> np.ndarray:
    """Return the images of ``indices`` under a random permutation of ``range(length)``.

    Args:
        indices: int64 [n], each from 0 to ``length - 1``.
        length: size of the permuted set, at least 1.
        seed: 0 to 2^63 - 1.
        epoch: int, or int64 [n]; each epoch of a seed is another permutation.

    Returns:
        int64 [n].
    """
    half = np.uint64(max(1, ((length - 1).bit_length() + 1) // 2))
    mask = (np.uint64(1) << half) - np.uint64(1)
    key = _mix(np.uint64(seed) + _mix(np.broadcast_to(np.asarray(epoch), indices.shape).astype(np.uint64)))
    value = indices.astype(np.uint64)
    outside = np.ones(len(value), dtype=bool)
    # The network permutes a power of four that may exceed `length`; whoever lands outside goes round again.
    while outside.any():
        left, right = value[outside] >> half, value[outside] & mask
        for turn in range(_ROUNDS):
            left, right = right, left ^ (_mix(right ^ _mix(key[outside] + np.uint64(turn))) & mask)
        value[outside] = (left << half) | right
        outside = value >= np.uint64(length)
    return value.astype(np.int64)


class BatchOrder:
    """The global sample indices of every step, and each replica's part of them.

    Args:
        num_samples: how many samples there are.
        global_batch_size: samples per step over all replicas.
        replicas: how many ranks take different samples (dp * fsdp).
        accumulation: micro-batches into which each replica's part of a step is cut.
        seed: of the order.
        sources: where the samples are those of several sources one behind the other, of each the number of its samples
            and its weight: of so many samples as the weights are together, each source gives its weight. Each has
            epochs of its own.

    Raises:
        ValueError: the batch does not divide among replicas and micro-batches, or a number is out of range.
    """

    def __init__(
        self,
        num_samples: int,
        global_batch_size: int,
        *,
        replicas: int = 1,
        accumulation: int = 1,
        seed: int = 0,
        sources: Sequence[tuple[int, int]] = (),
    ) -> None:
        for name, value, least in (
            ("num_samples", num_samples, 1),
            ("global_batch_size", global_batch_size, 1),
            ("replicas", replicas, 1),
            ("accumulation", accumulation, 1),
            ("seed", seed, 0),
        ):
            if value < least:
                raise ValueError(f"{name}: expected at least {least}, received {value}")
        if global_batch_size % (replicas * accumulation):
            raise ValueError(
                f"global_batch_size: expected a multiple of replicas * accumulation = {replicas} * {accumulation} = "
                f"{replicas * accumulation}, received {global_batch_size}; change training.global_batch_size, "
                "training.accumulation, or dp and fsdp in the layout"
            )
        self.num_samples, self.global_batch_size = num_samples, global_batch_size
        self.replicas, self.accumulation, self.seed = replicas, accumulation, seed
        # In a round each source has as many turns as its weight, evenly spread.
        turns = sorted(((n + 0.5) / weight, k, n) for k, (_, weight) in enumerate(sources) for n in range(weight))
        self._turns = np.array([[k, n] for _, k, n in turns], np.int64)
        self._sources = np.array(sources, np.int64)
        assert not sources or self._sources[:, 0].sum() == num_samples, "sources have other samples"

    def step(self, step: int) -> np.ndarray:
        """Return the sample indices of step ``step`` over all replicas, int64 [global_batch_size]."""
        position = step * self.global_batch_size + np.arange(self.global_batch_size, dtype=np.int64)
        if len(self._sources):
            return self._of_sources(position)
        return permute(
            position % self.num_samples, self.num_samples, seed=self.seed, epoch=position // self.num_samples
        )

    def _of_sources(self, position: np.ndarray) -> np.ndarray:
        """Return the samples at these positions of the endless sequence."""
        source, turn = self._turns[position % len(self._turns)].T
        sizes, weights = self._sources.T
        # How many samples of the same source came before.
        before = position // len(self._turns) * weights[source] + turn
        found = np.empty(len(position), np.int64)
        for number in np.unique(source):
            here, size = source == number, int(sizes[number])
            own = permute(before[here] % size, size, seed=self.seed, epoch=before[here] // size)
            found[here] = own + sizes[:number].sum()
        return found

    def micro_batches(self, step: int, replica: int) -> np.ndarray:
        """Return the sample indices of one replica in step ``step``, int64 [accumulation, samples per micro-batch]."""
        if not 0 <= replica < self.replicas:
            raise ValueError(f"replica: expected 0 to {self.replicas - 1}, received {replica}")
        part = self.step(step).reshape(self.replicas, -1)[replica]
        return part.reshape(self.accumulation, -1)


def evaluation_batches(num_samples: int, batch_size: int, replicas: int, replica: int) -> list[tuple[np.ndarray, int]]:
    """Return this replica's batches of an evaluation: every sample once over all replicas, in order.

    All replicas get equally many batches, because each batch is a round of collectives; where the samples run out,
    a batch is filled up with sample 0.

    Returns:
        (sample indices int64 [batch_size], how many of them count) for each batch of this replica.
    """
    if batch_size < 1 or num_samples < 1:
        raise ValueError(f"batch_size, num_samples: expected at least 1, received {batch_size}, {num_samples}")
    if not 0 <= replica < replicas:
        raise ValueError(f"replica: expected 0 to {replicas - 1}, received {replica}")
    batches = []
    for start in range(0, num_samples, batch_size * replicas):
        first = start + replica * batch_size
        own = np.arange(first, max(first, min(first + batch_size, num_samples)), dtype=np.int64)
        batches.append((np.concatenate([own, np.zeros(batch_size - len(own), np.int64)]), len(own)))
    return batches
