"""Distributed layer: Hugging Face folders loaded whole and on meshes, byte for byte as from_pretrained loads them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

transformers = pytest.importorskip("transformers", minversion="5.20")

import torch  # noqa: E402

from fusemesh.hybrid.hugging_face.load import load_pretrained  # noqa: E402
from fusemesh.hybrid.layout import Layout  # noqa: E402
from fusemesh.hybrid.ranks.testing import RankPool  # noqa: E402
from tests.support.pretrained.folders import PRETRAINED, make_folder  # noqa: E402
from tests.support.ranks import pretrained_load as ranks  # noqa: E402

WITH_TP = ("llama", "qwen2", "qwen3", "mistral", "gemma2", "gemma3")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One of each family, of its first kind."""
    at = tmp_path_factory.mktemp("folders")
    return {name: make_folder(at / name, name) for name in PRETRAINED}


def every_kind() -> list[Any]:
    return [(name, kind) for name, family in PRETRAINED.items() for kind in family.kinds]


@pytest.mark.parametrize("name", PRETRAINED)
def test_a_whole_model_is_what_from_pretrained_gives(folders: dict[str, Path], name: str) -> None:
    check_whole(folders[name], PRETRAINED[name].kinds[0])


@pytest.mark.slow
@pytest.mark.parametrize(("name", "kind"), every_kind())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_kind_in_every_dtype(tmp_path: Path, name: str, kind: str, dtype: torch.dtype) -> None:
    check_whole(make_folder(tmp_path, name, kind, dtype=dtype), kind)


def check_whole(path: Path, kind: str) -> None:
    """Values, logits and ties to the bit, and no byte read twice."""
    want = getattr(transformers, kind).from_pretrained(path).eval()
    got = ranks.on_meta(str(path), kind).to(want.dtype).eval()
    report = load_pretrained(got, path)
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
        ("fsdp4", ("t5",)),
        ("fsdp2 x tp2", ("qwen2",)),
        pytest.param("fsdp4", tuple(PRETRAINED), marks=pytest.mark.slow),
        *(pytest.param(layout, WITH_TP, marks=pytest.mark.slow) for layout in ("tp4", "dp2 x tp2", "fsdp2 x tp2")),
    ],
)
def test_on_a_mesh(rank_pool: RankPool, folders: dict[str, Path], layout: str, names: tuple[str, ...]) -> None:
    degrees = Layout.parse(layout)
    given = [(str(folders[name]), PRETRAINED[name].kinds[0]) for name in names]
    found = rank_pool.run(ranks.from_folders, layout, given, ranks=degrees.world_size)
    replicas = degrees.dp
    for name, loaded in zip(names, zip(*found, strict=True), strict=True):
        assert all(one.wrong == [] for one in loaded), name
        requested = sum(one.report.bytes_requested for one in loaded)
        assert loaded[0].nbytes <= requested / replicas <= 1.05 * loaded[0].nbytes, name
        assert all(one.report.missing == one.report.unexpected == () for one in loaded), name
