"""Distributed layer: rows of several documents give the loss and the gradients of each document alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fusemesh.hybrid.hugging_face import packed
from fusemesh.hybrid.hugging_face.stages import as_trainable
from fusemesh.hybrid.layout import Layout
from fusemesh.hybrid.ranks.testing import RankPool
from tests.support.hugging_face import KeepDouble
from tests.support.ranks import packed as ranks

FP64 = 1e-12
NAMES = ("llama", "qwen2", "qwen3", "mistral", "gemma2", "gemma3", "phi3", "gpt2", "bert", "roberta")
NO_DROPOUT = {
    **{key: {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0} for key in ("bert", "roberta")},
    "gpt2": {"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0},
    "phi3": {"embd_pdrop": 0.0, "resid_pdrop": 0.0},
}


def changed(name: str) -> dict[str, Any]:
    return NO_DROPOUT.get(name, {})


def compare(found: list[Any], want: dict[str, Any], *, replicas: int) -> None:
    losses = torch.stack([one["loss"] for one in found])
    total = losses.sum() * replicas / len(found)
    torch.testing.assert_close(total, want["loss"], rtol=FP64, atol=0)
    gradients = found[0]["gradients"]
    norm = torch.stack([x.norm() for x in want["gradients"].values()]).norm()
    for name, right in want["gradients"].items():
        assert (gradients[name] - right).norm() <= FP64 * max(right.norm(), norm * 1e-3), name


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("text", "name", "recompute"),
    [
        ("single", "gemma2", "none"),
        ("pp2", "gpt2", "full"),
        *(
            pytest.param(text, name, recompute, marks=pytest.mark.slow)
            for name in NAMES
            for text in ("single", "fsdp2", "tp2", "pp2", "dp2 x tp2")
            # Backward computes the norms of the others in fp32 again.
            for recompute in (("none", "full") if name == "gpt2" else ("none",))
        ),
    ],
)
def test_a_row_is_its_documents(rank_pool: RankPool, text: str, name: str, recompute: str) -> None:
    layout = Layout.parse(text)
    found = rank_pool.run(ranks.learned, text, name, recompute, changed(name), ranks=layout.world_size)
    compare(found, ranks.alone(name, **changed(name)), replicas=layout.replicas)


def loss_of(model: Any, positions: torch.Tensor) -> torch.Tensor:
    tokens, targets, _ = ranks.rows()
    with KeepDouble(), torch.no_grad():
        found: torch.Tensor = model.loss(tokens, targets, positions=positions)
    return found


@pytest.mark.parametrize("name", ["bert", "roberta"])
@pytest.mark.parametrize("attention", ["fusemesh", "eager"])
def test_a_decoder_of_an_encoders_family_begins_at_its_own_first_position(name: str, attention: str) -> None:
    """RoBERTa's stands behind the padding token's number; also where transformers makes the mask of positions."""
    model = as_trainable(ranks.build(name, **changed(name)))
    model.set_attn_implementation(attention)
    torch.testing.assert_close(
        loss_of(model, ranks.rows()[2]), ranks.alone(name, **changed(name))["loss"], rtol=FP64, atol=0
    )


def test_a_leak_is_noticed() -> None:
    """One bound missing, and positions that go on: the loss is another."""
    model = as_trainable(ranks.build("llama"))
    _, _, positions = ranks.rows()
    want = ranks.alone("llama")["loss"]
    torch.testing.assert_close(loss_of(model, positions), want, rtol=FP64, atol=0)
    leaking = positions.clone()
    leaking[0, 9:] = torch.arange(9, 24)
    assert (loss_of(model, leaking) - want).abs() > 1e-4 * want


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_no_mask_is_made_but_for_dropout(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A mask of all ones, or none that transformers would make of positions, cannot switch the bounds off."""
    from fusemesh.integrations.transformers import interface

    seen: list[Any] = []
    attention = interface.packed_attention
    monkeypatch.setattr(
        interface, "packed_attention", lambda *args, **options: seen.append(args) or attention(*args, **options)
    )
    model = as_trainable(ranks.build(name, **changed(name)))
    _, _, positions = ranks.rows()
    loss_of(model, positions)
    assert len(seen) == model.config.num_hidden_layers
    bounds = seen[0][2]
    assert bounds["cu_seq_lens_q"].tolist() == [0, 9, 10, 24, 48, 53, 58, 63, 68, 72, 89, 95, 96]
    assert bounds["max_length_q"] == 24


@pytest.mark.parametrize(
    ("name", "rate"),
    [("llama", "attention_dropout"), ("gpt2", "attn_pdrop")]
    + [(name, "attention_probs_dropout_prob") for name in ("bert", "roberta")],
)
def test_attention_that_drops_weights_takes_the_mask(name: str, rate: str) -> None:
    """Where a document changes whose tokens are no targets, the loss of the others stays."""
    found = []
    for first in (7, 8):
        model = as_trainable(ranks.build(name, **{**changed(name), rate: 0.25})).train()
        tokens, targets, positions = ranks.rows()
        tokens[0, 0], targets[0, :9] = first, -100
        torch.manual_seed(0)
        with torch.no_grad():
            found.append(model.loss(tokens, targets, positions=positions))
    assert torch.equal(*found)


def test_a_row_begins_with_a_document() -> None:
    model = as_trainable(ranks.build("llama"))
    with pytest.raises(
        ValueError, match=r"positions: expected 0 at the beginning of each row.*received \[3, 3, 3, 3\]"
    ):
        loss_of(model, ranks.rows()[2] + 3)


def test_a_model_that_keeps_the_bounds_to_itself_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = as_trainable(ranks.build("llama"))
    original = packed.documents

    class Without:
        def __init__(self, *args: Any) -> None:
            self.block = original(*args)

        def __enter__(self) -> dict[str, Any]:
            given = self.block.__enter__()
            return {"position_ids": given["position_ids"]}

        def __exit__(self, *args: Any) -> None:
            self.block.__exit__(*args)

    monkeypatch.setattr(packed, "documents", Without)
    with pytest.raises(ValueError, match=r"cu_seq_lens_q: expected the bounds of the documents.*LlamaAttention"):
        loss_of(model, ranks.rows()[2])
