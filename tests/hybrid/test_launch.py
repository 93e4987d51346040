"""Layer: hybrid. Processes of this machine that fail, hang, die, or lose their parent."""

from __future__ import annotations

import multiprocessing
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from fusemesh.hybrid.outputs import UserError
from fusemesh.hybrid.ranks.join import distributed, launch_local
from fusemesh.hybrid.ranks.local import LocalRanks, RankError
from fusemesh.hybrid.ranks.testing import RankPool
from tests.support.ranks import launch as launch_ranks


def test_a_plain_process_is_a_world_of_one() -> None:
    import torch.distributed as dist

    with distributed("cpu") as world:
        assert (world.rank, world.world_size, world.is_first) == (0, 1, True)
        assert dist.is_initialized()
        with pytest.raises(ValueError, match="twice"), distributed("cpu"):
            pass
        assert dist.is_initialized()
    assert not dist.is_initialized()
    with pytest.raises(KeyError), distributed("cpu"):
        raise KeyError
    assert not dist.is_initialized()
    with pytest.raises(ValueError, match="device: expected auto, cpu or cuda, received 'tpu'"), distributed("tpu"):
        pass


@pytest.mark.distributed
def test_launch_local() -> None:
    """Fresh processes under torchrun's variables, with the environment given; results in rank order."""
    results = launch_local(2, launch_ranks.describe, "argument", env={"FUSEMESH_BACKEND": "reference"})
    assert results == [
        {"rank": rank, "world_size": 2, "sum": 3.0, "argument": "argument", "backend": "reference"} for rank in range(2)
    ]


@pytest.mark.distributed
def test_failures() -> None:
    """Every rank's failure is told, of whatever kind, and the next call finds healthy ranks."""
    with LocalRanks(3) as ranks:
        assert ranks.call(launch_ranks.own_rank) == [0, 1, 2]
        processes = [process.pid for process in ranks._processes]

        with pytest.raises(RankError) as caught:
            ranks.call(launch_ranks.fail_on, (0, 2))
        assert sorted(caught.value.failures) == [0, 2] and not caught.value.unfinished
        for rank in (0, 2):
            assert f"ZeroDivisionError: rank {rank} fails" in caught.value.failures[rank]
            assert "in fail_on" in caught.value.failures[rank]
            assert caught.value.failures[rank].strip() in str(caught.value)
        assert ranks.call(launch_ranks.own_rank, ranks=2) == [0, 1]
        assert [process.pid for process in ranks._processes] == processes

        # A refusal says everything, whichever ranks meet it; two that differ are both told.
        for refusing in ((1,), (0, 1, 2)):
            with pytest.raises(UserError, match=r"\Arefused\Z"):
                ranks.call(launch_ranks.refuse_on, refusing)
        with pytest.raises(RankError) as caught:
            ranks.call(launch_ranks.refuse_on, (0, 1), True)
        # In the order in which they failed.
        assert caught.value.failures == {rank: f"UserError: refused by {rank}" for rank in (0, 1)}
        assert all(text in str(caught.value) for text in caught.value.failures.values())

        with pytest.raises(RankError, match=r"rank 1 ---\ndied by signal 9 \(SIGKILL") as caught:
            ranks.call(launch_ranks.die_on, 1)
        assert list(caught.value.failures) == [1]
        assert ranks.call(launch_ranks.own_rank) == [0, 1, 2]

        with pytest.raises(RankError, match=r"ranks \[2\] did not finish") as caught:
            ranks.call(launch_ranks.hang_on, 2, timeout=1)
        assert "in hang_on" in caught.value.unfinished[2]
        assert ranks.call(launch_ranks.own_rank) == [0, 1, 2]

        with pytest.raises(ValueError, match="fn: expected a function and arguments that another process can import"):
            ranks.call(lambda: None)
        with pytest.raises(ValueError, match="ranks: expected 1 to 3, received 4"):
            ranks.call(launch_ranks.own_rank, ranks=4)
    with pytest.raises(ValueError, match="nproc: expected at least 1, received 0"):
        LocalRanks(0)


@pytest.mark.distributed
def test_a_call_gets_its_own_answers_alone() -> None:
    """After an interruption, after an answer that cannot be read, and when the first caller's thread has ended."""
    with LocalRanks(2) as ranks:
        first = threading.Thread(target=ranks.call, args=(launch_ranks.own_rank,))
        first.start()
        first.join()
        assert ranks.call(launch_ranks.late, 0.2) == ["late"] * 2

        with pytest.raises(RankError, match=r"1 of 2 ranks failed, rank 1 first(.|\n)*what rank 1 returned cannot be"):
            ranks.call(launch_ranks.unreadable_on, 1)
        assert ranks.call(launch_ranks.own_rank) == [0, 1]
        with pytest.raises(UserError, match=r"\Athis and that\Z"):
            ranks.call(launch_ranks.refuse_by_two_arguments)

        before = signal.signal(signal.SIGALRM, signal.default_int_handler)
        signal.setitimer(signal.ITIMER_REAL, 0.3)
        try:
            with pytest.raises(KeyboardInterrupt):
                ranks.call(launch_ranks.late, 2.0)
        finally:
            signal.signal(signal.SIGALRM, before)
        assert ranks.call(launch_ranks.own_rank) == [0, 1]


def test_a_process_that_may_start_no_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(multiprocessing.current_process()._config, "daemon", True)  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match=r"ranks: .* received a daemonic child of multiprocessing .*daemon=False"):
        launch_local(1, launch_ranks.own_rank)


@pytest.mark.distributed
def test_one_pool_makes_worlds_of_any_size(tmp_path: Path) -> None:
    """Each call has a group of its own, also after one that failed; a failure ends ranks that compute alone."""
    with RankPool(2) as pool:
        for size in (2, 1, 2):
            assert pool.run(launch_ranks.world_of, ranks=size) == [(rank, size) for rank in range(size)]
        with pytest.raises(RankError, match="1 of 2 ranks failed, rank 1 first"):
            pool.run(launch_ranks.fail_in_group, 1)
        assert pool.run(launch_ranks.world_of) == [(0, 2), (1, 2)]
        with pytest.raises(RankError, match=r"1 of 2 ranks failed, rank 1 first(.|\n)*ZeroDivisionError"):
            pool.run(launch_ranks.fail_while_another_sleeps, 1, str(tmp_path))
    assert not list(tmp_path.iterdir())


@pytest.mark.distributed
def test_a_failure_frees_the_others_from_a_collective() -> None:
    """Two ranks wait for a third that has failed: they end too, and the first failure is told first."""
    with pytest.raises(RankError, match="rank 1 first") as caught:
        launch_local(3, launch_ranks.fail_before_a_collective, 1)
    assert "ZeroDivisionError" in caught.value.failures[1]
    # They are not to blame, and say whom they ended with.
    assert list(caught.value.failures) == [1] and "ranks 0, 2 ended because of that" in str(caught.value)
    assert all(text.startswith("rank 1 failed first: ZeroDivisionError") for text in caught.value.followed.values())


@pytest.mark.distributed
def test_nobody_goes_on_before_all_are_connected() -> None:
    # A rank that left at once broke the connections that slower ones still made: "Connection closed by peer".
    (_, went_on), (connected, _) = launch_local(2, launch_ranks.joined, 1)
    assert len(went_on) == 2
    for late, quick in zip(connected, went_on, strict=True):
        assert quick >= late


@pytest.mark.distributed
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_no_rank_outlives_its_parent(number: signal.Signals, tmp_path: Path) -> None:
    """A killed parent can end nobody; the ranks follow by themselves. No folder is left, and SIGTERM is told."""
    code = f"from tests.support.ranks import launch; launch.parent({str(tmp_path)!r})"
    (tmp_path / "tmp").mkdir()
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "TMPDIR": str(tmp_path / "tmp")}
    with open(tmp_path / "said", "w") as said:
        parent = subprocess.Popen([sys.executable, "-c", code], env=env, stderr=said)
    files = [os.path.join(str(tmp_path), f"{rank}.pid") for rank in range(2)]
    try:
        _until(lambda: all(os.path.exists(file) for file in files), 90, "the ranks did not start")
    finally:
        parent.send_signal(number)
        assert parent.wait() == -number
    for file in files:
        with open(file) as stream:
            pid = int(stream.read())
        _until(lambda pid=pid: not _alive(pid), 30, f"rank {pid} is still there")
    assert not [entry.name for entry in (tmp_path / "tmp").iterdir() if entry.name.startswith("fusemesh")]
    if number == signal.SIGTERM:
        assert "fusemesh: ended by signal 15 (SIGTERM), and its ranks" in (tmp_path / "said").read_text()


def _until(condition: object, seconds: float, message: str) -> None:
    deadline = time.monotonic() + seconds
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < deadline, message
        time.sleep(0.05)


def _alive(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as stream:
            return stream.read().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.slow  # whole runs under both are in tests/app/test_launchers.py
@pytest.mark.distributed
@pytest.mark.parametrize("launcher", ["torchrun", "mpiexec"])
def test_a_process_finds_its_place_under_each_launcher(launcher: str, tmp_path: Path) -> None:
    """MPI is asked itself: each rank of one machine has a number of its own there, and all meet at one store."""
    script = tmp_path / "who.py"
    script.write_text(
        "import torch, torch.distributed as dist\n"
        "from fusemesh.hybrid.ranks.join import distributed, find_place\n"
        "with distributed('cpu') as world:\n"
        "    total = torch.tensor([world.rank + 1.0])\n"
        "    dist.all_reduce(total)\n"
        "    place = find_place()\n"
        "    print(f'<{place.launcher} {place.rank} {place.local_rank} {place.local_world_size} {total.item()}>')\n"
    )
    bin = Path(sys.executable).parent
    commands = {
        "torchrun": [bin / "torchrun", "--standalone", "--nproc-per-node", "2", script],
        "mpiexec": [bin / "mpiexec", "--allow-run-as-root", "--oversubscribe", "-n", "2", sys.executable, script],
    }
    done = subprocess.run(commands[launcher], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    name = {"torchrun": "torchrun", "mpiexec": "Open MPI"}[launcher]
    assert sorted(re.findall(r"<(.*?)>", done.stdout)) == [f"{name} {rank} {rank} 2 3.0" for rank in range(2)]


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("fault", ["raise ZeroDivisionError", "os.kill(os.getpid(), signal.SIGKILL)"])
def test_torchrun_blames_the_rank_that_failed_first(fault: str, tmp_path: Path) -> None:
    """The others' collectives fail at once, and they end later than it."""
    script = tmp_path / "fails.py"
    script.write_text(
        "import os, signal, torch, torch.distributed as dist\n"
        "from fusemesh.hybrid.ranks.join import distributed\n"
        "with distributed('cpu') as world:\n"
        "    for turn in range(10**9):\n"
        "        if turn == 100 and world.rank == 2:\n"
        f"            {fault}\n"
        "        dist.all_reduce(torch.ones(4))\n"
    )
    command = [Path(sys.executable).parent / "torchrun", "--standalone", "--nproc-per-node", "3", script]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    cause = done.stderr[done.stderr.index("Root Cause") :]
    assert re.search(r"^  rank      : 2 ", cause, re.MULTILINE), done.stderr
    assert re.findall(r"exitcode  : (-?\d+)", cause) == ["1" if "raise" in fault else "-9"]
    assert "Connection closed by peer" not in done.stderr
