"""Distributed layer: Hugging Face folders loaded whole and on meshes, byte for byte as from_pretrained loads them."""

from __future__ import annotations

import itertools
import os
from pathlib import Path
from typing import Any

import pytest

transformers = pytest.importorskip("transformers", minversion="5.20")

import torch  # noqa: E402
from safetensors.torch import save_file  # noqa: E402

from fusemesh.hybrid.hugging_face import reading  # noqa: E402
from fusemesh.hybrid.hugging_face.folder import WEIGHTS  # noqa: E402
from fusemesh.hybrid.hugging_face.load import load_pretrained  # noqa: E402
from fusemesh.hybrid.layout import Layout  # noqa: E402
from fusemesh.hybrid.ranks.testing import RankPool  # noqa: E402
from tests.support.pretrained.folders import CAUSAL, PRETRAINED, make_folder  # noqa: E402
from tests.support.ranks import pretrained_load as ranks  # noqa: E402

ALL = tuple(PRETRAINED)
LAYOUTS = ("fsdp4", "tp4", "dp2 x tp2", "fsdp2 x tp2", "pp2 x tp2", "pp2 x fsdp2")


QUICK = ("qwen3", "gemma2", "gpt2", "t5", "marian")


class Folders(dict[str, Path]):
    """Folders by family, within one."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __missing__(self, name: str) -> Path:
        self[name] = make_folder(self.path / name, name)
        return self[name]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    """One of each family, of its first kind, made when it is asked for."""
    return Folders(tmp_path_factory.mktemp("folders"))


def every_kind() -> list[Any]:
    return [(name, kind) for name, family in PRETRAINED.items() for kind in family.kinds]


@pytest.mark.parametrize(
    "name",
    [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in PRETRAINED],
)
def test_a_whole_model_is_what_from_pretrained_gives(folders: Folders, name: str) -> None:
    check_whole(folders[name], PRETRAINED[name].kinds[0])


@pytest.mark.slow
@pytest.mark.parametrize(("name", "kind"), every_kind())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_kind_in_every_dtype(tmp_path: Path, name: str, kind: str, dtype: torch.dtype) -> None:
    check_whole(make_folder(tmp_path, name, kind, dtype=dtype), kind)


def check_whole(path: Path, kind: str) -> None:
    """Values, logits and ties to the bit, and no byte read twice."""
    want = getattr(transformers, kind).from_pretrained(path).eval()
    got = ranks.on_meta(str(path), kind, want.dtype).eval()
    # By name, too: what the class keeps in fp32.
    report = load_pretrained(got, path, dtype=want.dtype)
    assert ranks.differing(want, got) == []
    assert report.missing == report.unexpected == ()
    assert report.bytes_requested == sum(tensor.nbytes for tensor in ranks.read_folder(path).tensors.values())
    pointers = [[x.data_ptr() for x in model.state_dict().values()] for model in (want, got)]
    first, second = [[places.index(place) for place in places] for places in pointers]
    assert first == second
    ids = torch.arange(1, 9).repeat(2, 1)
    with torch.no_grad():
        outputs = [model(ids, **({"decoder_input_ids": ids} if "Seq2Seq" in kind else {})) for model in (want, got)]
    assert all(torch.equal(a, b) for a, b in zip(*(list(out.to_tuple())[:1] for out in outputs), strict=True))


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("layout", "names"),
    [
        ("fsdp2 x tp2", ("gpt2",)),
        ("pp2 x tp2", ("qwen3",)),
        *(pytest.param(layout, ALL, marks=pytest.mark.slow) for layout in LAYOUTS),
    ],
)
def test_on_a_mesh(rank_pool: RankPool, folders: Folders, layout: str, names: tuple[str, ...]) -> None:
    degrees = Layout.parse(layout)
    given = [(str(folders[name]), PRETRAINED[name].kinds[0]) for name in names]
    found = rank_pool.run(ranks.from_folders, layout, given, ranks=degrees.world_size)
    replicas = degrees.dp
    for name, loaded in zip(names, zip(*found, strict=True), strict=True):
        assert all(one.wrong == [] for one in loaded), name
        requested = sum(one.report.bytes_requested for one in loaded)
        assert loaded[0].nbytes <= requested / replicas <= 1.05 * loaded[0].nbytes, name
        assert all(one.report.missing == one.report.unexpected == () for one in loaded), name


@pytest.mark.distributed
@pytest.mark.parametrize("names", [("gemma3",), pytest.param(ALL, marks=pytest.mark.slow)])
def test_fp32_weights_computed_in_bf16_are_from_pretraineds_bf16(
    tmp_path: Path, rank_pool: RankPool, names: tuple[str, ...]
) -> None:
    """To the bit, also where a class rounds a number to its weights' dtype, as Gemma the scale of its embeddings."""
    given = [(tmp_path / name, name, PRETRAINED[name].kinds[0]) for name in names]
    cases = [(str(make_folder(path, name, kind, dtype=torch.bfloat16)), kind) for path, name, kind in given]
    for found in rank_pool.run(ranks.in_bf16, "fsdp2", cases, ranks=2):
        assert dict(zip(names, found, strict=True)) == dict.fromkeys(names, 0.0)


def test_bytes_are_asked_for_by_explicit_reads_and_counted(folders: Folders, monkeypatch: pytest.MonkeyPatch) -> None:
    """No byte twice, none of a header again, nothing mapped."""
    asked: list[tuple[int, int]] = []

    def counted(file: int, buffers: Any, offset: int) -> int:
        asked.append((offset, sum(map(len, buffers))))
        return preadv(file, buffers, offset)

    preadv = os.preadv
    folder = ranks.read_folder(folders["gpt2"])
    model = ranks.on_meta(str(folder.path), PRETRAINED["gpt2"].kinds[0])
    monkeypatch.setattr(os, "preadv", counted)
    report = load_pretrained(model, folder)
    assert sum(length for _, length in asked) == report.bytes_requested == folder.nbytes
    assert min(offset for offset, _ in asked) >= min(tensor.offset for tensor in folder.tensors.values())
    assert ".safetensors" not in Path("/proc/self/maps").read_text()


def test_short_reads_are_gone_on_with_and_an_end_is_an_error(folders: Folders, monkeypatch: pytest.MonkeyPatch) -> None:
    preadv, at_most = os.preadv, [100]
    monkeypatch.setattr(os, "preadv", lambda file, buffers, at: preadv(file, [b[: at_most[0]] for b in buffers], at))
    kind = PRETRAINED["qwen2"].kinds[0]
    model = ranks.on_meta(str(folders["qwen2"]), kind)
    load_pretrained(model, folders["qwen2"])
    assert ranks.differing(getattr(transformers, kind).from_pretrained(folders["qwen2"]), model) == []
    at_most[0] = 0
    with pytest.raises(ValueError, match=r"more bytes at \d+, received the end of the file; it has changed since"):
        load_pretrained(model, folders["qwen2"])


def test_a_dtype_is_asked_for(folders: Folders) -> None:
    """The model's class keeps some in fp32, and rotary frequencies are never cast."""
    for name, dtype in (("t5", torch.float16), ("qwen2", torch.bfloat16)):
        kind = PRETRAINED[name].kinds[0]
        want = getattr(transformers, kind).from_pretrained(folders[name], dtype=dtype)
        got = ranks.on_meta(str(folders[name]), kind)
        load_pretrained(got, folders[name], dtype=dtype)
        assert ranks.differing(want, got) == []


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_any_part_of_any_tensor(
    tmp_path: Path, transposed: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows, columns, boxes, of one to four dimensions, in pieces smaller than a row and larger."""
    values = {str(n): torch.rand([3, 5, 2, 4][:n]) for n in range(5)}
    values["empty"] = torch.rand(0, 3)
    save_file(values, tmp_path / WEIGHTS)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    folder = ranks.read_folder(tmp_path)
    monkeypatch.setattr(reading, "STAGING", 40)
    with reading.open_folder(folder) as reader:
        for name, want in values.items():
            if transposed and want.dim() != 2:
                continue
            for part in itertools.product(*([slice(0, n), slice(1, n), slice(0, n - 1)] for n in want.shape)):
                piece = want[part].t() if transposed else want[part]
                own = torch.full(piece.shape, -1.0, dtype=dtype)
                reader.read(folder.tensors[name], part, own, transposed=transposed)
                assert torch.equal(own, piece.to(dtype))
                assert reader.equals(folder.tensors[name], part, own, transposed=transposed)
                if own.numel():
                    own.view(-1)[-1] += 1
                    assert not reader.equals(folder.tensors[name], part, own, transposed=transposed)


@pytest.mark.distributed
@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the peak is read from Linux's /proc")
@pytest.mark.parametrize("layout", ["fsdp2", "tp2", "fsdp2 x tp2"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_peak_memory_is_a_ranks_own_part_and_one_tensor(
    tmp_path: Path, rank_pool: RankPool, layout: str, dtype: torch.dtype
) -> None:
    """Tied embeddings, of which other systems load the whole in every rank; read in its own dtype and cast."""
    sizes = {"vocab_size": 40000, "hidden_size": 512, "intermediate_size": 2048, "num_attention_heads": 8}
    make_folder(tmp_path, "qwen3", dtype=torch.bfloat16, shard="30MB", head_dim=64, num_key_value_heads=1, **sizes)
    degrees = Layout.parse(layout)
    found = rank_pool.run(ranks.peak, layout, str(tmp_path), CAUSAL, dtype, ranks=degrees.world_size)
    nbytes = ranks.read_folder(tmp_path).nbytes
    assert sum(requested for _, _, requested in found) <= 1.05 * nbytes
    for peak, own, requested in found:
        # Beside them staging, and what torch and the allocator keep.
        assert peak <= own + 40000 * 512 * 2 + 4 * reading.STAGING, (peak, own)
        assert requested <= 1.1 * nbytes / degrees.world_size
