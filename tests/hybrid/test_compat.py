"""Layer: hybrid. Each private name of torch and transformers is there and behaves as this floor relies on.

A failure names what is gone; ``fusemesh.hybrid.compat.PRIVATE`` says what it was for and what to do.
"""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from fusemesh.hybrid import compat
from fusemesh.hybrid.hugging_face.plans import HUGGING_FACE
from fusemesh.hybrid.ranks.testing import RankPool
from tests.support.private_names import private_names
from tests.support.ranks import compat as ranks

HYBRID = Path(__file__).resolve().parent.parent.parent / "hybrid"


def gone(name: str, found: object) -> str:
    """Return the message of a failed check: the name, what to do, and what was seen."""
    return f"{name}, used for {compat.PRIVATE[name].used_for}, is gone or behaves otherwise in torch \
{torch.__version__}: {compat.PRIVATE[name].when_gone}. Seen: {found}"


def test_private_names_stand_in_compat_alone_and_in_its_table() -> None:
    found = private_names(HYBRID)
    assert [use for use in found if use.file != "compat.py"] == []
    used = {use.name for use in found}
    # In code both are strings.
    assert used and used | {"functools._lru_cache_wrapper", "._orig_mod"} == set(compat.PRIVATE)


def test_names_within_compiled_modules() -> None:
    model = nn.Sequential(nn.Sequential(nn.Linear(2, 2)))
    want = [name for name, _ in model.named_modules()]
    model[0] = torch.compile(model[0])  # type: ignore[assignment]
    found = list(dict.fromkeys(compat.without_compiled(name) for name, _ in torch.compile(model).named_modules()))
    assert found == want, gone("._orig_mod", found)


def test_the_oldest_torch_that_is_allowed_was_tried() -> None:
    text = (HYBRID.parent / "pyproject.toml").read_text()
    assert f'"torch>={compat.TRIED["torch"][0].rpartition(".")[0]}"' in text


def test_the_class_of_cached_functions() -> None:
    name = "functools._lru_cache_wrapper"
    assert isinstance(functools.cache(len), functools._lru_cache_wrapper), gone(name, type(functools.cache(len)))


def test_the_attention_of_a_model() -> None:
    transformers = pytest.importorskip("transformers")
    sizes = {
        "hidden_size": 8,
        "num_attention_heads": 2,
        "num_hidden_layers": 1,
        "intermediate_size": 8,
        "vocab_size": 9,
    }
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes))
    model.set_attn_implementation("eager")
    assert compat.attention_of(model.config) == "eager", gone("._attn_implementation", model.config)


def test_parameters_of_a_module() -> None:
    module, name = nn.Linear(2, 2, bias=False), "._parameters"
    held = compat.parameters_of(module)
    assert held["weight"] is module.weight, gone(name, held)
    held["weight"] = plain = torch.eye(2) * 3
    x = torch.ones(1, 2)
    assert module.weight is plain and torch.equal(module(x), 3 * x), gone(name, module(x))


def test_a_module_with_other_children() -> None:
    """Parameters and buffers are both modules', whichever is given others."""
    module, name = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)), "._modules"
    module.register_buffer("table", torch.zeros(2))
    made = compat.with_children(module, {"1": nn.Identity()}, {"training": False})
    x = torch.ones(1, 2)
    assert torch.equal(made(x), module[0](x)) and made[0] is module[0], gone(name, made)
    assert isinstance(module[1], nn.Linear) and module.training and not made.training, gone(name, module)
    module.to_empty(device="meta")
    assert made.table.is_meta, gone(name, made.table)


def test_what_a_hugging_face_models_class_says_of_folders() -> None:
    transformers = pytest.importorskip("transformers", minversion="5.20")
    sizes = {"vocab_size": 7, "d_model": 4, "d_kv": 2, "d_ff": 6, "num_layers": 1, "num_heads": 2}
    with torch.device("meta"):
        t5 = transformers.T5ForSequenceClassification(transformers.T5Config(**sizes, num_labels=3))
        heads = {"encoder_attention_heads": 1, "decoder_attention_heads": 1, "decoder_start_token_id": 0}
        marian = transformers.MarianMTModel(
            transformers.MarianConfig(vocab_size=7, d_model=4, pad_token_id=0, eos_token_id=0, **heads)
        )
    tied = compat.tied_weights(t5)
    name = "transformer.encoder.embed_tokens.weight"
    assert tied[name] == "transformer.shared.weight", gone(".all_tied_weights_keys", tied)
    compat.untie(t5, name)
    assert name not in compat.tied_weights(t5) and compat.tied_weights(nn.Linear(1, 1)) == {}
    lacking = compat.may_be_missing(marian)
    assert "model.encoder.embed_positions.weight" in lacking, gone("._keys_to_ignore_on_load_missing", lacking)
    more = compat.may_be_unexpected(t5)
    assert any("EncDecAttention" in pattern for pattern in more), gone("._keys_to_ignore_on_load_unexpected", more)
    assert compat.kept_in_fp32(t5, torch.float16) == ["wo"], gone("._keep_in_fp32_modules", t5)
    assert compat.kept_in_fp32(t5, torch.bfloat16) == compat.kept_in_fp32(t5, torch.float32) == []


def test_one_tensor_is_drawn_by_a_hugging_face_models_class() -> None:
    """T5's draws a head's where the head's parent is; all else stays as it is, and on meta."""
    transformers = pytest.importorskip("transformers", minversion="5.20")
    sizes = {"vocab_size": 7, "d_model": 64, "d_kv": 2, "d_ff": 6, "num_layers": 1, "num_heads": 2}
    with torch.device("meta"):
        model = transformers.T5ForSequenceClassification(transformers.T5Config(**sizes, num_labels=3))
    held = dict(model.named_parameters())
    value, name = torch.zeros(64, 64), "classification_head.dense.weight"
    torch.manual_seed(0)
    compat.initial_value(model, name, value, {})
    assert abs(value.std().item() - 64**-0.5) < 0.01, gone("._init_weights", value)
    state = torch.get_rng_state()
    compat.initial_value(model, "classification_head.dense.bias", torch.ones(64), {})
    assert torch.equal(state, torch.get_rng_state()), gone("._is_hf_initialized", "others were drawn, too")
    assert all(held[key] is x and x.is_meta for key, x in model.named_parameters()), gone("._buffers", held)


def test_the_plan_of_a_hugging_face_model() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=16, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2
    )
    with torch.device("meta"):
        model: Any = transformers.LlamaForCausalLM(config)
    plan = compat.hugging_face_plan(model) or {}
    assert plan.get("model.layers.*.self_attn.q_proj") == "colwise", gone("._tp_plan", plan)
    assert set(plan.values()) <= set(HUGGING_FACE), gone("._tp_plan", plan)
    assert compat.hugging_face_plan(nn.Linear(1, 1)) is None


def test_buffers_that_a_hugging_face_model_computes() -> None:
    """Of the module alone; its parameters are not drawn anew."""
    transformers = pytest.importorskip("transformers")
    sizes = {"vocab_size": 16, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "head_dim": 4}
    model: Any = transformers.Gemma2ForCausalLM(transformers.Gemma2Config(**sizes, num_attention_heads=2))
    want = {name: x.clone() for name, x in (*model.named_buffers(), *model.named_parameters())}
    for name, buffer in list(model.named_buffers()):
        buffer.fill_(7)
        compat.initialize_hugging_face(model, name.rpartition(".")[0])
    found = dict((*model.named_buffers(), *model.named_parameters()))
    wrong = [name for name, x in want.items() if not torch.equal(found[name], x)]
    assert not wrong and found.keys() == want.keys(), gone("._init_weights", wrong)
    compat.initialize_hugging_face(nn.Linear(1, 1), "")


def test_what_a_hugging_face_model_saves_under_which_names() -> None:
    """Names that are left out, names that loading ties again, and models of which other tensors are written."""
    transformers = pytest.importorskip("transformers")
    sizes = {"encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 4, "decoder_ffn_dim": 4, "d_model": 4}
    heads = {"encoder_attention_heads": 1, "decoder_attention_heads": 1}
    config = transformers.MarianConfig(vocab_size=8, max_position_embeddings=8, pad_token_id=0, **sizes, **heads)
    with torch.device("meta"):
        model: Any = transformers.MarianMTModel(config)
        mixtral = transformers.MixtralConfig(
            vocab_size=8, hidden_size=4, intermediate_size=4, num_hidden_layers=1, num_attention_heads=1
        )
        experts: Any = transformers.MixtralForCausalLM(mixtral)
    found = compat.names_not_saved(model)
    assert "model.encoder.embed_positions.weight" in found, gone("._keys_to_ignore_on_save", found)
    names = ("model.shared.weight", "model.encoder.embed_tokens.weight", "lm_head.weight")
    assert [compat.is_tied_again(model, name) for name in names] == [False, True, True]
    older: Any = nn.Module()
    older._tied_weights_keys = [r"head\.weight"]
    assert compat.is_tied_again(older, "head.weight") and not compat.is_tied_again(older, "body.weight")
    written = compat.names_when_saved(model, model.state_dict())
    assert written is not None and all(name == other for name, other in written.items())
    if int(transformers.__version__.split(".")[0]) >= 5:
        assert compat.names_when_saved(experts, experts.state_dict()) is None
    model._hf_peft_config_loaded = True
    assert compat.names_when_saved(model, model.state_dict()) is None, gone("._hf_peft_config_loaded", written)


def test_what_is_imported_before_ranks_are_forked() -> None:
    """Nothing without DTensor; with it the module that an operation would import, which starts no thread."""
    script = """
import os, sys
from fusemesh.hybrid import compat
compat.import_before_fork()
assert "torch" not in sys.modules
import torch.distributed.tensor
compat.import_before_fork()
print("torch._dynamo" in sys.modules, len(os.listdir("/proc/self/task")) if os.path.isdir("/proc/self/task") else 1)
"""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment, timeout=120)
    assert done.stdout.split() == ["True", "1"], gone("torch._dynamo", done.stdout + done.stderr)


def test_the_environment_that_torchrun_makes() -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--rdzv-id", "seven", "--no-python"]
    script = "import json, os; print(json.dumps(dict(os.environ)))"
    done = subprocess.run([*command, sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    made = json.loads(done.stdout)
    for name in ("TORCHELASTIC_USE_AGENT_STORE", "TORCHELASTIC_RUN_ID", "TORCHELASTIC_RESTART_COUNT"):
        assert name in made, gone(name, sorted(key for key in made if "TORCH" in key))
    assert made["TORCHELASTIC_USE_AGENT_STORE"] == "True", gone("TORCHELASTIC_USE_AGENT_STORE", made)
    assert made["TORCHELASTIC_RESTART_COUNT"] == "0", gone("TORCHELASTIC_RESTART_COUNT", made)


def test_the_environment_is_read_as_it_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("TORCHELASTIC_")]:
        monkeypatch.delenv(name)
    assert not compat.agent_serves_store() and compat.run_id() == "/0"
    for name, value in compat.served_run("call3").items():
        monkeypatch.setenv(name, value)
    assert compat.agent_serves_store() and compat.run_id() == "call3/0"
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "2")
    assert compat.run_id() == "call3/2"


@pytest.mark.distributed
def test_advice_on_flattening_axes(rank_pool: RankPool) -> None:
    name = "torch.distributed.tensor._redistribute"
    for plain, silenced in rank_pool.run(ranks.advice):
        assert any("suboptimal" in text for text in plain), gone(name, plain)
        assert silenced == [], gone(name, silenced)


@pytest.mark.distributed
@pytest.mark.skipif(not os.path.isdir("/proc/self/task"), reason="counts threads as Linux tells them")
@pytest.mark.xfail(torch.__version__.startswith("2.11."), reason="meshes are kept elsewhere, too", strict=True)
def test_caches_that_keep_meshes(rank_pool: RankPool) -> None:
    name = "torch.distributed.tensor.debug._clear_sharding_prop_cache"
    for before, kept, after in rank_pool._ranks.call(ranks.free_meshes):
        assert kept > before, f"{name} is not needed any more in torch {torch.__version__}: nothing keeps a mesh"
        assert after <= before + 3, gone(name, f"{before} threads, with a mesh {kept}, then {after}")
