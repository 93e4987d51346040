"""Layer: application. The masks that the Hugging Face integration makes, and the None in place of some."""

from __future__ import annotations

import contextlib
import itertools
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import masking_utils

from fusemesh.integrations.transformers import interface as ours
from tests.support.hugging_face import FAMILIES, padding


@pytest.mark.parametrize("kind", ["causal", "sliding", "chunked"])
def test_no_mask_means_what_the_attention_takes_it_for(kind: str) -> None:
    """Every small case: None comes exactly where it should, and stands for the mask that transformers would make."""
    wholes = 0
    spans = itertools.product((1, 2, 5), (1, 2, 5, 8), (0, 1, 4, 7), (0, 1, 3))
    for size, (q_length, kv_length, q_offset, kv_offset) in itertools.product((1, 2, 4, 20), spans):
        function, local = masking_utils.causal_mask_function, None
        if kind == "sliding":
            function, local = masking_utils.sliding_window_causal_mask_function(size), size
        elif kind == "chunked":
            function = masking_utils.chunked_causal_mask_function(size, torch.zeros(2, dtype=torch.int64))
            local = size
        span = {"q_length": q_length, "kv_length": kv_length, "q_offset": q_offset, "kv_offset": kv_offset}
        arguments = {"batch_size": 2, "mask_function": function, "local_size": local, **span}
        mask = ours.attention_mask(**arguments)
        whole = masking_utils.sdpa_mask(**arguments, allow_is_causal_skip=False)
        aligned = q_offset + q_length == kv_offset + kv_length
        if mask is not None:
            assert torch.equal(mask, whole)
            hides = kind == "sliding" and size == 1 and kv_length > 1
            assert not aligned or kind == "chunked" or hides, arguments
            continue
        wholes += 1
        # What attention() does with None: the window only where the layer passes one, so never for chunked layers.
        ahead = torch.arange(kv_length)[None] - torch.arange(q_length)[:, None] - (kv_length - q_length)
        seen = (ahead <= 0) & (ahead > -size) if kind == "sliding" else ahead <= 0
        assert aligned and torch.equal(whole, seen.expand_as(whole)), arguments
    assert wholes > 10


def test_padding_and_deviations_make_the_whole_mask() -> None:
    base: dict[str, Any] = {"batch_size": 2, "q_length": 6, "kv_length": 6}
    causal = masking_utils.causal_mask_function
    assert ours.attention_mask(**base, mask_function=causal) is None
    padded = padding("left", 2, 6)
    assert padded is not None
    holes = masking_utils.and_masks(causal, lambda b, h, q, k: (q != 3) | (k != 1))
    for change in (
        {"attention_mask": padded.bool(), "mask_function": causal},
        {"attention_mask": torch.ones(2, 5, dtype=torch.bool), "mask_function": causal},
        {"allow_is_causal_skip": False, "mask_function": causal},
        {"mask_function": masking_utils.or_masks(causal, lambda b, h, q, k: k < 2)},
        {"use_vmap": True, "mask_function": holes},
    ):
        mask = ours.attention_mask(**base, **change)
        assert mask is not None
        assert torch.equal(mask, masking_utils.sdpa_mask(**{**base, **change, "allow_is_causal_skip": False}))


def test_padding_counts_where_the_keys_are() -> None:
    """A sliding cache holds the last keys only: padding before them hides nothing any more, padding among them does."""
    span: dict[str, Any] = {"batch_size": 2, "q_length": 1, "kv_length": 3, "q_offset": 5, "kv_offset": 3}
    for hidden, is_none in ((0, True), (2, True), (3, False), (5, False)):
        seen = torch.ones(2, 6, dtype=torch.bool)
        seen[1, hidden] = False
        assert (ours.attention_mask(**span, attention_mask=seen) is None) == is_none, hidden


@pytest.mark.parametrize("window", range(7))
def test_bidirectional_masks_are_left_out_where_they_hide_nothing(window: int) -> None:
    function = masking_utils.sliding_window_bidirectional_mask_function(window)
    arguments: dict[str, Any] = {"batch_size": 2, "q_length": 6, "kv_length": 6, "mask_function": function}
    arguments.update(local_size=window, allow_is_causal_skip=False)
    mask = ours.attention_mask(**arguments, allow_is_bidirectional_skip=True)
    whole = masking_utils.sdpa_mask(**arguments)
    assert whole.all() == (window >= 5)
    assert mask is None if window >= 5 else torch.equal(mask, whole)
    assert torch.equal(ours.attention_mask(**arguments), whole)


@pytest.mark.parametrize("mode", [torch.device("meta"), FakeTensorMode()], ids=["meta", "fake"])
@pytest.mark.parametrize("name", ["mistral", "llama"])
def test_a_model_without_values(name: str, mode: contextlib.AbstractContextManager[Any]) -> None:
    """Masks cannot be read there; their shapes can."""
    ours.register()
    with mode:
        model = FAMILIES[name].build("fusemesh")
        ids = torch.zeros(2, 9, dtype=torch.int64)
        for mask in (None, torch.ones(2, 9, dtype=torch.int64)):
            assert model(ids, attention_mask=mask).logits.shape[:2] == (2, 9)
