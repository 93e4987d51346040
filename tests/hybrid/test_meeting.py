"""Layer: hybrid, gloo ranks on this machine. Ranks of one run meet, of two runs do not; who does not come is named."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from fusemesh.hybrid.ranks import meeting, watchdog
from fusemesh.hybrid.ranks.join import rank_from_environment
from fusemesh.hybrid.ranks.testing import RankPool
from fusemesh.hybrid.ranks.waiting import ranks_text
from tests.support.ranks import meet as ranks_that_meet
from tests.support.ranks.meet import slurm

pytestmark = pytest.mark.distributed


@contextmanager
def taken(port: int = 0) -> Iterator[int]:
    """A port at which something listens that never answers."""
    with socket.create_server(("127.0.0.1", port)) as listening:
        yield listening.getsockname()[1]


def step(number: str, size: int, **others: str) -> list[dict[str, str]]:
    return [slurm(number, rank, size, **others) for rank in range(size)]


def test_two_steps_of_a_job_run_on_one_machine_at_once(rank_pool: RankPool) -> None:
    """Also with the same MASTER_PORT, as a batch script may set for all its steps."""
    assert rank_pool.call(ranks_that_meet.meet, step("0", 2) + step("1", 2)) == [3.0] * 4
    with socket.create_server(("", 0)) as free:
        port = str(free.getsockname()[1])
    places = step("0", 2, MASTER_PORT=port) + step("1", 2, MASTER_PORT=port)
    assert rank_pool.call(ranks_that_meet.meet, places, 20.0) == [3.0] * 4


def test_a_port_that_is_taken(rank_pool: RankPool) -> None:
    """One that was drawn is left for the next; one that was given is named, on all ranks."""
    places = step("2", 2)
    drawn = rank_from_environment(places[0])
    assert drawn is not None
    with taken(drawn.master_port):
        assert rank_pool.call(ranks_that_meet.meet, places, ranks=2) == [3.0] * 2
    with taken() as port:
        places = step("2", 2, MASTER_PORT=str(port))
        first, second = rank_pool.call(ranks_that_meet.meet, places, ranks=2)
    assert first.startswith(f"MASTER_PORT: port {port} of") and "in use by another program" in first
    assert second.startswith(f"MASTER_PORT: port {port} of localhost is taken by something else than rank 0")


@pytest.mark.parametrize(
    ("address", "said"),
    [
        ("no-such-host.invalid", "cannot resolve 'no-such-host.invalid'"),
        # An address of documentation, which nobody has.
        ("192.0.2.1", "192.0.2.1 is not the machine of rank 0"),
    ],
)
def test_a_wrong_address_is_refused_by_name(address: str, said: str, rank_pool: RankPool) -> None:
    (answer,) = rank_pool.call(ranks_that_meet.meet, [slurm("3", 0, 2, MASTER_ADDR=address)], ranks=1)
    assert answer.startswith("MASTER_ADDR: ") and said in answer


def test_one_rank_that_cannot_start_ends_the_wait_of_all(rank_pool: RankPool) -> None:
    reason = "device: rank 1 of this machine has no GPU"
    answers = rank_pool.call(ranks_that_meet.meet, step("4", 3), 0.5, {1: reason}, ranks=3)
    told = f"rank 1 does not start: {reason}"
    assert answers == [told, reason, told]


@pytest.mark.parametrize("refusing", [0, 1])
def test_a_rank_that_refuses_before_it_meets_the_others(refusing: int, rank_pool: RankPool) -> None:
    """Its data is missing, say: the others waited until their timeout."""
    reason = "data.path: expected a folder"
    answers = rank_pool.call(ranks_that_meet.refuse_before, step("8", 2), refusing, reason, ranks=2)
    assert answers[refusing] == reason
    assert answers[1 - refusing] == f"rank {refusing} does not start: {reason}"


@pytest.mark.parametrize("code", [0, 3])
def test_a_rank_that_leaves_by_exit_is_named(code: int, rank_pool: RankPool) -> None:
    told, own = rank_pool.call(ranks_that_meet.leave_by_exit, step("9", 2), code, ranks=2)
    assert own == f"sys.exit({code})"
    assert told.startswith(f"rank 1 failed first: it left by sys.exit({code}). ")


def test_rank_0_does_not_wait_for_a_rank_that_died_after_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """It had its heartbeats, and has none any more."""
    for key, value in slurm("10", 0, 2).items():
        monkeypatch.setenv(key, value)
    monkeypatch.setattr(watchdog, "_SILENCE", 0.2)
    monkeypatch.setattr(meeting, "_LINGER", 600.0)
    place = rank_from_environment()
    assert place is not None
    met = meeting.Meeting(place, 10.0)
    met.store_of("watchdog").add("heartbeat/1", 3)
    leaving = threading.Thread(target=lambda: met.leave(failed=False, lost=False), daemon=True)
    leaving.start()
    leaving.join(30.0)
    assert not leaving.is_alive()


def test_two_ranks_on_one_gpu_are_refused(rank_pool: RankPool) -> None:
    answers = rank_pool.call(ranks_that_meet.meet, step("5", 2), 0.5, {0: "GPU-a", 1: "GPU-a"}, ranks=2)
    assert all("were given one GPU (GPU-a): process" in answer for answer in answers)
    assert rank_pool.call(ranks_that_meet.meet, step("5", 2), 0.5, {0: "GPU-a", 1: "GPU-b"}, ranks=2) == [3.0] * 2


def test_two_processes_of_one_rank_are_refused(rank_pool: RankPool) -> None:
    places = [slurm("6", rank, 3) for rank in (0, 1, 1)]
    answers = rank_pool.call(ranks_that_meet.meet, places, ranks=3)
    assert all("two processes say that they are rank 1" in answer for answer in answers)


@pytest.mark.parametrize("where", ["store", "group", "connections", "mesh"])
def test_a_wait_says_who_is_missing(where: str, rank_pool: RankPool, tmp_path: Path) -> None:
    """Under launch_local, which serves the store, as torchrun does."""
    said = {
        "store": "to meet at 127.0.0.1, port ",
        "group": "to connect to the others (gloo) ",
        "connections": "to be connected to every other ",
        "mesh": "to make the mesh of layout dp3 ",
    }
    answers = rank_pool.call(ranks_that_meet.wait_for, 1, where, str(tmp_path), ranks=3)
    told = [line for line in "".join(answers).splitlines() if f" s for rank 1 {said[where]}" in line]
    assert told and all(line.endswith("of 3); come: ranks 0, 2") for line in told), answers


@pytest.mark.parametrize("late", [0, 1])
def test_a_wait_for_rank_0_and_its_store(late: int, rank_pool: RankPool, tmp_path: Path) -> None:
    places = step("7", 2)
    place = rank_from_environment(places[0])
    assert place is not None
    answers = rank_pool.call(ranks_that_meet.wait_for, late, "store", str(tmp_path), places, ranks=2)
    if late == 0:
        ports = f"ports {place.ports[0]} to {place.ports[-1]}"
        assert (
            f"s for rank 0, whom rank 1 of 2 is to meet at localhost, {ports}: nobody listens at {ports}" in answers[1]
        )
    else:
        assert "s for rank 1 to meet at localhost, port " in answers[0]
        assert "(rank 0 of 2); come: rank 0" in answers[0]


def test_ranks_are_listed_shortly() -> None:
    assert ranks_text([3]) == "rank 3"
    assert ranks_text({0, 1, 2, 5, 8, 7}) == "ranks 0-2, 5, 7-8"
    assert ranks_text([]) == "no rank"
