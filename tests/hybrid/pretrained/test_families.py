"""Layer: hybrid, in one process. Of each family: what is cut, its table, and where cut tensors stand on disk."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from fusemesh.hybrid.apply import capabilities_of
from fusemesh.hybrid.hugging_face.families import FAMILIES, RankConfig, find_family, prepare, tensor_table
from fusemesh.hybrid.hugging_face.sources import Source, from_disk, sources_of, to_disk
from fusemesh.hybrid.tensor.fused import FusedColumns
from fusemesh.hybrid.tensor.patterns import matches
from tests.support.pretrained.folders import CAUSAL, PRETRAINED, make_model

ALL = [(name, kind) for name, family in PRETRAINED.items() for kind in family.kinds]
CUT = [
    ("gpt2", {}),
    ("gpt2", {"add_cross_attention": True}),
    ("phi3", {}),
    ("phi3", {"num_attention_heads": 5, "num_key_value_heads": 1}),
]


def test_families_are_those_of_the_tests() -> None:
    assert [family.name for family in FAMILIES] == list(PRETRAINED)
    for model in (nn.Linear(1, 1), nn.Module()):
        assert find_family(model) is None and tensor_table(model) is None
        prepare(model)


@pytest.mark.parametrize(("name", "kind"), ALL)
def test_a_table_names_every_matrix_of_the_blocks_and_every_vocabulary(name: str, kind: str) -> None:
    with torch.device("meta"):
        model = make_model(name, kind)
    family = find_family(model)
    assert family is not None and family.name == name and capabilities_of(model).tp
    prepare(model)
    styles = tensor_table(model) or {}
    for module_name, module in model.named_modules():
        found = {style for pattern, style in styles.items() if matches(pattern, module_name)}
        is_vocabulary = getattr(module, "weight", torch.empty(0, device="meta")).shape[:1] == (89,)
        in_block = any(part.isdigit() for part in module_name.split("."))
        assert type(module).__name__ != "Conv1D"
        if is_vocabulary:
            assert found == {"vocab"}, module_name
        elif in_block and isinstance(module, nn.Linear):
            assert len(found) == 1 and found <= {"column", "row"}, module_name
        elif in_block and isinstance(module, nn.Embedding):
            assert found == {"features"}, module_name


@pytest.mark.parametrize(("name", "changed"), CUT)
def test_what_is_cut_computes_the_same_and_says_where_it_stands(name: str, changed: dict[str, Any]) -> None:
    plain = make_model(name, **changed).double()
    disk = {key: x.clone() for key, x in plain.state_dict().items()}
    model = copy.deepcopy(plain)
    prepare(model)
    modules = list(model.modules())
    prepare(model)
    assert all(x is y for x, y in zip(modules, model.modules(), strict=True)), "a second time changes nothing"

    state, sources = model.state_dict(), sources_of(model)
    assert state.keys() == sources.keys() and any(source.length for source in sources.values())
    for key, value in state.items():
        assert torch.equal(value, sources[key].of(disk[sources[key].name])), key
        if sources[key] != Source(key):
            # Neither a view of the whole, nor tied to another part.
            assert value.is_contiguous() and value.untyped_storage().nbytes() == 8 * value.numel(), key
    assert {source.name for source in sources.values()} == disk.keys()
    for found, want in (
        (to_disk(state, sources), disk),
        (from_disk(disk, sources), state),
        (from_disk(state, sources), state),
    ):
        assert found.keys() == want.keys() and all(torch.equal(found[key], x) for key, x in want.items())

    ids = torch.arange(14).view(2, 7) + 3
    inputs = {}
    if "add_cross_attention" in changed:
        inputs["encoder_hidden_states"] = torch.randn(2, 5, plain.config.hidden_size, dtype=torch.float64)
    want = plain(ids, **inputs).logits
    found = model(ids, **inputs).logits
    assert (found - want).abs().max() <= 1e-13 * want.abs().max()


@pytest.mark.parametrize(("name", "changed"), CUT)
def test_cutting_keeps_meta_dtype_mode_and_frozen_weights(name: str, changed: dict[str, Any]) -> None:
    with torch.device("meta"):
        model = make_model(name, **changed).bfloat16().train()
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    prepare(model)
    made = make_model(name, **changed)
    prepare(made)
    assert {key: x.shape for key, x in model.state_dict().items()} == {k: x.shape for k, x in made.state_dict().items()}
    for key, parameter in model.named_parameters():
        assert parameter.is_meta and parameter.dtype == torch.bfloat16 and not parameter.requires_grad, key
    fused = [module for module in model.modules() if isinstance(module, FusedColumns)]
    assert fused and all(module.training for module in model.modules())
    assert all(parameter.requires_grad for parameter in made.parameters())


def test_a_config_that_does_not_fit_is_refused() -> None:
    model = make_model("phi3")
    model.model.layers[1].self_attn.num_key_value_heads = 1
    with pytest.raises(ValueError, match=r"expected 60 output features of model\.layers\.1\.self_attn\.qkv_proj"):
        prepare(model)


def test_a_ranks_config_follows_the_models() -> None:
    config = make_model("phi3", CAUSAL).config
    own = copy.deepcopy(RankConfig(config, num_attention_heads=2))
    assert (own.num_attention_heads, config.num_attention_heads) == (2, 4)
    own = RankConfig(config, num_attention_heads=2)
    config.sliding_window = 3
    assert own.sliding_window == 3
    with pytest.raises(AttributeError):
        own.no_such_key  # noqa: B018
