"""Layer: application. Which Hugging Face models attn_implementation="fusemesh" takes, in the installed version.

What other versions do is shown on models whose interface is taken away.
"""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
import transformers

import fusemesh
from fusemesh.integrations.transformers import interface as ours
from fusemesh.kernels import backends
from tests.support.hugging_face import ENCODER, FAMILIES, VOCABULARY, Family, padding, results, tokens

BLOOM = {"vocab_size": VOCABULARY, "hidden_size": 32, "n_layer": 1, "n_head": 2}
GPT1 = {"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 1, "n_head": 2}
# Models that compute attention themselves in every version so far; GPT-1 does not even ask for a mask.
WITHOUT_INTERFACE = {
    "BloomAttention": Family("BloomForCausalLM", "BloomConfig", BLOOM),
    "Attention": Family("OpenAIGPTLMHeadModel", "OpenAIGPTConfig", GPT1),
}


@pytest.fixture(autouse=True)
def registered() -> None:
    ours.register()
    backends.reset_call_counts()


@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_is_routed_or_refused_by_its_version(name: str) -> None:
    """Never built to run as it always did, and never a model's own error about an unknown name."""
    family = FAMILIES[name]
    if family.is_routed():
        inputs = tokens(), padding("left")
        with fusemesh.use_backend("reference"):
            actual = results(family.build("fusemesh"), *inputs)
        assert backends.call_counts() == {("attention_forward", "reference"): family.calls}
        want = results(family.build("eager"), *inputs)
        torch.testing.assert_close(actual["logits"], want["logits"], rtol=1e-5, atol=1e-5)
    else:
        with pytest.raises(ValueError, match=f"computes attention itself.*transformers {family.since} or later"):
            family.build("fusemesh")


@pytest.mark.parametrize("layer", WITHOUT_INTERFACE)
def test_models_without_an_attention_interface_are_refused(layer: str) -> None:
    family = WITHOUT_INTERFACE[layer]
    version = transformers.__version__.replace(".", r"\.")
    with pytest.raises(
        ValueError, match=rf"^attn_implementation: expected 'eager'.*; {layer} of transformers {version} computes"
    ):
        family.build("fusemesh")
    assert family.build("eager")(tokens()).logits.isfinite().all()


@pytest.mark.parametrize("name", ["bert", "t5"])
def test_an_older_version_is_told_which_one_routes_the_model(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As transformers 4.57 has them: without the name of the interface in the model's file."""
    family = FAMILIES[name]
    modeling = sys.modules[getattr(transformers, family.model).__module__]
    monkeypatch.delattr(modeling, "ALL_ATTENTION_FUNCTIONS", raising=False)
    with pytest.raises(
        ValueError, match=rf"{family.config}; .*routed; transformers {family.since} or later routes it$"
    ):
        family.build("fusemesh")


def test_a_subclass_in_a_file_of_its_own_is_routed_as_its_base_is() -> None:
    class Mine(transformers.LlamaForCausalLM):
        pass

    config = transformers.LlamaConfig(**FAMILIES["llama"].options)
    config._attn_implementation = "fusemesh"
    with fusemesh.use_backend("reference"), torch.no_grad():
        Mine(config)(tokens())
    assert backends.call_counts() == {("attention_forward", "reference"): 2}

    class Other(transformers.BloomForCausalLM):
        pass

    bloom: Any = transformers.BloomConfig(**BLOOM)
    bloom._attn_implementation = "fusemesh"
    with pytest.raises(ValueError, match="BloomAttention of transformers"):
        Other(bloom)


def test_a_model_of_several_routes_the_parts_that_can_be() -> None:
    """An encoder and a decoder in one: the class that joins them has no attention, and its parts ask for themselves."""
    sizes = {**ENCODER, "head_dim": None, "num_hidden_layers": 1}
    encoder = transformers.RobertaConfig(**sizes)
    decoder = transformers.GPT2Config(vocab_size=VOCABULARY, n_embd=64, n_layer=1, n_head=4, add_cross_attention=True)
    if not Family("", "", since="5.0").is_routed():
        pytest.skip("transformers 5.0 or later routes RoBERTa")
    config = transformers.EncoderDecoderConfig.from_encoder_decoder_configs(encoder, decoder)
    config._attn_implementation = "fusemesh"
    model = transformers.EncoderDecoderModel(config).eval()
    with fusemesh.use_backend("reference"), torch.no_grad():
        model(input_ids=tokens(), decoder_input_ids=tokens())
    assert backends.call_counts() == {("attention_forward", "reference"): 3}


def test_register_wraps_the_check_once_and_leaves_other_names_alone() -> None:
    check = transformers.PreTrainedModel.get_correct_attn_implementation
    ours.register()
    ours.register("fusemesh_too")
    assert transformers.PreTrainedModel.get_correct_attn_implementation is check
    family = WITHOUT_INTERFACE["BloomAttention"]
    with pytest.raises(ValueError, match="BloomAttention"):
        family.build("fusemesh_too")
    with pytest.raises(ValueError, match="unheard_of"):
        FAMILIES["llama"].build("unheard_of")
