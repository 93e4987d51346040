"""Checkpoints: round trip, another layout, merging, and what a crash leaves. Layers: one process; 4 gloo ranks."""

import errno
import fcntl
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint import FileSystemReader

from fusemesh.hybrid import checkpoint
from tests.support.ranks import checkpoint as ranks


@pytest.fixture(scope="module")
def saved(rank_pool, tmp_path_factory):
    """Checkpoints that a layout wrote after 3 steps, each made once, with every tensor that it should hold."""
    done = {}

    def save(layout, tied=False):
        if (layout, tied) not in done:
            folder = tmp_path_factory.mktemp("checkpoints")
            world = ranks.parse(layout)[0].world_size
            found = rank_pool.run(ranks.train_and_save, layout, str(folder), 3, tied, ranks=world)
            done[layout, tied] = folder, union(found)
        return done[layout, tied]

    return save


def union(found):
    """Return the tensors of all ranks: with pp each holds its own stages', and two hold an equal copy of a tied one."""
    whole = {}
    for part in found:
        for name, value in part.items():
            assert torch.equal(whole.setdefault(name, value), value), name
    return whole


@pytest.fixture(scope="module")
def uninterrupted():
    """5 steps in one process, plain modules and plain tensors."""

    def run(tied):
        model = ranks.plain_model(seed=1, tied=tied)
        groups = [
            {"params": [p for p in model.parameters() if p.ndim > 1], "weight_decay": 0.1},
            {"params": [p for p in model.parameters() if p.ndim == 1], "weight_decay": 0.0},
        ]
        ranks.train(model, optimizer := torch.optim.AdamW(groups, lr=1e-2), ranks.Layout(), 0, range(5))
        return ranks.snapshot(model, optimizer)

    return {tied: run(tied) for tied in (False, True)}


INTO = ["dp2 x tp2", "fsdp4", "tp4", "fsdp2 x tp2", "dp2", "single"]
# The others read every kind of piece: whole and cut by fsdp, tp, both and stages, out of whole, cut and staged ones.
LATER = [
    ("dp2 x tp2", "dp2", False),
    ("dp2 x tp2", "pp2 x fsdp2", False),
    *(("pp2 x tp2", layout, True) for layout in ("pp2 x tp2", "pp2 x fsdp2", "pp2 interleaved", "single")),
    ("pp4", "pp2 interleaved", False),
]
STAGES = ["pp4", "pp2 x tp2", "pp2 x fsdp2", "pp2 interleaved"]
MOVES = [
    *(("dp2 x tp2", layout, False) for layout in INTO + STAGES),
    *(("pp2 x tp2", layout, True) for layout in [*STAGES, "dp2 x tp2", "single"]),
    ("pp4", "pp2 interleaved", False),
    ("pp2 interleaved", "pp2 x tp2", False),
]


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("wrote", "layout", "tied"),
    [
        pytest.param(a, b, c, id=f"{a}-{b}-{c}".replace(" ", ""), marks=[pytest.mark.slow] * ((a, b, c) in LATER))
        for a, b, c in MOVES
    ],
)
def test_a_checkpoint_loads_into_any_layout(rank_pool, saved, uninterrupted, wrote, layout, tied):
    folder, expected = saved(wrote, tied)
    assert expected.keys() == uninterrupted[tied].keys() and len(expected) > 120
    world = ranks.parse(layout)[0].world_size
    answers = rank_pool.run(ranks.load_and_go_on, layout, str(folder), range(3, 5), tied, ranks=world)
    for state, _, _, decays in answers:
        assert state == {"step": 3, "layout": wrote}
        assert decays == [0.1, 0.0]
    loaded, after = (union([answer[part] for answer in answers]) for part in (1, 2))
    assert loaded.keys() == expected.keys() == after.keys()
    for name in expected:
        assert torch.equal(loaded[name], expected[name]), name
    # Going on, the layouts differ by the order of sums alone.
    for name, value in uninterrupted[tied].items():
        assert (after[name] - value).norm() <= 1e-10 * value.norm(), name


@pytest.mark.distributed
def test_a_tied_weight_is_stored_once(saved):
    """One name, whose stored pieces do not overlap: the copies of the first and the last stage are one tensor there."""
    folder, _ = saved("pp2 x tp2", True)
    stored = FileSystemReader(checkpoint.latest(folder)).read_metadata().state_dict_metadata
    assert "model.head.weight" not in stored
    for name in ("model.embedding.weight", "optimizer.state.embedding.weight.exp_avg"):
        pieces = [tuple(chunk.offsets) for chunk in stored[name].chunks]
        assert len(pieces) == len(set(pieces)) == 2, name
        assert sum(chunk.sizes.numel() for chunk in stored[name].chunks) == stored[name].size.numel() == 37 * 16


@pytest.mark.distributed
def test_every_stage_hears_that_another_model_was_stored(rank_pool, saved):
    """Also the ranks whose own stages are the same in both: they would wait for the others."""
    folder, _ = saved("dp2 x tp2")
    messages = rank_pool.run(ranks.load_another_model, "pp4", str(folder))
    for message in messages:
        assert "holds another model (1 tensors differ): head.weight: stored (37, 16), in the model None" in message


@pytest.mark.distributed
@pytest.mark.parametrize(("wrote", "tied"), [("dp2 x tp2", False), ("pp2 x tp2", True)])
def test_merged_file_holds_the_plain_model(saved, tmp_path, wrote, tied):
    folder, expected = saved(wrote, tied)
    assert not torch.distributed.is_initialized()
    summary = checkpoint.merge(folder, tmp_path / "deep" / "model.safetensors")
    tensors, state = checkpoint.read_merged(tmp_path / "deep" / "model.safetensors")
    plain = ranks.plain_model(tied=tied).state_dict()
    assert {name: tuple(t.shape) for name, t in tensors.items()} == {name: tuple(t.shape) for name, t in plain.items()}
    assert all(torch.equal(tensors[name], expected[name]) for name in tensors)
    assert state == checkpoint.read_merged_state(tmp_path / "deep" / "model.safetensors")
    assert state == {"step": 3, "layout": wrote}
    assert summary["parameters"] == sum(tensor.numel() for tensor in plain.values())
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["model.safetensors"]


@pytest.mark.distributed
def test_every_rank_hears_of_a_failure_on_the_first(rank_pool, tmp_path):
    file = tmp_path / "file"
    file.write_text("in the way")
    messages = rank_pool.run(ranks.save_into, str(file), ranks=2)
    assert all("file" in message and "saved" not in message for message in messages)
    messages = rank_pool.run(ranks.load_from, str(tmp_path), ranks=2)
    assert all(message.startswith("checkpoint: expected a folder step-*") for message in messages)


@pytest.mark.distributed
def test_every_rank_hears_of_a_full_disk_in_the_same_line(rank_pool, tmp_path):
    """It is one rank's, and not the first's; the checkpoint before is whole, and nothing of the new one is left."""
    assert rank_pool.run(ranks.save_on_full_disks, "dp2 x tp2", str(tmp_path), [], 1) == ["saved"] * 4
    messages = rank_pool.run(ranks.save_on_full_disks, "dp2 x tp2", str(tmp_path), [1], 2)
    assert len(set(messages)) == 1 and "\n" not in messages[0]
    assert f"checkpoint: cannot write '{tmp_path}/step-00000002': no space is left on the device (" in messages[0]
    assert " needed, " in messages[0] and messages[0].endswith(
        " free); make room, or choose another place. step-00000001 is whole"
    )
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]


@pytest.mark.distributed
def test_every_rank_hears_of_a_damaged_file(rank_pool, saved, tmp_path):
    """The ranks share the reading; this file is one's."""
    shutil.copytree(checkpoint.latest(saved("dp2 x tp2")[0]), tmp_path / "step-00000003")
    path = max((tmp_path / "step-00000003").glob("*.distcp"))
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    messages = rank_pool.run(ranks.load_damaged, "pp2 x tp2", str(tmp_path))
    assert len({message for message, _ in messages}) == 1
    assert f"step-00000003' is damaged: {path.name} has {len(whole) // 2:,} bytes" in messages[0][0]
    # Without the checksums torch finds it.
    assert all("is damaged: its files cannot be read (" in message for _, message in messages)
    marker = tmp_path / "step-00000003" / "checkpoint.json"
    assert len(json.loads(marker.read_text())["files"]) == 5
    marker.write_text("")
    with pytest.raises(ValueError, match=r"checkpoint\.json is empty; copy it anew"):
        checkpoint.read_state(tmp_path / "step-00000003")


def test_a_save_that_cannot_fit_writes_nothing(tmp_path, monkeypatch):
    model, optimizer = small()
    step(model, optimizer, 0)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**9, 10**9 - 999, 999))
    with pytest.raises(OSError, match=r"no space is left .*kB needed, 999 bytes free.*No earlier checkpoint is there"):
        checkpoint.save(tmp_path, model, optimizer, {}, step=1)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("code", [errno.EDQUOT, errno.EROFS, errno.EACCES])
def test_the_cause_is_said_for_each_way_a_folder_refuses(tmp_path, monkeypatch, code):
    def refuses(*_, **__):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(Path, "mkdir", refuses)
    causes = {errno.EDQUOT: "quota is used up", errno.EROFS: "is read-only", errno.EACCES: "permission denied"}
    with pytest.raises(OSError, match=rf"^checkpoint: cannot write '.*/step-00000001': .*{causes[code]}"):
        checkpoint.save(tmp_path / "deep", nn.Linear(2, 2), None, {}, step=1)


def small():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 5), nn.GELU(), nn.Linear(5, 2))
    return model, torch.optim.AdamW(model.parameters(), lr=0.1)


def step(model, optimizer, seed):
    x = torch.randn(4, 3, generator=torch.Generator().manual_seed(seed))
    optimizer.zero_grad()
    model(x).square().sum().backward()
    optimizer.step()


def test_one_process_without_a_group_goes_on_to_the_bit(tmp_path):
    model, optimizer = small()
    for seed in range(3):
        step(model, optimizer, seed)
    path = checkpoint.save(tmp_path, model, optimizer, {"note": "ä"}, step=3)
    assert path == tmp_path / "step-00000003" == checkpoint.latest(tmp_path) == checkpoint.latest(path)
    other, other_optimizer = small()
    assert checkpoint.load(path, other, other_optimizer) == {"note": "ä"}
    for seed in range(3, 6):
        step(model, optimizer, seed)
        step(other, other_optimizer, seed)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))


def test_a_crash_while_writing_leaves_the_last_whole_checkpoint(tmp_path, monkeypatch):
    model, optimizer = small()
    step(model, optimizer, 0)
    whole = checkpoint.save(tmp_path, model, optimizer, {"step": 1}, step=1)
    with monkeypatch.context() as patch:
        patch.setattr(dcp, "save", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            checkpoint.save(tmp_path, model, optimizer, {"step": 2}, step=2)
    (tmp_path / "step-00000007").mkdir()  # a folder without a marker is no checkpoint
    assert checkpoint.latest(tmp_path) == whole
    assert len(list(tmp_path.glob(".unfinished-*"))) == 1
    checkpoint.save(tmp_path, model, optimizer, {"step": 2}, step=2)
    assert checkpoint.read_state(checkpoint.latest(tmp_path)) == {"step": 2}
    assert not list(tmp_path.glob(".unfinished-*"))


def test_what_another_process_is_writing_is_left_alone(tmp_path):
    model, optimizer = small()
    others = tmp_path / ".unfinished-1-step-00000002"
    others.mkdir()
    with (others / ".writer").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        checkpoint.save(tmp_path, model, optimizer, {}, step=2)
        assert others.is_dir()
    checkpoint.save(tmp_path, model, optimizer, {}, step=2)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000002"]


@pytest.mark.distributed
def test_ranks_that_share_no_folder_save_nothing_and_one_that_cannot_read_ends_all(rank_pool, tmp_path):
    apart = [str(tmp_path / name) for name in "ab"]
    first, second = rank_pool.run(ranks.save_apart, apart, ranks=2)
    assert first == second
    assert "rank 0 does not see __1_0.distcp, the " in first[0] and "bytes that rank 1 wrote" in first[0]
    assert "step-00000001': Input/output error" in first[1] and "No earlier checkpoint" in first[1]
    assert not list(tmp_path.glob("*/*"))


def test_the_same_step_is_replaced_and_only_the_newest_are_kept(tmp_path):
    model, optimizer = small()
    for number, state in ((9, 0), (10, 1), (10, 2), (100, 3)):
        checkpoint.save(tmp_path, model, optimizer, {"state": state}, step=number, keep=2)
    found = checkpoint.all_checkpoints(tmp_path)
    assert [checkpoint.step_of(path) for path in found] == [10, 100]
    assert [checkpoint.read_state(path) for path in found] == [{"state": 2}, {"state": 3}]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000010", "step-00000100"]


@pytest.mark.parametrize("moves", [0, 1])
def test_a_crash_while_replacing_a_checkpoint_leaves_one_of_the_two(tmp_path, monkeypatch, moves):
    """At each of the two moves; neither a mixture nor nothing is ever found."""
    model = torch.nn.Linear(2, 3)
    checkpoint.save(tmp_path, model, None, {"number": 1}, step=4)
    rename, done = Path.rename, []

    def dies(self, target):
        if self.parent == tmp_path:
            if len(done) == moves:
                raise KeyboardInterrupt
            done.append(self)
        return rename(self, target)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(Path, "rename", dies)
        checkpoint.save(tmp_path, model, None, {"number": 2}, step=4)
    assert checkpoint.load(tmp_path, model) == {"number": 1}
    checkpoint.save(tmp_path, model, None, {"number": 3}, step=4)
    assert checkpoint.load(tmp_path, model) == {"number": 3}
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000004"]


def test_wrong_input(tmp_path):
    with pytest.raises(ValueError, match=r"checkpoint: expected a folder step-\* with checkpoint.json in .*found none"):
        checkpoint.latest(tmp_path)
    with pytest.raises(ValueError, match="not a whole checkpoint"):
        checkpoint.read_state(tmp_path)
    with pytest.raises(ValueError, match=r"expected a \.safetensors file, received .*nowhere.*not found"):
        checkpoint.read_merged(tmp_path / "nowhere.safetensors")
    for name, more in (
        ("text.safetensors", ", or is one that is cut off or damaged"),
        ("a.csv", "; give a run directory"),
    ):
        (tmp_path / name).write_text("this is no safetensors file")
        with pytest.raises(ValueError, match=rf"^model: '\S*{name}' is not a \.safetensors file{more}") as error:
            checkpoint.read_merged(tmp_path / name)
        assert "header" not in str(error.value)

    from safetensors.torch import save_file

    save_file({"x": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="expected a file that `fusemesh merge` wrote"):
        checkpoint.read_merged(tmp_path / "other.safetensors")

    model, optimizer = small()
    path = checkpoint.save(tmp_path, model, optimizer, {}, step=1)
    with pytest.raises(
        ValueError, match=r"holds another model \(5 tensors differ\).*stored \(5, 3\), in the model \(4, 3\)"
    ):
        checkpoint.load(path, nn.Sequential(nn.Linear(3, 4), nn.GELU(), nn.Linear(4, 2), nn.Linear(2, 2)))
    (path / "checkpoint.json").write_text(json.dumps({"format": 1, "state": {}}))
    with pytest.raises(ValueError, match="expected format 3, received 1"):
        checkpoint.read_state(path)
