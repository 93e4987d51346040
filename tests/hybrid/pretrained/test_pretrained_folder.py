"""Unit layer: what a Hugging Face folder holds, and each folder that cannot be loaded, refused with what to do."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fusemesh.hybrid.hugging_face.folder import INDEX, WEIGHTS, TensorOnDisk, read_folder
from fusemesh.hybrid.hugging_face.refusals import check_rope

safetensors = pytest.importorskip("safetensors.torch")

TENSORS = {
    "embed": torch.arange(12.0).reshape(4, 3).bfloat16(),
    "norm": torch.arange(3.0),
    "scale": torch.tensor(2.0, dtype=torch.float64),
    "head": torch.arange(6).reshape(2, 3),
}
FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


def make(path: Path, config: dict[str, Any] | None = None, files: dict[str, list[str]] | None = None) -> Path:
    """A folder of two files, or of ``files`` (names of tensors by file), with an index where there are several."""
    path.mkdir(exist_ok=True)
    files = {FIRST: ["embed", "norm"], SECOND: ["scale", "head"]} if files is None else files
    (path / "config.json").write_text(json.dumps({"model_type": "llama", **(config or {})}))
    for file, names in files.items():
        safetensors.save_file({name: TENSORS[name] for name in names}, path / file, {"format": "pt"})
    if list(files) != [WEIGHTS]:
        placed = {name: file for file, names in files.items() for name in names}
        (path / INDEX).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": placed}))
    return path


def told(path: Path | str) -> str:
    with pytest.raises(ValueError) as raised:
        read_folder(path)
    return str(raised.value)


@pytest.mark.parametrize("files", [None, {WEIGHTS: list(TENSORS)}])
def test_a_folder_is_described_by_its_headers_alone(
    tmp_path: Path, files: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = read_folder(make(tmp_path, {"dtype": "bfloat16"}, files))
    assert folder.tensors.keys() == TENSORS.keys() and folder.metadata == {"format": "pt"}
    assert folder.config["model_type"] == "llama" and folder.nbytes == sum(x.nbytes for x in TENSORS.values())
    assert folder.dtype == torch.bfloat16
    for name, tensor in folder.tensors.items():
        with open(tmp_path / tensor.file, "rb") as file:
            file.seek(tensor.offset)
            values = torch.frombuffer(bytearray(file.read(tensor.nbytes)), dtype=tensor.dtype).reshape(tensor.shape)
        assert torch.equal(values, TENSORS[name])


def test_what_lies_beside_the_files_of_the_index_is_told_and_not_read(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Some folders hold all weights a second time."""
    make(tmp_path, {"torch_dtype": "float16"})
    (tmp_path / "consolidated.safetensors").write_bytes(b"not read")
    notes = read_folder(tmp_path).notes
    assert f"consolidated.safetensors not read: {INDEX} is obeyed" in notes[0] and not caplog.records
    assert "config.json says float16, the files hold bfloat16, float32, float64" in notes[1]
    (tmp_path / WEIGHTS).write_bytes(b"not read")
    assert len(read_folder(tmp_path).tensors) == 4
    assert "from_pretrained would read model.safetensors: remove the older" in caplog.text
    make(tmp_path, files={WEIGHTS: ["norm"]})
    (tmp_path / INDEX).unlink()
    assert list(read_folder(tmp_path).tensors) == ["norm"]


def _rewrite(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change a file's header."""
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])


def _index(path: Path, change: Callable[[dict[str, str]], None]) -> None:
    index = json.loads((path / INDEX).read_text())
    change(index["weight_map"])
    (path / INDEX).write_text(json.dumps(index))


def _truncate(path: Path, size: int) -> None:
    path.write_bytes(path.read_bytes()[:size])


def _save(path: Path, *names: str) -> None:
    safetensors.save_file({name: TENSORS[name] for name in names}, path)


FAULTS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no config": (lambda p: (p / "config.json").unlink(), "expected a config.json in it, received none; give"),
    "config of text": (lambda p: (p / "config.json").write_text("hello"), "config.json: expected JSON, received other"),
    "config of a list": (lambda p: (p / "config.json").write_text("[]"), "expected a JSON object, received a list"),
    "no model type": (lambda p: (p / "config.json").write_text("{}"), "expected a model_type, such as 'llama', receiv"),
    "no index": (
        lambda p: (p / INDEX).unlink(),
        "without an index, which says where each tensor is; fetch it too (`hf",
    ),
    "index of text": (lambda p: (p / INDEX).write_text("<html>"), f"{INDEX}: expected JSON, received other text"),
    "index without a map": (lambda p: (p / INDEX).write_text("{}"), "expected a weight_map from names of tensors"),
    "absent file": (lambda p: (p / SECOND).unlink(), f"of which {SECOND} is not in"),
    "absent files": (
        lambda p: [(p / file).unlink() for file in (FIRST, SECOND)],
        f"expected the 2 files that it names, of which {FIRST}, {SECOND} are not in",
    ),
    "file elsewhere": (lambda p: _index(p, lambda m: m.update(x="../x.safetensors")), "received '../x.safetensors'"),
    "truncated": (
        lambda p: _truncate(p / SECOND, (p / SECOND).stat().st_size - 20),
        "the file is truncated; download or",
    ),
    "truncated by one byte": (lambda p: _truncate(p / FIRST, (p / FIRST).stat().st_size - 1), "the file is truncated"),
    "truncated in the header": (lambda p: _truncate(p / FIRST, 40), "received 40 bytes that begin with"),
    "empty": (lambda p: _truncate(p / FIRST, 0), "received 0 bytes that begin with b''; it is truncated or no such"),
    "longer": (lambda p: (p / FIRST).open("ab").write(b"more"), "the file is longer than its tensors"),
    "pointer of git": (
        lambda p: (p / FIRST).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"),
        "received a pointer of git-lfs; `git lfs pull` fetches it",
    ),
    "header of other bytes": (
        lambda p: (p / FIRST).write_bytes(struct.pack("<Q", 4) + b"\xff\xfe{}" + b"0" * 8),
        "expected a header in JSON, received other bytes",
    ),
    "header of a list": (lambda p: (p / FIRST).write_bytes(struct.pack("<Q", 2) + b"[]"), "expected a header in JSON"),
    "unknown dtype": (
        lambda p: _rewrite(p / FIRST, lambda h: h["norm"].update(dtype="F8_E4M3")),
        "for 'norm', received 'F8_E4M3'; load a copy of the model that is not quantised",
    ),
    "dtype that the file does not have": (
        lambda p: _rewrite(p / FIRST, lambda h: h["norm"].update(dtype="BF16")),
        "expected 6 bytes for 'norm', BF16 of shape [3], received 12 in data_offsets: the header names a dtype",
    ),
    "entry without a shape": (
        lambda p: _rewrite(p / FIRST, lambda h: h["norm"].pop("shape")),
        "expected dtype, shape and data_offsets of 'norm' in the header",
    ),
    "shard of another model": (
        lambda p: _save(p / SECOND, "norm"),
        "expected each tensor once, received 'norm' in model-00001-of-00002.safetensors and in model-00002",
    ),
    "shard without a tensor": (lambda p: _save(p / SECOND, "scale"), "expected the tensor 'head', which"),
    "shard with one more": (lambda p: _index(p, lambda m: m.pop("head")), "received 1 more, such as 'head'"),
    "tensor in another file": (lambda p: _index(p, lambda m: m.update(norm=SECOND)), f"received it in {FIRST}; the fi"),
    "custom code": (
        lambda p: make(p, {"auto_map": {"AutoModel": "modeling_x.X"}}),
        "received custom code (modeling_x.X), which is not run",
    ),
    "several modalities": (
        lambda p: make(p, {"vision_config": {"a": 1}, "text_config": {"model_type": "gemma3_text"}}),
        "received one of several modalities (vision_config, text_config); its text part is a 'gemma3_text'",
    ),
    "sound": (lambda p: make(p, {"audio_config": {"a": 1}}), "received one of several modalities (audio_config)"),
    "quantised": (
        lambda p: make(p, {"quantization_config": {"quant_method": "gptq"}}),
        "received quantised ones (quant_method 'gptq'); give the folder of the model that they were made of",
    ),
    "rope": (lambda p: make(p, {"rope_scaling": {"rope_type": "spiral"}}), "rope_scaling: expected a rope_type out of"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_each_folder_that_cannot_be_loaded_is_refused_by_name(tmp_path: Path, fault: str) -> None:
    plant, want = FAULTS[fault]
    plant(make(tmp_path / "model"))
    said = told(tmp_path / "model")
    assert want in said and str(tmp_path / "model") in said


def test_a_path_that_is_no_folder_says_how_to_come_by_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert "fetch it by `hf download Qwen/Qwen3-0.6B --local-dir Qwen3-0.6B` and give" in told("Qwen/Qwen3-0.6B")
    assert "`hf download gpt2 --local-dir gpt2`" in told("gpt2")
    assert "expected a folder, received a path at which there is none; check" in told(tmp_path / "nowhere" / "else")
    make(tmp_path / "model")
    assert f"expected a folder, received a file; give the folder it is in, {tmp_path / 'model'}" in told(
        tmp_path / "model" / FIRST
    )


@pytest.mark.parametrize(
    ("files", "said"),
    [
        (
            {"pytorch_model.bin": b"x"},
            "LlamaForCausalLM as M; [x.from_pretrained('{0}').save_pretrained('{0}-safetensors')",
        ),
        ({"tf_model.h5": b"x"}, "received weights in tf_model.h5 alone; convert them once by: python -c"),
        ({"model-Q4.gguf": b"x"}, "received weights in model-Q4.gguf alone"),
        ({"training_args.bin": b"x"}, "received no weights; fetch them by `hf download NAME --local-dir {0}`"),
        ({"weights.safetensors": b"x"}, "or rename the file to model.safetensors if it is the whole model"),
    ],
)
def test_other_weights_come_with_the_command_that_converts_them(
    tmp_path: Path, files: dict[str, bytes], said: str
) -> None:
    make(tmp_path, {"architectures": ["LlamaForCausalLM"]}, {})
    (tmp_path / INDEX).unlink()
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    assert said.format(tmp_path) in told(tmp_path)


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
LONG = {"long_factor": [1.0], "short_factor": [1.0]}


@pytest.mark.parametrize(
    "config",
    [
        {"model_type": "llama", "rope_scaling": LLAMA3, "rope_theta": 500000.0},
        {"model_type": "llama", "rope_parameters": {**LLAMA3, "rope_theta": 500000.0}},
        {"model_type": "qwen2", "rope_scaling": {"type": "yarn", "factor": 4.0}},
        {"model_type": "llama", "rope_scaling": None},
        {"model_type": "phi3", "rope_scaling": {"type": "su", **LONG}, "original_max_position_embeddings": 64},
        {"model_type": "phi3", "rope_parameters": {"rope_type": "longrope", **LONG, "partial_rotary_factor": 0.5}},
        {
            "model_type": "gemma3_text",
            "rope_local_base_freq": 1e4,
            "rope_parameters": {"full_attention": {"rope_type": "linear", "factor": 8.0}, "sliding_attention": None},
        },
        {"model_type": "mistral", "rope_scaling": {"rope_type": "dynamic", "factor": 2.0}},
        {"model_type": "llama", "rope_parameters": {"rope_type": "proportional", "rope_theta": 1e4}},
        # Others check their own.
        {"model_type": "glm", "rope_scaling": {"rope_type": "spiral"}, "rope_ratio": 2},
    ],
)
def test_rope_that_is_known(config: dict[str, Any]) -> None:
    check_rope(config, "config.json")


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (
            {"rope_scaling": {"rope_type": "spiral"}},
            "expected a rope_type out of default, linear, dynamic, yarn, longrope",
        ),
        ({"rope_scaling": {"type": "su", **LONG}}, "received 'su'"),
        (
            {"rope_scaling": {**YARN, "finetuned": True}},
            "received 'finetuned', which transformers would ignore; remove",
        ),
        (
            {"rope_parameters": {"rope_type": "default", "factor": 8.0}},
            "received 'factor', which transformers would ign",
        ),
        ({"rope_scaling": {"rope_type": "linear"}}, "expected factor for rope_type 'linear', received no factor; take"),
        ({"rope_parameters": {"rope_type": "llama3", "factor": 8.0}}, "received no high_freq_factor, low_freq_factor"),
        ({"rope_ratio": 2.0}, "received 'rope_ratio', which transformers' class would ignore"),
        ({"rope_scaling": "linear"}, "expected an object at 'rope_scaling', received 'linear'"),
        (
            {"rope_parameters": {"full_attention": {"rope_type": "linear", "factor": 8}, "sliding": {}}},
            "expected rope_parameters by types of layers (full_attention), received 'sliding' beside them",
        ),
        (
            {"rope_parameters": {"full_attention": {}, "sliding_attention": {"rope_type": "spiral"}}},
            "config.json: rope_parameters.sliding_attention: expected a rope_type out of",
        ),
    ],
)
def test_rope_that_is_not_known_is_refused_by_name(config: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=r"config\.json") as raised:
        check_rope({"model_type": "llama", **config}, "config.json")
    assert said in str(raised.value)


def test_bytes_of_a_tensor() -> None:
    assert (
        TensorOnDisk("f", torch.bfloat16, (3, 5), 0).nbytes == 30 and TensorOnDisk("f", torch.bool, (), 0).nbytes == 1
    )
