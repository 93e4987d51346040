"""The store of verdicts with real processes, killed ones, folders and disks that take nothing. Layer: kernels/proof."""

from __future__ import annotations

import dataclasses
import json
import logging
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from fusemesh.kernels import env
from fusemesh.kernels.proof import claim, files, store
from fusemesh.kernels.proof.store import Store, Verdict

KEY = "attention forward / tile 128 x 64, bf16 on 'NVIDIA A100 / 80 GB'"
RIGHT = Verdict(True, "", {"share": 0.25, "kernel": "forward"})
WRONG = Verdict(False, "max error 3e-1", {"errors": [1.0, None], "nan": "nan"})
spawned = multiprocessing.get_context("spawn")


def prove(folder: Path, log: Path, seconds: float = 0.05) -> Verdict:
    """Return the verdict as a process does: from the store, or proven, which leaves a line in ``log``."""
    shelf = Store(folder)
    with shelf.proving(KEY) as verdict:
        if verdict is None:
            with open(log, "a", encoding="utf-8") as stream:
                stream.write(f"{os.getpid()}\n")
            time.sleep(seconds)
            verdict = RIGHT
            shelf.write(KEY, verdict)
    return verdict


def prove_for_ever(folder: Path, begun: Path) -> None:
    with Store(folder).proving(KEY):
        begun.touch()
        time.sleep(600)


def wait_for(path: Path) -> None:
    end = time.monotonic() + 60
    while not path.exists():
        assert time.monotonic() < end, path
        time.sleep(0.01)


def without_flock(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(file: int) -> None:
        raise OSError(37, "No locks available")

    monkeypatch.setattr(claim, "_flock", refuse)


def the_file(folder: Path) -> Path:
    (path,) = folder.glob("*.json")
    return path


@pytest.mark.parametrize("verdict", [RIGHT, WRONG], ids=["passed", "failed"])
def test_a_verdict_outlives_its_process(tmp_path: Path, verdict: Verdict) -> None:
    Store(tmp_path / "new" / "folder").write(KEY, verdict)
    later = Store(tmp_path / "new" / "folder")
    assert later.read(KEY) == verdict
    assert later.all() == {KEY: verdict}
    assert later.read(KEY + " ") is None


def test_a_second_read_does_not_ask_the_disk(tmp_path: Path) -> None:
    Store(tmp_path).write(KEY, RIGHT)
    shelf = Store(tmp_path)
    assert shelf.read(KEY) == RIGHT
    the_file(tmp_path).unlink()
    assert shelf.read(KEY) == RIGHT


def damages() -> dict[str, object]:
    def changed(**fields: object) -> object:
        return lambda text: json.dumps({**json.loads(text), **fields})

    return {
        "empty": lambda text: "",
        "truncated": lambda text: text[: len(text) // 2],
        "other format": changed(format=0),
        "altered": changed(passed=False),
        "other key": changed(key="another"),
        "foreign": lambda text: '{"hello": "world"}',
        "a list": lambda text: "[1, 2]",
        "nested": lambda text: "[" * 100_000,
        "binary": lambda text: b"\xff\xfe\x00" * 99,
        "large": lambda text: "{" + " " * (1 << 23) + text[1:],
    }


@pytest.mark.parametrize("damage", damages())
def test_a_damaged_file_is_no_verdict_and_is_written_anew(tmp_path: Path, damage: str) -> None:
    Store(tmp_path).write(KEY, RIGHT)
    path = the_file(tmp_path)
    damaged = damages()[damage](path.read_text())  # type: ignore[operator]
    path.write_bytes(damaged if isinstance(damaged, bytes) else damaged.encode())
    shelf = Store(tmp_path)
    assert shelf.read(KEY) is None
    assert KEY not in shelf.all()
    with shelf.proving(KEY) as verdict:
        assert verdict is None
        shelf.write(KEY, WRONG)
    assert Store(tmp_path).read(KEY) == WRONG


def test_a_file_of_the_right_hash_and_another_key_is_no_verdict(tmp_path: Path) -> None:
    Store(tmp_path).write("another", RIGHT)
    the_file(tmp_path).rename(Store(tmp_path)._path(KEY))
    assert Store(tmp_path).read(KEY) is None


@pytest.mark.parametrize("kind", ["folder", "pipe", "dangling"])
def test_what_is_no_file_is_no_verdict(tmp_path: Path, kind: str) -> None:
    path = Store(tmp_path)._path(KEY)
    {"folder": path.mkdir, "pipe": lambda: os.mkfifo(path), "dangling": lambda: path.symlink_to("nothing")}[kind]()
    shelf = Store(tmp_path)
    assert shelf.read(KEY) is None
    shelf.write(KEY, RIGHT)
    assert shelf.read(KEY) == RIGHT


def test_of_eight_processes_one_proves(tmp_path: Path) -> None:
    log = tmp_path / "log"
    with spawned.Pool(8) as pool:
        found = pool.starmap(prove, [(tmp_path / "cache", log, 0.5)] * 8, chunksize=1)
    assert found == [RIGHT] * 8
    assert len(log.read_text().split()) == 1
    assert [path.suffix for path in (tmp_path / "cache").iterdir()] == [".json"]


def test_of_eight_threads_one_proves(tmp_path: Path) -> None:
    for folder in (tmp_path / "cache", None):
        log, shelf, found = tmp_path / f"log {folder is None}", Store(folder), []

        def work(shelf: Store = shelf, log: Path = log, found: list[Verdict] = found) -> None:
            with shelf.proving(KEY) as verdict:
                if verdict is None:
                    with open(log, "a", encoding="utf-8") as stream:
                        stream.write("x\n")
                    time.sleep(0.1)
                    shelf.write(KEY, verdict := RIGHT)
                found.append(verdict)

        threads = [threading.Thread(target=work) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert found == [RIGHT] * 8
        assert len(log.read_text().split()) == 1


@pytest.mark.parametrize("flock", [True, False], ids=["flock", "no flock"])
def test_a_killed_proof_leaves_no_verdict_and_blocks_nobody(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flock: bool
) -> None:
    if not flock:
        without_flock(monkeypatch)
    begun, folder = tmp_path / "begun", tmp_path / "cache"
    child = multiprocessing.get_context("fork").Process(target=prove_for_ever, args=(folder, begun))
    child.start()
    wait_for(begun)
    waiting = Store(folder)
    start = time.monotonic()
    with waiting.proving(KEY, wait=0.2) as verdict:  # it is held
        assert verdict is None
    assert time.monotonic() - start >= 0.2
    assert child.pid is not None
    os.kill(child.pid, signal.SIGKILL)
    child.join()
    with claim.claimed(str(waiting._path(KEY).with_suffix(".lock")), True, lambda: False, wait=60) as held:
        assert held
    assert prove(folder, tmp_path / "log") == RIGHT
    assert [path.suffix for path in folder.iterdir()] == [".json"]


def test_ended_holders_of_another_machine_are_stale_after_a_while(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    without_flock(monkeypatch)
    path = tmp_path / "x.claim"
    path.write_text(json.dumps({"host": "elsewhere", "pid": 1}))
    with claim.claimed(str(tmp_path / "x.lock"), True, lambda: False, wait=0.05) as held:
        assert not held
    assert path.exists()
    os.utime(path, (0, time.time() - 2 * claim.LONGEST))
    with claim.claimed(str(tmp_path / "x.lock"), True, lambda: False, wait=10) as held:
        assert held
    assert not list(tmp_path.iterdir())


def test_without_flock_one_of_four_processes_proves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    without_flock(monkeypatch)
    log = tmp_path / "log"
    forked = multiprocessing.get_context("fork")
    children = [forked.Process(target=prove, args=(tmp_path / "cache", log, 0.5)) for _ in range(4)]
    for child in children:
        child.start()
    for child in children:
        child.join()
    assert len(log.read_text().split()) == 1
    assert Store(tmp_path / "cache").read(KEY) == RIGHT


@pytest.mark.parametrize("flock", [True, False], ids=["flock", "no flock"])
def test_a_child_forked_in_a_proof_neither_keeps_nor_ends_the_claim(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flock: bool
) -> None:
    if not flock:
        without_flock(monkeypatch)
    shelf = Store(tmp_path)
    lock = shelf._path(KEY).with_suffix(".lock")
    held_by = lock if flock else lock.with_suffix(".claim")
    forked = multiprocessing.get_context("fork")
    stop = forked.Event()
    with shelf.proving(KEY):
        child = forked.Process(target=stop.wait)
        child.start()
        pid = os.fork()
        status = os.waitpid(pid, 0)[1] if pid else 0
    if pid == 0:  # the block's end here is not the parent's
        os._exit(0 if held_by.exists() else 1)
    assert status == 0
    with claim.claimed(str(lock), True, lambda: False, wait=30) as held:
        assert held
    stop.set()
    child.join()


def test_a_lock_on_a_file_that_its_holder_has_removed_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, real, removed = tmp_path / "x.lock", claim._flock, []

    def late(file: int) -> None:
        if not removed:
            removed.append(path.unlink())
        real(file)

    monkeypatch.setattr(claim, "_flock", late)
    with claim.claimed(str(path), True, lambda: False) as held:
        assert held
        with open(path, "rb") as other, pytest.raises(BlockingIOError):
            real(other.fileno())


def test_an_interrupted_proof_leaves_nothing(tmp_path: Path) -> None:
    shelf = Store(tmp_path)
    with pytest.raises(KeyboardInterrupt), shelf.proving(KEY):
        raise KeyboardInterrupt
    assert not list(tmp_path.iterdir())
    assert shelf.read(KEY) is None
    with shelf.proving(KEY, wait=0) as verdict:
        assert verdict is None


def test_leftovers_of_killed_writers_are_removed_when_they_are_old(tmp_path: Path) -> None:
    Store(tmp_path).write(KEY, RIGHT)
    for name, age in (("a.1-2.tmp", 3600), ("b.3-4.tmp", 0), ("c.lock", 3600), ("notes.txt", 3600)):
        (tmp_path / name).touch()
        os.utime(tmp_path / name, (0, time.time() - age))
    Store(tmp_path).write("another", RIGHT)
    left = {path.name for path in tmp_path.iterdir() if path.suffix != ".json"}
    assert left == {"b.3-4.tmp", "notes.txt"}
    os.utime(Store(tmp_path)._path(KEY), (0, time.time() - 86400 * (store.KEPT_DAYS + 1)))
    Store(tmp_path).write("another", RIGHT)
    assert set(Store(tmp_path).all()) == {"another"}


def in_memory(folder: Path | None, caplog: pytest.LogCaptureFixture) -> None:
    """Check that a store works without its folder, and says so once."""
    with caplog.at_level(logging.INFO, logger="fusemesh"):
        shelf = Store(folder)
        for key, verdict in ((KEY, RIGHT), ("another", WRONG)):
            with shelf.proving(key, wait=5) as found:
                assert found is None
                shelf.write(key, verdict)
            assert shelf.read(key) == verdict
    assert shelf.all() == {KEY: RIGHT, "another": WRONG}
    said = [record for record in caplog.records if "kept in memory" in record.getMessage()]
    assert [record.levelname for record in said] == ["INFO"]
    assert shelf.forget() == 2
    assert shelf.read(KEY) is None


def test_without_a_folder(caplog: pytest.LogCaptureFixture) -> None:
    in_memory(None, caplog)


def test_a_folder_that_is_a_file(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").touch()
    in_memory(tmp_path / "file", caplog)


UNWRITABLE = """
import logging, os, resource, sys
from pathlib import Path
logging.basicConfig(level=logging.INFO, stream=sys.stdout, format="%(levelname)s %(message)s")
from fusemesh.kernels.proof import claim
from fusemesh.kernels.proof.store import Store, Verdict
exec(sys.argv[2])
shelf = Store(Path(sys.argv[1]))
print("before", shelf.read("there"))
for key in ("one", "two"):
    with shelf.proving(key, wait=5) as found:
        assert found is None
        shelf.write(key, Verdict(False, key))
    assert shelf.read(key) == Verdict(False, key)
with claim.claimed(sys.argv[1] + "/x.lock", True, lambda: False, wait=5) as held:
    assert not held
print("files", sorted(x.suffix for x in Path(sys.argv[1]).iterdir()))
"""


@pytest.mark.parametrize("fault", ["chmod", "0", "8"])
def test_a_folder_that_takes_no_files(tmp_path: Path, fault: str) -> None:
    """As another user where this one is root, whom no permission stops; and a disk on which no byte has room."""
    folder = tmp_path / "cache"
    Store(folder).write("there", RIGHT)
    prepared = f"resource.setrlimit(resource.RLIMIT_FSIZE, ({fault}, {fault}))"
    if fault == "chmod":
        prepared = "os.getuid() == 0 and os.setuid(65534)"
        for parent in [tmp_path, *tmp_path.parents]:
            if parent.stat().st_uid == os.getuid() and parent != Path("/"):
                parent.chmod(parent.stat().st_mode | 0o055)
        folder.chmod(0o555)
        the_file(folder).chmod(0o444)
    done = subprocess.run(
        [sys.executable, "-P", "-B", "-c", UNWRITABLE, str(folder), prepared],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    folder.chmod(0o755)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("INFO verdicts on kernels are kept in memory alone") == 1, done.stdout
    assert f"before {RIGHT}" in done.stdout
    assert "files ['.json']" in done.stdout


def test_where_the_folder_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(env, "CACHE", "")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert files.cache_folder() == tmp_path / "xdg" / "fusemesh"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert files.cache_folder() == tmp_path / ".cache" / "fusemesh"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert files.cache_folder() == tmp_path / ".cache" / "fusemesh"
    monkeypatch.setattr(env, "CACHE", "~/mine")
    assert files.cache_folder() == tmp_path / "mine"
    monkeypatch.setattr(env, "CACHE", "here")
    assert files.cache_folder() == Path.cwd() / "here"
    monkeypatch.setattr(env, "CACHE", "")
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)  # no HOME, and no entry among the users
    assert files.cache_folder() is None


def test_forgetting(tmp_path: Path) -> None:
    shelf = Store(tmp_path)
    for key in ("one", "two", "three"):
        shelf.write(key, RIGHT)
    (tmp_path / "notes.txt").touch()
    (tmp_path / "broken.json").touch()
    assert shelf.forget({"two", "never"}) == 1
    assert set(shelf.all()) == {"one", "three"}
    assert shelf.forget() == 2
    assert shelf.all() == {}
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_a_verdict_is_plain() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        RIGHT.passed = False  # type: ignore[misc]
