"""Layer: hybrid, pure. The place of a process by the variables of its launcher, their limits and contradictions."""

from __future__ import annotations

import pytest

from fusemesh import cli
from fusemesh.commands.ranks import Ranks, find_ranks
from fusemesh.hybrid.layout import Layout
from fusemesh.hybrid.ranks import environment, mpi
from fusemesh.hybrid.ranks.environment import Place, device_index
from fusemesh.hybrid.ranks.hosts import expand_hosts
from fusemesh.hybrid.ranks.join import find_place, first_node, rank_from_environment

TORCHRUN = {
    "RANK": "5",
    "WORLD_SIZE": "8",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "4",
    "MASTER_ADDR": "node0",
    "MASTER_PORT": "29500",
}
OPEN_MPI = {
    "OMPI_COMM_WORLD_RANK": "1",
    "OMPI_COMM_WORLD_SIZE": "4",
    "OMPI_COMM_WORLD_LOCAL_RANK": "2",  # not in rank order, as Open MPI 5 may number them
    "OMPI_COMM_WORLD_LOCAL_SIZE": "4",
}
PMI = {"PMI_RANK": "3", "PMI_SIZE": "4", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "2", "MASTER_ADDR": "10.0.0.7"}
SLURM = {
    "SLURM_PROCID": "9",
    "SLURM_STEP_NUM_TASKS": "16",
    "SLURM_LOCALID": "1",
    "SLURM_STEP_TASKS_PER_NODE": "8(x2)",
    "SLURM_STEP_NODELIST": "gpu[003-004]",
    "SLURM_JOB_ID": "77",
}

ONE_TASK = {
    "SLURM_JOB_ID": "77",
    "SLURM_NTASKS": "16",
    "SLURM_STEP_ID": "0",
    "SLURM_PROCID": "0",
    "SLURM_STEP_NUM_TASKS": "1",
    "SLURM_LOCALID": "0",
    "SLURM_STEP_TASKS_PER_NODE": "1",
}


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        (TORCHRUN, Place("torchrun", 5, 8, 1, 4, "node0", 29500)),
        ({**TORCHRUN, **SLURM, **OPEN_MPI}, Place("torchrun", 5, 8, 1, 4, "node0", 29500)),
        ({**OPEN_MPI, "MASTER_PORT": "1234"}, Place("Open MPI", 1, 4, 2, 4, "127.0.0.1", 1234)),
        ({**PMI, "MASTER_PORT": "1234"}, Place("MPI (PMI)", 3, 4, 1, 2, "10.0.0.7", 1234)),
        ({**SLURM, "MASTER_PORT": "1234"}, Place("Slurm", 9, 16, 1, 8, "gpu003", 1234)),
        ({"PMI_RANK": "0", "PMI_SIZE": "1", "MASTER_PORT": "1"}, Place("MPI (PMI)", 0, 1, 0, 0, "127.0.0.1", 1)),
        ({}, None),
        # Inside an allocation, but not a step of it: one process.
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "16", "SLURM_JOB_ID": "77"}, None),
        # The shell of srun --pty in that allocation, or any step of one task; PMI's variables may be there too.
        (ONE_TASK, None),
        ({**ONE_TASK, "PMI_RANK": "0", "PMI_SIZE": "1"}, None),
        ({**ONE_TASK, **TORCHRUN}, Place("torchrun", 5, 8, 1, 4, "node0", 29500)),
        # srun --mpi=pmi2, and PMI's variables left from a step of one task around this one.
        ({**SLURM, "PMI_RANK": "9", "PMI_SIZE": "16", "MASTER_PORT": "1"}, Place("Slurm", 9, 16, 1, 8, "gpu003", 1)),
        ({**SLURM, "PMI_RANK": "0", "PMI_SIZE": "1", "MASTER_PORT": "1"}, Place("Slurm", 9, 16, 1, 8, "gpu003", 1)),
        # Another number of tasks on each node
        (
            {**SLURM, "SLURM_STEP_TASKS_PER_NODE": "4(x3),3,1", "SLURM_NODEID": "3", "MASTER_PORT": "1"},
            Place("Slurm", 9, 16, 1, 3, "gpu003", 1),
        ),
        ({**SLURM, "WORLD_SIZE": "16", "MASTER_PORT": "1"}, Place("Slurm", 9, 16, 1, 8, "gpu003", 1)),
        ({"WORLD_SIZE": "1"}, None),
        ({"MASTER_ADDR": "node0", "MASTER_PORT": "29500"}, None),
    ],
)
def test_rank_from_environment(environ: dict[str, str], expected: Place | None) -> None:
    assert rank_from_environment(environ) == expected


@pytest.mark.parametrize(
    ("environ", "parts"),
    [
        ({**TORCHRUN, "RANK": "8"}, ["RANK: ", "0 to WORLD_SIZE - 1 = 7", "received 8"]),
        ({**TORCHRUN, "RANK": "one"}, ["RANK: ", "expected an integer", "'one'"]),
        ({**OPEN_MPI, "OMPI_COMM_WORLD_LOCAL_SIZE": "2"}, ["MASTER_ADDR: not set", "Open MPI", "4 ranks"]),
        ({k: v for k, v in PMI.items() if k != "MASTER_ADDR"}, ["MASTER_ADDR: not set"]),
        ({"PMI_RANK": "1", "PMI_SIZE": "4", "MASTER_ADDR": "a"}, ["MPI_LOCALRANKID: not set", "torchrun"]),
        (
            {k: v for k, v in TORCHRUN.items() if k != "MASTER_PORT"},
            ["MASTER_PORT: not set", "torchrun", "MASTER_ADDR", "unset RANK and WORLD_SIZE"],
        ),
        (
            {k: v for k, v in TORCHRUN.items() if k not in ("MASTER_ADDR", "MASTER_PORT")},
            ["MASTER_ADDR: not set although RANK and WORLD_SIZE = 8 are", "MASTER_PORT", "unset RANK and WORLD_SIZE"],
        ),
        # Beyond the limits of each
        ({**TORCHRUN, "RANK": "-1"}, ["RANK: ", "received -1"]),
        ({**TORCHRUN, "WORLD_SIZE": "0"}, ["WORLD_SIZE: expected 1 to", "received 0"]),
        ({**TORCHRUN, "WORLD_SIZE": "8.0"}, ["WORLD_SIZE: expected an integer", "'8.0'"]),
        ({**TORCHRUN, "LOCAL_RANK": "4"}, ["LOCAL_RANK: expected 0 to 3, received 4"]),
        ({**TORCHRUN, "LOCAL_WORLD_SIZE": "9"}, ["LOCAL_WORLD_SIZE: expected 1 to 8, received 9"]),
        ({**TORCHRUN, "MASTER_PORT": "0"}, ["MASTER_PORT: expected 1 to 65535, received 0"]),
        ({**TORCHRUN, "MASTER_PORT": "65536"}, ["MASTER_PORT: expected 1 to 65535, received 65536"]),
        ({**TORCHRUN, "MASTER_PORT": "http"}, ["MASTER_PORT: expected an integer", "'http'"]),
        ({**TORCHRUN, "MASTER_ADDR": " "}, ["MASTER_ADDR: expected the name or address", "received ''"]),
        ({**OPEN_MPI, "OMPI_COMM_WORLD_SIZE": "1"}, ["OMPI_COMM_WORLD_RANK: expected 0 to", "received 1"]),
        ({**PMI, "MPI_LOCALNRANKS": "two"}, ["MPI_LOCALNRANKS: expected an integer", "'two'"]),
        ({**SLURM, "SLURM_STEP_TASKS_PER_NODE": "8(x"}, ["SLURM_STEP_TASKS_PER_NODE: ", "4(x2),3", "'8(x'"]),
        ({**SLURM, "SLURM_STEP_TASKS_PER_NODE": "8(x3)"}, ["SLURM_STEP_TASKS_PER_NODE: ", "= 16 tasks", "received 24"]),
        ({**SLURM, "SLURM_STEP_NODELIST": "gpu[3"}, ["SLURM_STEP_NODELIST: ", "gpu[003-006]", "'gpu[3'"]),
        # Half of a set, and sets that contradict each other
        ({"RANK": "1"}, ["RANK: set to 1 while WORLD_SIZE is not"]),
        ({"WORLD_SIZE": "4"}, ["WORLD_SIZE: set to 4 while RANK is not"]),
        ({"OMPI_COMM_WORLD_SIZE": "4"}, ["OMPI_COMM_WORLD_SIZE: set to 4 while OMPI_COMM_WORLD_RANK is not"]),
        ({**SLURM, "WORLD_SIZE": "4"}, ["WORLD_SIZE: expected 16", "SLURM_STEP_NUM_TASKS", "received 4"]),
        ({**SLURM, **TORCHRUN, "RANK": "0", "WORLD_SIZE": "1"}, ["RANK, WORLD_SIZE: ", "0 of 1", "Slurm", "9 of 16"]),
        (
            {**SLURM, "PMI_RANK": "3", "PMI_SIZE": "16", "MASTER_PORT": "1"},
            ["PMI_RANK: expected 9, as SLURM_PROCID says of the same 16 ranks, received 3", "unset"],
        ),
        ({**OPEN_MPI, **TORCHRUN, "RANK": "3", "WORLD_SIZE": "4"}, ["they say rank 3 of 4", "Open MPI", "rank 1 of 4"]),
    ],
)
def test_rank_from_environment_refuses(environ: dict[str, str], parts: list[str]) -> None:
    with pytest.raises(ValueError) as caught:
        rank_from_environment(environ)
    for part in parts:
        assert part in str(caught.value)


def test_the_port_follows_from_the_run() -> None:
    """Equal on all ranks of a run, without talking; different between runs; out of the range that systems hand out."""

    def port(**change: str) -> int:
        place = rank_from_environment({**SLURM, **change})
        assert place is not None
        return place.master_port

    assert port(SLURM_PROCID="0", SLURM_LOCALID="0") == port(SLURM_PROCID="9")
    ports = {port(SLURM_JOB_ID=str(job)) for job in range(25)} | {port(SLURM_STEP_ID=str(step)) for step in range(25)}
    assert len(ports) > 45 and min(ports) >= 20000 and max(ports) < 30000


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("gpu7", "gpu7"),
        ("gpu[003-006,9],login1", "gpu003"),
        ("gpu[3,5]", "gpu3"),
        ("a-b1,a-b2", "a-b1"),
        ("rack[1-2]n", "rack1n"),
        ("rack[1-2]node[3-4]", "rack1node3"),
    ],
)
def test_first_node(nodes: str, first: str) -> None:
    assert first_node(nodes) == first


@pytest.mark.parametrize(
    ("nodes", "hosts"),
    [
        # What `scontrol show hostnames` prints for them
        ("rack[1-2]node[3-4]", "rack1node3 rack1node4 rack2node3 rack2node4"),
        ("n[01-03,7],login", "n01 n02 n03 n7 login"),
        ("a[098-101]b,c-d.e,f[2]", "a098b a099b a100b a101b c-d.e f2"),
        ("x[1-2]y[03,05]z[8-9]", "x1y03z8 x1y03z9 x1y05z8 x1y05z9 x2y03z8 x2y03z9 x2y05z8 x2y05z9"),
    ],
)
def test_node_lists_are_expanded(nodes: str, hosts: str) -> None:
    assert list(expand_hosts(nodes)) == hosts.split()


@pytest.mark.parametrize(
    "nodes",
    ["", "n[", "n[1", "n]", "n[]", "n[a-b]", "n[3-1]", "a,,b", "a,", "n[1[2-3]]", "n[1-]", "(null)", "n[1-2]:2"],
)
def test_other_texts_are_no_node_lists(nodes: str) -> None:
    with pytest.raises(ValueError, match="SLURM_STEP_NODELIST: expected a node list such as gpu"):
        list(expand_hosts(nodes))


def test_long_ranges_of_nodes_are_not_written_out() -> None:
    assert first_node("n[1-65536]m[1-65536]k[00001-65536]") == "n1m1k00001"
    with pytest.raises(ValueError, match="SLURM_STEP_NODELIST: expected a node list such as gpu"):
        first_node("n[1-99999999999]")


def test_the_shell_of_a_step_of_many_tasks_is_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """srun -n 4 --pty bash: task 0 has the terminal, and what srun starts from there has its variables alone."""
    shell = {**SLURM, "SLURM_PROCID": "0", "SLURM_PTY_PORT": "40000", "MASTER_PORT": "1"}
    monkeypatch.setattr(environment, "has_terminal", lambda: True)
    assert rank_from_environment(shell) is None
    monkeypatch.setattr(environment, "has_terminal", lambda: False)
    place = rank_from_environment(shell)
    assert place is not None and (place.rank, place.world_size) == (0, 16)


def test_commands_start_their_own_ranks_in_a_step_of_one_task(monkeypatch: pytest.MonkeyPatch) -> None:
    """--nproc was refused there, and a layout of two ranks without it."""
    for key, value in ONE_TASK.items():
        monkeypatch.setenv(key, value)
    options = cli.parser().parse_args(["train", "--nproc", "2"])
    assert find_ranks(options, Layout(dp=2)) == Ranks(2, True)


@pytest.mark.parametrize(
    ("environ", "local_rank", "local_ranks", "visible", "expected"),
    [
        ({}, 3, 4, 4, 3),
        # srun --gpus-per-task=1, with and without what it says; two GPUs each
        ({"CUDA_VISIBLE_DEVICES": "0"}, 3, 4, 1, 0),
        ({"SLURM_GPUS_PER_TASK": "1"}, 3, 4, 1, 0),
        ({"SLURM_TRES_PER_TASK": "cpu:2,gres/gpu:1"}, 3, 0, 1, 0),
        ({"SLURM_GPUS_PER_TASK": "2"}, 1, 4, 2, 0),
        # The same without GPUs being bound: each sees all
        ({"SLURM_GPUS_PER_TASK": "1", "CUDA_VISIBLE_DEVICES": "0,1,2,3"}, 3, 4, 4, 3),
        ({"CUDA_VISIBLE_DEVICES": "4,5"}, 1, 2, 2, 1),
    ],
)
def test_the_gpu_of_a_rank(
    environ: dict[str, str], local_rank: int, local_ranks: int, visible: int, expected: int
) -> None:
    place = Place("Slurm", local_rank, 8, local_rank, local_ranks, "node0", 1234)
    assert device_index(place, visible, environ) == expected


@pytest.mark.parametrize(("environ", "visible"), [({}, 1), ({"CUDA_VISIBLE_DEVICES": ""}, 0)])
def test_a_rank_without_gpu(environ: dict[str, str], visible: int) -> None:
    place = Place("torchrun", 3, 4, 3, 4, "node0", 1234)
    with pytest.raises(ValueError, match=f"device: rank 3 of this machine has no GPU, it has {visible}"):
        device_index(place, visible, environ)


def test_mpi4py_of_another_mpi_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each process would be a world of its own, silently."""
    for key, value in OPEN_MPI.items():
        monkeypatch.setenv(key, value)
    monkeypatch.setattr(mpi, "is_available", lambda: True)
    monkeypatch.setattr(mpi, "ask", lambda: mpi.Found(0, 1, 0, 1, "127.0.0.1", "run"))
    with pytest.raises(ValueError, match=r"mpi4py: it says rank 0 of 1, while .* Open MPI say rank 1 of 4"):
        find_place()
    monkeypatch.setattr(mpi, "ask", lambda: mpi.Found(1, 4, 1, 2, "10.0.0.9", "run"))
    place = find_place()
    assert place is not None and (place.local_rank, place.master_addr, len(place.ports)) == (1, "10.0.0.9", 16)
    monkeypatch.setenv("MASTER_PORT", "70000")
    with pytest.raises(ValueError, match="MASTER_PORT: expected 1 to 65535"):
        find_place()
