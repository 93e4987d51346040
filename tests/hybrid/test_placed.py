"""Distributed layer: a model on a mesh as a whole again: its state on rank 0, whole tensors loaded, what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fusemesh.hybrid.layout import Layout
from fusemesh.hybrid.ranks.testing import RankPool
from tests.support.ranks import placed as ranks

pytestmark = pytest.mark.distributed


@pytest.mark.parametrize(
    ("layout", "kind"),
    [
        ("fsdp2 x tp2", "plain"),
        ("pp2", "translation-tied"),
        pytest.param("fsdp2 x tp2", "decoder", marks=pytest.mark.slow),
        pytest.param("pp2 x fsdp2", "translation-tied", marks=pytest.mark.slow),
        pytest.param("dp2 x tp2", "decoder-bias", marks=pytest.mark.slow),
        pytest.param("pp2 x tp2", "decoder", marks=pytest.mark.slow),
        pytest.param("tp4", "plain", marks=pytest.mark.slow),
    ],
)
def test_whole_states_go_out_and_in(rank_pool: RankPool, layout: str, kind: str) -> None:
    """To the bit and by the names of one process, where tied weights share memory; on rank 0 alone."""
    want = ranks.model_of(kind, 1).state_dict()
    (whole, loaded), *others = rank_pool.run(ranks.through_whole, layout, kind, ranks=Layout.parse(layout).world_size)
    assert whole.keys() == want.keys() and all(torch.equal(whole[name], x) for name, x in want.items())
    pointers = [[x.data_ptr() for x in state.values()] for state in (want, whole)]
    first, second = [[places.index(place) for place in places] for places in pointers]
    assert first == second
    assert loaded and all(found == {} and same for found, same in others)


def test_what_needs_a_whole_model_says_what_to_do(rank_pool: RankPool) -> None:
    for found in rank_pool.run(ranks.refused, ranks=2):
        assert "load_state_dict(model.state_dict())" in found["deepcopy"]
        for name in ("pickle", "save"):
            assert "save fusemesh.whole_state_dict(model), which every rank calls" in found[name]
        assert "size mismatch for norm.bias" in found["load"]
        assert "'embedding.weight' that differs on ranks 0, 1 from each other" in found["different"]
        for name in ("layer", "attention", "norm"):
            assert "copy.deepcopy: expected a whole model" in found[f"deepcopy of {name}"]
            assert "save fusemesh.whole_state_dict(model)" in found[f"save of {name}"]
        assert "expected a whole model, received FSDPPlain that is on a mesh already" in found["again"]
        assert "with 'layers' that" in found["inside"] or "with 'layers.0' that" in found["inside"]
        for name in ("jvp", "grad", "vmap", "forward_ad"):
            assert found[name].startswith("torch.func: expected a whole model under"), found[name]


def test_memory_for_a_model_on_meta_leaves_no_buffer_without_values(rank_pool: RankPool, tmp_path: Path) -> None:
    """Of those that no state dict holds; others are loaded."""
    for refused, kept, unfilled in rank_pool.run(ranks.filled, str(tmp_path), ranks=2):
        assert "received layers.0.attention.scale on meta, which FSDPPlain does not compute again" in refused
        assert "before parallelize()" in refused and torch.equal(kept, torch.arange(3.0))
        for call, told in unfilled.items():
            assert told.startswith(call) and "'embedding.weight' on meta; call model.to_empty(device=...)" in told
        assert len(unfilled) == 4 and not any(tmp_path.iterdir())


def test_a_rank_that_waits_says_so(rank_pool: RankPool, tmp_path: Path) -> None:
    first, _ = rank_pool.run(ranks.alone, str(tmp_path / "said"), ranks=2)
    assert len(first) == 1 and "rank 0 waits in whole_state_dict() or save_pretrained()" in first[0]
