"""Layer: application, on gloo ranks and in one process. A model in any layout goes back into a Hugging Face folder."""

from __future__ import annotations

import gc
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from fusemesh.hybrid import checkpoint
from fusemesh.hybrid.checkpoint import CheckpointError
from fusemesh.hybrid.checkpoint.chunks import StoredModel
from fusemesh.hybrid.hugging_face.export import export_pretrained
from fusemesh.hybrid.hugging_face.exports.documents import keep_small_files
from fusemesh.hybrid.hugging_face.exports.shards import INDEX, SourceFiles
from fusemesh.hybrid.hugging_face.exports.target import MARKER
from fusemesh.hybrid.hugging_face.folder import read_folder
from fusemesh.hybrid.hugging_face.merge import EXPORT, export_plan, merge_pretrained
from fusemesh.hybrid.layout import Layout
from fusemesh.hybrid.ranks.testing import RankPool
from tests.support.pretrained.folders import CAUSAL, CLASSES, PAIRS, PRETRAINED, make_folder, make_model
from tests.support.ranks import pretrained_export as ranks

EVERY = [(name, kind) for name, family in PRETRAINED.items() for kind in family.kinds]
# Tied once; two names of one parameter; one key head; spans; two tied tables, and positions that are not saved.
SOME = [
    ("qwen3", "AutoModelForCausalLM"),
    ("bert", "AutoModelForQuestionAnswering"),
    ("marian", "AutoModelForSeq2SeqLM"),
]


def contents(folder: Path) -> dict[str, bytes]:
    """Return the bytes of each file of a folder, but for the marker of an export."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file() and p.name != MARKER}


def logits(folder: Path, kind: str) -> list[torch.Tensor]:
    """Return the outputs of the model in a folder."""
    model = getattr(transformers, kind).from_pretrained(folder).eval()
    ids = torch.arange(3, 19).reshape(2, 8)
    ids[:, -1] = 2  # the end, which heads of classes look for
    with torch.no_grad():
        found = model(input_ids=ids, **({"decoder_input_ids": ids} if model.config.is_encoder_decoder else {}))
    return [x for name, x in found.items() if "logits" in name]


def check_same(folder: Path, target: Path, kind: str) -> None:
    """Every file to the byte, and what from_pretrained makes of them."""
    want, found = contents(folder), contents(target)
    assert want.keys() == found.keys()
    assert [name for name in want if want[name] != found[name]] == []
    for one, other in zip(logits(folder, kind), logits(target, kind), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize(("name", "kind"), SOME)
def test_a_whole_model_goes_back_to_the_byte(tmp_path: Path, name: str, kind: str) -> None:
    """In bf16, though it was in fp32 in the meantime."""
    folder = make_folder(tmp_path / "source", name, kind, dtype=torch.bfloat16)
    model = getattr(transformers, kind).from_pretrained(folder, dtype=torch.float32)
    report = export_pretrained(model, tmp_path / "out", folder)
    check_same(folder, tmp_path / "out", kind)
    assert not report.added and not report.left_out and len(report.files) > 1
    assert report.written == report.nbytes == 2 * report.parameters


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("layout", "families"),
    [
        ("dp2 x tp2", SOME[:1]),
        *(
            pytest.param(layout, EVERY, marks=pytest.mark.slow)
            for layout in ("single", "fsdp4", "tp4", "dp2 x tp2", "fsdp2 x tp2", "pp2 x tp2", "pp4")
        ),
    ],
)
def test_ranks_write_what_they_have_read_to_the_byte(
    rank_pool: RankPool, tmp_path: Path, layout: str, families: list[tuple[str, str]]
) -> None:
    number = Layout.parse(layout).world_size
    cases = [(kind, str(tmp_path / f"{name}-{kind}"), str(tmp_path / f"{name}-{kind}-out")) for name, kind in families]
    for (name, _), (kind, folder, _) in zip(families, cases, strict=True):
        make_folder(Path(folder), name, kind)
    found = rank_pool.run(ranks.exported, layout, cases, ranks=number, timeout=600)
    for place, (kind, folder, target) in enumerate(cases):
        check_same(Path(folder), Path(target), kind)
        written = [reports[place].written for reports in found]
        assert sum(written) == found[0][place].nbytes
        # Nobody writes much more than its share.
        assert max(written) - min(written) < found[0][place].nbytes / 3, written


@pytest.mark.distributed
@pytest.mark.parametrize(
    "layout", ["fsdp2", *(pytest.param(x, marks=pytest.mark.slow) for x in ("dp2 x tp2", "pp2 x tp2"))]
)
def test_a_save_is_what_transformers_saves_to_the_byte(rank_pool: RankPool, tmp_path: Path, layout: str) -> None:
    """Where there is no folder to follow: the same files, cut at the same places, under the same headers."""
    kinds = [("qwen3", CAUSAL, "40KB"), ("llama", CAUSAL, 3000), ("marian", PAIRS, "1.5MB")]
    for name, kind, size in kinds:
        model, found = make_model(name, kind), tmp_path / f"{name}-saved"
        make_folder(tmp_path / name, name, kind)
        model.save_pretrained(want := tmp_path / f"{name}-want", max_shard_size=size)
        arguments = (layout, kind, str(tmp_path / name), str(found), size)
        rank_pool.run(ranks.saved_into, *arguments, ranks=Layout.parse(layout).world_size)
        assert contents(want) == contents(found)


@pytest.mark.distributed
def test_every_byte_is_written_once(rank_pool: RankPool, tmp_path: Path) -> None:
    """Of replicas, of key heads that tp repeats, of tied names, of a vocabulary that tp does not divide."""
    folder = make_folder(tmp_path / "source", "qwen3", hidden_size=80)
    found = rank_pool.run(ranks.counted, "dp2 x tp2", CAUSAL, str(folder), str(tmp_path / "out"))
    spans = sorted(
        (file, at, at + length) for own in found for (file, at, length), times in own.items() for _ in range(times)
    )
    source = SourceFiles.of(read_folder(folder))
    for shard in source.shards:
        at = len(shard.header())
        for _, begin, end in (span for span in spans if span[0] == shard.file):
            assert begin == at
            at = end
        assert at == shard.nbytes


def test_config_json_has_only_what_changed(tmp_path: Path) -> None:
    """Complaint: fp32 files beside a config that says bf16. And a new head, whose labels are the model's."""
    folder = make_folder(tmp_path / "source", "qwen3", dtype=torch.bfloat16)
    text = (folder / "config.json").read_text()
    text = text.replace('"hidden_act"', '"of_another_version": [1.0, 1e-05],\n  "hidden_act"')
    text = text.replace(f'"transformers_version": "{transformers.__version__}"', '"transformers_version": "4.51.0"')
    (folder / "config.json").write_text(text)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    export_pretrained(model, tmp_path / "out", folder, dtype=torch.float32)
    assert (tmp_path / "out" / "config.json").read_text() == text.replace('"bfloat16"', '"float32"')
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    assert loaded.dtype == torch.float32

    model = transformers.AutoModelForSequenceClassification.from_pretrained(folder, num_labels=3)
    report = export_pretrained(model, tmp_path / "classes", folder)
    assert report.added == ("score.weight",) and not report.left_out
    made = json.loads((tmp_path / "classes" / "config.json").read_text())
    before = json.loads(text)
    changed = {key for key in made.keys() | before.keys() if made.get(key) != before.get(key)}
    assert changed == {"architectures", "id2label", "label2id"}
    assert made["architectures"] == ["Qwen3ForSequenceClassification"] and len(made["id2label"]) == 3
    loaded, told = transformers.AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "classes", dtype="auto", output_loading_info=True
    )
    assert not any(told.values()) and torch.equal(loaded.score.weight, model.score.weight.bfloat16())


def test_weights_that_are_not_tied_are_both_written(tmp_path: Path) -> None:
    """Complaint: the config says tied, the tensors are not, and the head is left out of the save."""
    folder = make_folder(tmp_path / "source", "qwen3")
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach() * 2)
    export_pretrained(model, tmp_path / "out", folder)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(loaded.lm_head.weight, model.lm_head.weight)
    assert torch.equal(loaded.model.embed_tokens.weight, model.model.embed_tokens.weight)


def test_a_folder_that_holds_a_tied_weight_twice(tmp_path: Path) -> None:
    """Complaint: no lm_head.weight where the config says tied and the file holds both. It is written once."""
    folder = make_folder(tmp_path / "source", "qwen3")
    shard = next(s for s in SourceFiles.of(read_folder(folder)).shards if "model.embed_tokens.weight" in s.entries)
    tensors = load_file(folder / shard.file)
    save_file({**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"].clone()}, folder / shard.file)
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"]["lm_head.weight"] = shard.file
    (folder / INDEX).write_text(json.dumps(index))
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    report = export_pretrained(model, tmp_path / "out", folder)
    assert report.left_out == ("lm_head.weight",) and not report.added
    assert "lm_head.weight" not in json.loads((tmp_path / "out" / INDEX).read_text())["weight_map"]
    for one, other in zip(logits(folder, CAUSAL), logits(tmp_path / "out", CAUSAL), strict=True):
        assert torch.equal(one, other)


def test_each_tensor_keeps_the_dtype_of_its_own(tmp_path: Path) -> None:
    """In a folder of several, in one file with no index; and by what a checkpoint knows when the folder is gone."""
    folder = make_folder(tmp_path / "source", "llama", dtype=torch.bfloat16, shard="1GB")
    tensors = load_file(folder / "model.safetensors")
    mixed = {name: x.float() + 1e-6 if "norm" in name else x for name, x in tensors.items()}
    save_file(mixed, folder / "model.safetensors", metadata={"format": "pt"})
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    export_pretrained(model, tmp_path / "out", folder)
    assert contents(folder) == contents(tmp_path / "out")
    known = json.loads(json.dumps(export_plan(model, read_folder(folder))))
    kept = keep_small_files(folder, tmp_path / "run")
    want = contents(folder)
    shutil.rmtree(folder)
    with pytest.raises(ValueError, match="small_files: expected the folder of the tokenizer's"):
        export_pretrained(model, tmp_path / "other", known)
    export_pretrained(model, tmp_path / "other", known, small_files=kept)
    assert contents(tmp_path / "other") == want


def test_names_of_the_folder_are_kept(tmp_path: Path) -> None:
    """Without the base model's prefix, and the old names of norms; with a new head they are the model's own."""
    folder = tmp_path / "source"
    base = transformers.BertForSequenceClassification.from_pretrained(make_folder(tmp_path / "made", "bert", CLASSES))
    base.bert.save_pretrained(folder, max_shard_size="40KB")
    model = transformers.BertModel.from_pretrained(folder)
    export_pretrained(model, tmp_path / "out", folder)
    assert contents(folder) == contents(tmp_path / "out")
    model = transformers.BertForSequenceClassification.from_pretrained(folder)
    report = export_pretrained(model, tmp_path / "classes", folder)
    assert set(report.added) == {"classifier.weight", "classifier.bias"}
    names = set(SourceFiles.of(read_folder(tmp_path / "classes")).entries)
    assert names == set(model.state_dict())
    before = {shard.file for shard in SourceFiles.of(read_folder(folder)).shards}
    assert {shard.file for shard in SourceFiles.of(read_folder(tmp_path / "classes")).shards} == before


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("layout", "families"),
    [
        ("fsdp2", SOME[:1]),
        *(pytest.param(layout, EVERY, marks=pytest.mark.slow) for layout in ("dp2 x tp2", "pp2 x tp2")),
    ],
)
def test_a_checkpoint_is_merged_into_what_its_ranks_export(
    rank_pool: RankPool, tmp_path: Path, layout: str, families: list[tuple[str, str]]
) -> None:
    """In one process, to the byte, when the folder that it came from is gone, with small files that the run kept."""
    number = Layout.parse(layout).world_size
    for name, kind in families:
        source, run, out = (tmp_path / f"{name}-{kind}-{what}" for what in ("source", "run", "out"))
        make_folder(source, name, kind, dtype=torch.bfloat16)
        rank_pool.run(ranks.checkpointed, layout, kind, str(source), str(run), str(out), ranks=number)
        shutil.rmtree(source)
        report = merge_pretrained(run, merged := tmp_path / f"{name}-{kind}-merged")
        assert contents(merged) == contents(out) and report.written == report.nbytes
        assert {entry.dtype for entry in SourceFiles.of(read_folder(out)).entries.values()} == {torch.bfloat16}


def test_a_checkpoint_that_cannot_be_merged(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "source", "llama")
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    run = tmp_path / "run"
    checkpoint.save(run, model, None, {"metadata": {}}, step=1)
    with pytest.raises(CheckpointError, match="expected one of a model that was loaded from a Hugging Face folder"):
        merge_pretrained(run, tmp_path / "out")
    state = {"metadata": {EXPORT: export_plan(model, read_folder(folder))}}
    path = checkpoint.save(run, model, None, state, step=1)
    shutil.rmtree(folder)
    with pytest.raises(CheckpointError, match=r"expected the tokenizer's and other small files .* found neither"):
        merge_pretrained(run, tmp_path / "out")
    make_folder(folder, "llama")
    with next(path.glob("*.distcp")).open("r+b") as file:
        file.seek(2000)
        file.write(b"damaged")
    with pytest.raises(CheckpointError, match="has changed since it was written"):
        merge_pretrained(run, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_merge_holds_one_stored_part_at_a_time(tmp_path: Path) -> None:
    """Beside what is converted; another dtype for all, in files of another size."""
    folder = make_folder(tmp_path / "source", "llama", vocab_size=9973)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    largest = model.lm_head.weight.nbytes
    state = {"metadata": {EXPORT: export_plan(model, read_folder(folder))}}
    checkpoint.save(tmp_path / "run", model, None, state, step=1)
    want = {name: x.double() for name, x in model.state_dict().items()}
    del model
    held: list[int] = []
    parts = StoredModel.parts

    def counted(stored: StoredModel, name: str) -> Any:
        for start, part in parts(stored, name):
            alive = [x for x in gc.get_objects() if isinstance(x, torch.Tensor) and x.dtype == torch.float32]
            held.append(sum({x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in alive}.values()))
            yield start, part

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(StoredModel, "parts", counted)
        report = merge_pretrained(tmp_path / "run", tmp_path / "out", dtype=torch.float64, max_shard_size="4MB")
    assert len(held) == report.tensors and max(held) <= largest + 1000
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto").state_dict()
    assert all(torch.equal(loaded[name], x) for name, x in want.items())
