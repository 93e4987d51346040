"""Layer: hybrid, gloo ranks on this machine. Lost ranks are found soon and by name, and nobody else is."""

from __future__ import annotations

import json
import os
import signal
import threading
import time

import pytest

from fusemesh import cli
from fusemesh.hybrid.ranks import failure
from fusemesh.hybrid.ranks.local import LocalRanks, RankError
from tests.support.ranks import fault as fault_ranks
from tests.support.ranks import meet as ranks_that_meet

pytestmark = [
    pytest.mark.distributed,
    pytest.mark.skipif(not hasattr(signal, "SIGSTOP"), reason="needs POSIX signals"),
]
ONE_THREAD = {"OMP_NUM_THREADS": "1"}


def gone(pids: list[int]) -> bool:
    """Return whether none of these processes is left, except those already reaped."""
    return not any(os.path.exists(f"/proc/{pid}") for pid in pids)


def test_a_lost_rank_is_told_as_json(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """The command's own thread waits in a collective when the watchdog ends the process."""

    def run(_: object) -> None:
        thread = threading.Thread(target=failure.end_process, args=(failure.PeerError(1, "rank 1 failed first"),))
        thread.start()
        thread.join()

    monkeypatch.setattr(os, "_exit", lambda status: None)
    monkeypatch.setattr("fusemesh.commands.doctor.run", lambda options: (run(options), None, 1))
    assert cli.main(["doctor", "--json"]) == 1
    said = capsys.readouterr()
    assert json.loads(said.out) == {"error": "rank 1 failed first"} and "fusemesh: rank 1 failed first" in said.err


@pytest.mark.parametrize(
    ("number", "victim"),
    [
        pytest.param(signal.SIGKILL, 2, id="killed-2"),
        pytest.param(signal.SIGSTOP, 0, id="stopped-0"),
        pytest.param(signal.SIGKILL, 0, id="killed-0", marks=pytest.mark.slow),
        pytest.param(signal.SIGSTOP, 2, id="stopped-2", marks=pytest.mark.slow),
    ],
)
def test_the_launcher_names_the_lost_rank(victim: int, number: signal.Signals) -> None:
    with LocalRanks(3, ONE_THREAD, grace=2.0, patience=3.0) as ranks:
        ranks.call(fault_ranks.nothing)
        pids = [process.pid for process in ranks._processes]
        began = time.monotonic()
        with pytest.raises(RankError) as caught:
            ranks.call(fault_ranks.reduce_for_ever, victim, int(number), 60.0)
        assert time.monotonic() - began < 30
        assert list(caught.value.failures) == [victim]
        assert f"1 of 3 ranks failed, rank {victim} first; ranks " in str(caught.value)
        assert " ended because of that\n" in str(caught.value)
        assert ("SIGKILL" if number == signal.SIGKILL else "stopped") in caught.value.failures[victim]
        assert gone(pids)


@pytest.mark.slow
@pytest.mark.parametrize("victim", [1, 0])
def test_ranks_find_the_stopped_one_themselves(victim: int, capfd: pytest.CaptureFixture[str]) -> None:
    """As under torchrun or mpirun, where nobody looks at the processes' states."""
    with LocalRanks(3, ONE_THREAD, grace=2.0, patience=1000.0) as ranks:
        ranks.call(fault_ranks.nothing)
        began = time.monotonic()
        with pytest.raises(RankError) as caught:
            ranks.call(fault_ranks.reduce_for_ever, victim, int(signal.SIGSTOP), 4.0)
        assert time.monotonic() - began < 30
        # Who finds it ends with it and is not to blame.
        assert list(caught.value.failures) == [victim]
    told = capfd.readouterr().err
    assert told.count(f"fusemesh: rank {victim} has given no sign of life for 4 s") >= 1


@pytest.mark.slow
@pytest.mark.parametrize("victim", [1, 0])
def test_who_survives_names_the_killed_one(victim: int) -> None:
    """Where no launcher says who it was: by its heartbeats, or by the store that rank 0 served."""
    places = [ranks_that_meet.slurm(f"lost-{victim}", rank, 3) for rank in range(3)]
    with LocalRanks(3, ONE_THREAD, grace=20.0) as ranks:
        with pytest.raises(RankError) as caught:
            ranks.call(ranks_that_meet.lose, places, victim, 60.0)
        assert list(caught.value.failures) == [victim] and "SIGKILL" in caught.value.failures[victim]
        assert caught.value.followed.keys() == {0, 1, 2} - {victim}
        assert all(text.startswith(f"rank {victim} failed first: ") for text in caught.value.followed.values())


@pytest.mark.slow
def test_who_computes_long_or_was_stopped_for_a_while_is_not_lost() -> None:
    with LocalRanks(3, ONE_THREAD) as ranks:
        assert ranks.call(fault_ranks.pause_and_go_on, 1, 6.0, 3.0) == [3, 3, 3]
        assert ranks.call(fault_ranks.stop_then_continue, 2, 6.0) == [3, 3, 3]
