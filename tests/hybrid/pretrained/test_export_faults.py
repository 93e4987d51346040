"""Layer: application. An export that cannot be finished says why in one line, and leaves nothing that looks whole."""

from __future__ import annotations

import errno
import json
import os
import resource
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from fusemesh.hybrid.checkpoint import CheckpointError
from fusemesh.hybrid.hugging_face.export import Options, export_pretrained, export_state, save_configs
from fusemesh.hybrid.hugging_face.exports import placing, target
from fusemesh.hybrid.outputs import OutputError
from fusemesh.hybrid.ranks.local import RankError
from fusemesh.hybrid.ranks.testing import RankPool
from tests.support.pretrained.folders import CAUSAL, make_folder, make_model
from tests.support.ranks import pretrained_export as ranks


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("source"), "llama")


@pytest.fixture(scope="module")
def model(source: Path) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(source)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@contextmanager
def limited(size: int) -> Iterator[None]:
    """Let no file of this process grow beyond ``size``."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


def test_a_disk_that_is_full(model: Any, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Known before, found when room is reserved, and found when it is written to."""
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(target, "free_bytes", lambda path: 1000)
        with pytest.raises(OutputError, match=r"no space is left on the device .*needed.*; make room"):
            export_pretrained(model, out, source)
    assert names(tmp_path) == []
    with limited(20_000), pytest.raises(OutputError, match=r"limit on the size of files .*ulimit -f"):
        export_pretrained(model, out, source)
    assert names(tmp_path) == []

    def full(*_: Any) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(placing.os, "pwrite", full)
        with pytest.raises(OutputError, match=f"cannot write {str(out)!r}: no space is left"):
            export_pretrained(model, out, source)
    assert names(tmp_path) == []


def test_values_that_the_folders_dtype_cannot_hold(tmp_path: Path) -> None:
    """As infinite ones they would be saved, and found when the model is used."""
    source = make_folder(tmp_path / "source", "gpt2", dtype=torch.float16)
    model = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    weight = model.transformer.h[1].mlp.c_fc.weight
    with torch.no_grad():
        weight[3, 5] = -1e5
    said = r"export: 'transformer\.h\.1\.mlp\.c_fc\.weight': expected values of at most 65504, which float16 .* 100000;"
    with pytest.raises(ValueError, match=said):
        export_pretrained(model, tmp_path / "out", source)
    assert names(tmp_path) == ["source"]
    with torch.no_grad():
        weight[3, 5] = -torch.inf  # what is in the model is saved
    export_pretrained(model, tmp_path / "out", source)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert loaded.dtype == torch.float16 and loaded.transformer.h[1].mlp.c_fc.weight[3, 5] == -torch.inf
    with torch.no_grad():
        weight[3, 5] = -1e5
    export_pretrained(model, tmp_path / "wide", source, dtype=torch.bfloat16)


@pytest.mark.distributed
def test_a_disk_that_is_full_for_one_rank(rank_pool: RankPool, source: Path, tmp_path: Path) -> None:
    told = rank_pool.run(ranks.refused, "fsdp2", CAUSAL, str(source), str(tmp_path / "out"), 1, 3, ranks=2)
    assert told[0] == told[1] and told[0].startswith("OutputError: cannot write") and "no space is left" in told[0]
    assert names(tmp_path) == []


def test_a_folder_that_takes_no_files(
    model: Any, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    # The user of tests may be one who may write everywhere.
    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(OutputError, match="the file system is read-only; choose another place"):
        export_pretrained(model, tmp_path / "out", source)


def test_what_stands_at_the_target_stays(model: Any, source: Path, tmp_path: Path) -> None:
    """Unless it is empty, or what an export made and nobody has added to."""
    out = tmp_path / "out"
    out.mkdir()
    export_pretrained(model, out, source)
    first = out.stat().st_ino
    export_pretrained(model, out, source, dtype=torch.bfloat16)
    assert out.stat().st_ino != first and names(tmp_path) == ["out"]
    (out / "notes.txt").write_text("mine")
    for place, what in ((out, "notes.txt"), (source, "config.json"), (source / "config.json", "is a file")):
        with pytest.raises(CheckpointError, match=f"output: expected a new folder.*{what}"):
            export_pretrained(model, place, source)
    assert (out / "notes.txt").read_text() == "mine" and names(tmp_path) == ["out"]


def test_what_is_put_at_the_target_in_the_meantime_stays(
    model: Any, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, write = tmp_path / "out", placing.os.pwrite

    def pwrite(*arguments: Any) -> int:
        out.mkdir(exist_ok=True)
        (out / "notes.txt").write_text("mine")
        return write(*arguments)

    monkeypatch.setattr(placing.os, "pwrite", pwrite)
    with pytest.raises(CheckpointError, match=r"holds something else \(notes.txt\)"):
        export_pretrained(model, out, source)
    assert names(out) == ["notes.txt"] and names(tmp_path) == ["out"]


def dies_in(action: Callable[[], Any]) -> None:
    """Run ``action`` in a process that it ends."""
    child = os.fork()
    if child == 0:
        try:
            action()
        finally:
            os._exit(1)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL


def die(*_: Any, **__: Any) -> Any:
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize("where", ["pwrite", "rename", "replace"])
def test_what_a_killed_process_leaves_is_never_whole(
    model: Any, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    """While it writes; between the renames by which an older export is replaced. The next one cleans up."""
    out = tmp_path / "out"
    if where == "replace":
        export_pretrained(model, out, source)
    with monkeypatch.context() as patch:
        if where == "pwrite":
            patch.setattr(placing.os, "pwrite", die)
        else:
            rename, left = Path.rename, [0 if where == "rename" else 1]

            def counted(path: Path, other: Path) -> Path:
                left[0] -= 1
                return die() if left[0] < 0 else rename(path, other)

            patch.setattr(Path, "rename", counted)
        dies_in(lambda: export_pretrained(model, out, source))
    assert not out.exists() and any(name.startswith(".unfinished-") for name in names(tmp_path))
    if where == "replace":
        with monkeypatch.context() as patch:
            patch.setattr(target, "free_bytes", lambda path: 1000)
            with pytest.raises(OutputError):
                export_pretrained(model, out, source)
        assert (out / "config.json").is_file(), "the older one was not put back"
    export_pretrained(model, out, source)
    assert names(tmp_path) == ["out"]


@pytest.mark.parametrize("size", ["1GB", pytest.param("60KB", marks=pytest.mark.slow)])
def test_a_killed_save_into_a_folder_leaves_the_new_weights_or_none(
    model: Any, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: str
) -> None:
    """At every move of a file, over weights of an earlier save in one file or several."""
    other = make_model("llama", seed=1)

    def save() -> None:
        export_state(model, out, Options(max_shard_size=size, into=True), lambda place: save_configs(model, place))

    replace, found = Path.replace, set()
    for number in range(100):
        out = tmp_path / str(number)
        other.save_pretrained(out, max_shard_size=("60KB", "1GB")[number % 2])
        left = [number]

        def counted(path: Path, new: Path, left: list[int] = left) -> Path:
            left[0] -= 1
            return die() if left[0] < 0 else replace(path, new)

        child = os.fork()
        if child == 0:
            monkeypatch.setattr(Path, "replace", counted)
            save()
            os._exit(0)
        done = os.waitpid(child, 0)[1] == 0
        try:
            loaded = transformers.AutoModelForCausalLM.from_pretrained(out).state_dict()
        except OSError:
            assert not done
            found.add("none")
        else:
            assert all(torch.equal(loaded[name], x) for name, x in model.state_dict().items())
            found.add("new")
        if done:
            break
    assert done and found == {"none", "new"}


@pytest.mark.slow
@pytest.mark.distributed
def test_a_rank_that_is_killed(source: Path, tmp_path: Path) -> None:
    with RankPool(2) as pool, pytest.raises(RankError, match="rank 1"):
        pool.run(ranks.killed, "fsdp2", CAUSAL, str(source), str(tmp_path / "out"), 1)
    assert not (tmp_path / "out").exists()
    with RankPool(2) as pool:
        pool.run(ranks.exported, "fsdp2", [(CAUSAL, str(source), str(tmp_path / "out"))])
    assert names(tmp_path) == ["out"]


@pytest.mark.distributed
def test_a_save_into_a_folder_that_holds_more(rank_pool: RankPool, source: Path, tmp_path: Path) -> None:
    """What is there stays, but for the weights of an earlier save; they are missing until all is there."""
    for number, size in enumerate(("40KB", "1GB", "60KB")):
        (tmp_path / "tokenizer.json").write_text("{}")
        rank_pool.run(ranks.saved_into, "fsdp2", CAUSAL, str(source), str(tmp_path), size, ranks=2)
        found = [name for name in names(tmp_path) if "safetensors" in name]
        assert names(tmp_path) == sorted(["config.json", "generation_config.json", "tokenizer.json", *found])
        if number == 1:
            assert found == ["model.safetensors"]
        else:
            index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
            assert found == sorted({*index["weight_map"].values(), "model.safetensors.index.json"})
        want, loaded = make_model("llama").state_dict(), transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
        assert all(torch.equal(want[name], x) for name, x in loaded.state_dict().items())
    told = rank_pool.run(ranks.saving_refused, str(source), str(tmp_path), ranks=2)
    for found in told:
        assert "hf upload NAME FOLDER" in found["push_to_hub"]
        assert "fusemesh.hybrid.checkpoint.save" in found["distributed_checkpoint"]
        assert "safe_serialization=True" in found["safe_serialization"]
