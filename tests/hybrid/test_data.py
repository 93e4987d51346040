"""Order and sharding of samples. Layer: pure numpy, one process."""

import numpy as np
import pytest

from fusemesh.hybrid.data import BatchOrder, evaluation_batches, permute


@pytest.mark.parametrize("length", [1, 2, 3, 4, 5, 16, 17, 100, 1000, 4097])
def test_permutation_is_a_bijection_that_seed_and_epoch_change(length):
    def order(seed, epoch):
        return permute(np.arange(length), length, seed=seed, epoch=epoch)

    for seed, epoch in ((0, 0), (0, 1), (1, 0), (2**62, 10**6)):
        assert sorted(order(seed, epoch)) == list(range(length))
    assert np.array_equal(order(3, 4), order(3, 4))
    if length >= 100:
        assert not np.array_equal(order(0, 0), order(0, 1))
        assert not np.array_equal(order(0, 0), order(1, 0))
        assert not np.array_equal(order(0, 0), np.arange(length))


def test_permutation_never_changes_between_versions():
    # A run that is resumed after an upgrade must find the order that it began with, so the order itself is pinned.
    assert permute(np.arange(10), 10, seed=7, epoch=2).tolist() == PINNED


PINNED = [6, 3, 4, 1, 7, 5, 9, 8, 2, 0]


def test_permutation_mixes():
    """Over many epochs, every index lands everywhere equally often: chi-squared of 12 x 12 cells."""
    trials = 4800
    start, epoch = np.tile(np.arange(12), trials), np.repeat(np.arange(trials), 12)
    counts = np.zeros((12, 12))
    np.add.at(counts, (start, permute(start, 12, seed=0, epoch=epoch)), 1)
    expected = trials / 12
    # 121 degrees of freedom: mean 121, standard deviation 15.6.
    assert ((counts - expected) ** 2 / expected).sum() < 121 + 5 * 15.6


LAYOUTS = [
    (replicas, accumulation) for replicas in (1, 2, 3, 4, 6, 12) for accumulation in (1, 2) if 24 % replicas == 0
]


@pytest.mark.parametrize(("replicas", "accumulation"), LAYOUTS)
def test_every_layout_takes_the_same_global_batches(replicas, accumulation):
    whole = BatchOrder(101, 24, seed=5)
    shared = BatchOrder(101, 24, replicas=replicas, accumulation=accumulation, seed=5)
    for step in (0, 1, 4, 17, 1000):
        parts = [shared.micro_batches(step, replica) for replica in range(replicas)]
        assert all(part.shape == (accumulation, 24 // replicas // accumulation) for part in parts)
        assert np.array_equal(np.concatenate([part.ravel() for part in parts]), whole.step(step))


def test_an_epoch_holds_every_sample_once_though_batches_cross_its_end():
    order = BatchOrder(101, 24, seed=1)
    seen = np.concatenate([order.step(step) for step in range(101)])
    for epoch in range(24):
        assert sorted(seen[epoch * 101 : (epoch + 1) * 101]) == list(range(101))


def test_resuming_in_another_layout_neither_loses_nor_repeats_a_sample():
    steps = {range(0, 5): 4, range(5, 9): 2, range(9, 20): 6}
    taken = []
    for part, replicas in steps.items():
        order = BatchOrder(500, 24, replicas=replicas, seed=9)
        taken += [order.micro_batches(step, replica) for step in part for replica in range(replicas)]
    uninterrupted = BatchOrder(500, 24, seed=9)
    expected = np.concatenate([uninterrupted.step(step) for step in range(20)])
    assert np.array_equal(np.concatenate([part.ravel() for part in taken]), expected)
    assert len(set(expected.tolist())) == 480


SOURCES = [(50, 3), (200, 1), (7, 2)]


def test_each_source_has_its_share_and_epochs_of_its_own():
    order = BatchOrder(257, 24, seed=3, sources=SOURCES)
    seen = np.concatenate([order.step(step) for step in range(100)])
    begin = 0
    for size, weight in SOURCES:
        own = seen[(seen >= begin) & (seen < begin + size)] - begin
        assert len(own) == 2400 * weight // 6
        for epoch in range(len(own) // size):
            assert sorted(own[epoch * size : (epoch + 1) * size]) == list(range(size))
        assert len(set(own[len(own) // size * size :])) == len(own) % size
        begin += size
    # Evenly spread: no run of six samples has more or less than the weights say.
    which = np.searchsorted([50, 250], seen, side="right").reshape(-1, 6)
    assert all(np.bincount(row, minlength=3).tolist() == [3, 1, 2] for row in which)


@pytest.mark.parametrize(("replicas", "accumulation"), LAYOUTS)
def test_every_layout_takes_the_same_batches_of_several_sources(replicas, accumulation):
    whole = BatchOrder(257, 24, seed=5, sources=SOURCES)
    shared = BatchOrder(257, 24, replicas=replicas, accumulation=accumulation, seed=5, sources=SOURCES)
    for step in (0, 7, 1000):
        parts = [shared.micro_batches(step, replica) for replica in range(replicas)]
        assert np.array_equal(np.concatenate([part.ravel() for part in parts]), whole.step(step))


def test_one_source_is_taken_in_the_order_of_samples_without_sources():
    for step in (0, 3, 90):
        assert np.array_equal(
            BatchOrder(101, 24, seed=5, sources=[(101, 4)]).step(step), BatchOrder(101, 24, seed=5).step(step)
        )


@pytest.mark.parametrize("samples", [1, 2, 7, 8, 9, 31, 32, 33])
@pytest.mark.parametrize("replicas", [1, 2, 3, 4])
def test_evaluation_takes_every_sample_once_in_equally_many_batches(samples, replicas):
    shares = [evaluation_batches(samples, 4, replicas, replica) for replica in range(replicas)]
    assert len({len(share) for share in shares}) == 1
    assert all(len(indices) == 4 for share in shares for indices, _ in share)
    counted = [index for share in shares for indices, valid in share for index in indices[:valid].tolist()]
    assert sorted(counted) == list(range(samples))


WRONG = [
    (dict(num_samples=0), "num_samples: expected at least 1, received 0"),
    (dict(global_batch_size=0), "global_batch_size: expected at least 1, received 0"),
    (dict(replicas=0), "replicas: expected at least 1, received 0"),
    (dict(accumulation=-1), "accumulation: expected at least 1, received -1"),
    (dict(seed=-1), "seed: expected at least 0, received -1"),
    (dict(replicas=5), "global_batch_size: expected a multiple of replicas .* = 5 .*received 24"),
    (dict(replicas=4, accumulation=4), "global_batch_size: expected a multiple of .* = 16, received 24"),
]


@pytest.mark.parametrize(("arguments", "message"), WRONG)
def test_wrong_input(arguments, message):
    values = dict(num_samples=10, global_batch_size=24) | arguments
    with pytest.raises(ValueError, match=message):
        BatchOrder(values.pop("num_samples"), values.pop("global_batch_size"), **values)


def test_wrong_replica():
    with pytest.raises(ValueError, match="replica: expected 0 to 1, received 2"):
        BatchOrder(10, 4, replicas=2).micro_batches(0, 2)
    with pytest.raises(ValueError, match="replica: expected 0 to 1, received -1"):
        evaluation_batches(10, 4, 2, -1)
