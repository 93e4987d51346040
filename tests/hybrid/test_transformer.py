"""Pure layer: the Transformer in one process, against Hugging Face's Llama, and by its contract."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from fusemesh.transformer import Transformer, TransformerConfig, heads
from fusemesh.transformer import config as configuration
from fusemesh.transformer.layers import rotary_table, rotate

CONFIG = TransformerConfig(
    vocab_size=37,
    hidden_size=48,
    num_layers=2,
    num_heads=6,
    num_kv_heads=2,
    intermediate_size=40,
    max_sequence_length=16,
    rope_theta=500.0,
    norm_eps=1e-5,
)


def llama(model: Transformer) -> torch.nn.Module:
    """Hugging Face's Llama with the weights of ``model``."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = model.config
    other = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=config.vocab_size,
            hidden_size=config.hidden_size,
            num_hidden_layers=config.num_layers,
            num_attention_heads=config.num_heads,
            num_key_value_heads=config.num_kv_heads,
            intermediate_size=config.intermediate_size,
            max_position_embeddings=config.max_sequence_length,
            rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
            rms_norm_eps=config.norm_eps,
            attention_bias=config.use_bias,
            mlp_bias=config.use_bias,
            tie_word_embeddings=config.tie_embeddings,
            attn_implementation="eager",
        )
    ).double()
    ours = dict(model.named_parameters())
    names = {"embedding.weight": "model.embed_tokens.weight", "norm.weight": "model.norm.weight"}
    if not config.tie_embeddings:
        names["head.weight"] = "lm_head.weight"
    for layer in range(config.num_layers):
        a, b = f"blocks.{layer}.", f"model.layers.{layer}."
        names[f"{a}attention_norm.weight"] = f"{b}input_layernorm.weight"
        names[f"{a}mlp_norm.weight"] = f"{b}post_attention_layernorm.weight"
        for ours_name, theirs in (("query", "q"), ("key", "k"), ("value", "v"), ("output", "o")):
            names[f"{a}attention.{ours_name}.weight"] = f"{b}self_attn.{theirs}_proj.weight"
        names[f"{a}mlp.gate.weight"] = f"{b}mlp.gate_proj.weight"
        names[f"{a}mlp.gate.weight_up"] = f"{b}mlp.up_proj.weight"
        names[f"{a}mlp.down.weight"] = f"{b}mlp.down_proj.weight"
    assert sorted(names) == sorted(ours)
    found = other.load_state_dict({theirs: ours[name].detach() for name, theirs in names.items()}, strict=False)
    assert not found.unexpected_keys and found.missing_keys == ["lm_head.weight"] * config.tie_embeddings
    return other


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_against_llama(backend: str, tied: bool) -> None:
    """Logits, loss and a gradient of an independent implementation with the same weights."""
    model = Transformer(dataclasses.replace(CONFIG, tie_embeddings=tied), backend, seed=5, dtype=torch.float64)
    with torch.no_grad():
        for number, parameter in enumerate(model.parameters()):
            generator = torch.Generator().manual_seed(number)
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator).double()
    other = llama(model)
    tokens = torch.randint(0, 37, (3, 16), generator=torch.Generator().manual_seed(0))
    targets = torch.roll(tokens, -1, dims=1)
    targets[:, -1] = -100
    targets[0, 3:7] = -100
    expected = other(tokens).logits
    # Llama computes its rotary angles in fp32, also in an fp64 model.
    torch.testing.assert_close(model(tokens), expected, rtol=1e-5, atol=1e-6)
    loss = torch.nn.functional.cross_entropy(expected.flatten(0, 1), targets.flatten(), reduction="sum")
    torch.testing.assert_close(model.loss(tokens, targets), loss, rtol=1e-6, atol=0)
    # With tied embeddings the sum of two: from where tokens enter, and from the logits.
    loss.backward()
    assert torch.equal(model.loss_and_gradients(tokens, targets, 7), model.loss(tokens, targets).detach())
    theirs = other.get_input_embeddings().weight.grad
    torch.testing.assert_close(model.embedding.weight.grad * 7, theirs, rtol=1e-4, atol=1e-6)


def test_rotary_positions() -> None:
    """A turn by the position: norms stay, position 0 is the identity, and scores depend on the distance alone."""
    torch.manual_seed(0)
    q, k = torch.randn(2, 1, 1, 3, 8, dtype=torch.float64).unbind(0)
    table = rotary_table(torch.arange(20), 8, 100.0, torch.float64)
    turned_q, turned_k = (rotate(x.expand(1, 20, 3, 8), table) for x in (q, k))
    torch.testing.assert_close(turned_q.norm(dim=-1), q.norm(dim=-1).expand(1, 20, 3))
    assert torch.equal(turned_q[:, :1], q)
    scores = torch.einsum("bqhd,bkhd->hqk", turned_q, turned_k)
    for distance in range(-19, 20):
        diagonal = scores.diagonal(distance, dim1=1, dim2=2)
        torch.testing.assert_close(diagonal, diagonal[:, :1].expand_as(diagonal))


def test_causal() -> None:
    """A later token changes no earlier logit."""
    model = Transformer(CONFIG, "torch", dtype=torch.float64)
    tokens = torch.randint(0, 37, (1, 12), generator=torch.Generator().manual_seed(0))
    changed = tokens.clone()
    changed[0, 8] = (tokens[0, 8] + 1) % 37
    a, b = model(tokens), model(changed)
    assert torch.equal(a[:, :8], b[:, :8]) and not torch.equal(a[:, 8:], b[:, 8:])


def test_the_same_seed_gives_the_same_weights() -> None:
    """In every dtype up to rounding, whatever torch's own generator did, and whatever the number of layers."""
    one = Transformer(CONFIG, seed=7)
    torch.manual_seed(123)
    two = Transformer(CONFIG, seed=7, dtype=torch.float64)
    deep = Transformer(dataclasses.replace(CONFIG, num_layers=4), seed=7)
    for (name, a), b in zip(one.named_parameters(), two.parameters(), strict=True):
        assert a.dtype == torch.float32 and b.dtype == torch.float64
        assert torch.equal(a.double(), b), name
        if not name.endswith(("output.weight", "down.weight")):
            assert torch.equal(a, deep.get_parameter(name)), name
    other = Transformer(CONFIG, seed=8)
    assert not torch.equal(one.head.weight, other.head.weight)
    assert not torch.equal(one.blocks[0].attention.query.weight, one.blocks[1].attention.query.weight)
    assert abs(one.embedding.weight.std().item() - 0.02) < 0.002
    assert abs(one.get_parameter("blocks.0.mlp.down.weight").std().item() - 0.01) < 0.001


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"vocab_size": 0}, "vocab_size: expected a positive integer, received 0"),
        ({"num_layers": 2.0}, "num_layers: expected a positive integer, received 2.0"),
        ({"num_heads": True}, "num_heads: expected a positive integer, received True"),
        ({"hidden_size": 50}, r"hidden_size: expected a multiple of 2 \* num_heads = 12.*received 50"),
        ({"num_kv_heads": 4}, "num_kv_heads: expected a divisor of num_heads = 6, received 4"),
        ({"rope_theta": 0}, "rope_theta: expected a positive number, received 0"),
        ({"tie_embeddings": 1}, "tie_embeddings: expected True or False, received 1"),
        ({"norm_eps": float("nan")}, "norm_eps: expected a positive number, received nan"),
        ({"output": "span"}, "output: expected tokens of architecture 'decoder', received 'span'"),
        ({"output": "words"}, "output: expected one of tokens, class, span, received 'words'"),
        ({"architecture": "encoder"}, "output: expected class or span of architecture 'encoder', received 'tokens'"),
        ({"architecture": "encoder", "output": "class"}, "num_classes: expected at least 2, received 0"),
        (
            {"architecture": "encoder", "output": "span", "tie_embeddings": True},
            "tie_embeddings: expected False with output 'span', received True",
        ),
    ],
)
def test_config_refuses(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(CONFIG, **change)


def test_inputs_that_the_model_does_not_read_are_refused() -> None:
    with pytest.raises(ValueError, match=r"inputs: expected none but lengths, target_tokens with output 'tokens', rec"):
        Transformer(CONFIG)(torch.zeros(1, 8, dtype=torch.long), span_starts=torch.ones(1, dtype=torch.long))


def test_tokens_refused() -> None:
    model = Transformer(CONFIG)
    with pytest.raises(ValueError, match=r"tokens: expected shape \[B, S\], received \(16,\)"):
        model(torch.zeros(16, dtype=torch.long))
    with pytest.raises(ValueError, match="tokens: expected at most max_sequence_length = 16 a sample, received 17"):
        model(torch.zeros(1, 17, dtype=torch.long))


def test_every_output_of_the_configuration_is_a_class() -> None:
    assert heads.OUTPUTS.keys() == configuration.OUTPUTS.keys()
