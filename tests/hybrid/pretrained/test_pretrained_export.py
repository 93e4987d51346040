"""Layer: application, on gloo ranks and in one process. A model in any layout goes back into a Hugging Face folder."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers

from fusemesh.hybrid.hugging_face.export import export_pretrained
from fusemesh.hybrid.hugging_face.exports.target import MARKER
from fusemesh.hybrid.layout import Layout
from fusemesh.hybrid.ranks.testing import RankPool
from tests.support.pretrained.folders import PRETRAINED, make_folder
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
        ("fsdp4", SOME[2:]),
        *(
            pytest.param(layout, EVERY, marks=pytest.mark.slow)
            for layout in ("single", "fsdp4", "tp4", "dp2 x tp2", "fsdp2 x tp2")
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
