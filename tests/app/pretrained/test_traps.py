"""Layer: application. What a family's config switches on and off: a folder of it computes as from_pretrained does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

transformers = pytest.importorskip("transformers", minversion="5.20")

import torch  # noqa: E402

import fusemesh  # noqa: E402
from fusemesh.hybrid.hugging_face.load import load_pretrained  # noqa: E402
from fusemesh.pretrained.build import build  # noqa: E402
from fusemesh.pretrained.folder import AUTO_CLASSES  # noqa: E402
from tests.support.pretrained.folders import CAUSAL, PAIRS, make_folder, make_model  # noqa: E402

TASKS = {CAUSAL: "language_model", PAIRS: "translation"}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 16}
LINEAR = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}
LONG = {"rope_type": "longrope", "rope_theta": 10000.0, "short_factor": [1.5] * 5, "long_factor": [4.0] * 5}
TWO_BASES = {"full_attention": LINEAR, "sliding_attention": {"rope_type": "default", "rope_theta": 100.0}}
PHI3 = {"original_max_position_embeddings": 16, "max_position_embeddings": 64}
WINDOW = {"sliding_window": 5, "max_window_layers": 2}

# What is set, and what the model would be without it.
HEEDED: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("llama", {"rope_parameters": LLAMA3}, {}),
    ("llama", {"rope_parameters": LINEAR}, {}),
    ("qwen2", {"rope_parameters": YARN}, {}),
    ("phi3", {**PHI3, "rope_parameters": LONG}, PHI3),
    ("qwen2", {**WINDOW, "use_sliding_window": True}, {}),
    ("qwen2", {**WINDOW, "use_sliding_window": True}, {**WINDOW, "use_sliding_window": True, "max_window_layers": 0}),
    ("mistral", {}, {"sliding_window": None}),
    ("mistral", {}, {"sliding_window": 6}),
    ("gemma2", {}, {"query_pre_attn_scalar": 256}),
    ("gemma2", {"attn_logit_softcapping": 0.02}, {}),
    ("gemma2", {"final_logit_softcapping": 0.5}, {}),
    ("gemma2", {}, {"layer_types": ["full_attention"] * 4}),
    ("gemma3", {"layer_types": ["sliding_attention", "full_attention"] * 2, "rope_parameters": TWO_BASES}, {}),
    ("marian", {"scale_embedding": True}, {}),
    ("t5", {"tie_word_embeddings": False}, {}),
]  # fmt: skip
# Set, and of no effect.
INACTIVE: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("qwen2", {**WINDOW, "use_sliding_window": False}, {}),
    ("mistral", {"sliding_window": None}, {"sliding_window": 4096}),
    ("mistral", {"head_dim": None, "num_attention_heads": 4}, {"head_dim": 10}),
]  # fmt: skip


def outputs(model: Any, kind: str) -> torch.Tensor:
    """Logits of texts longer than the windows, and than what positions are scaled from."""
    ids = torch.randint(3, 80, (2, 24), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        found: torch.Tensor = model.eval()(ids, **({"decoder_input_ids": ids} if kind == PAIRS else {})).logits
    return found


def loaded(path: Path, kind: str) -> torch.Tensor:
    """As a run loads it: on meta, with our attention."""
    with fusemesh.use_backend("reference"):
        model, _ = build(str(path), TASKS[kind], dtype=torch.float32)
        load_pretrained(model, path)
        return outputs(model, kind)


def close(one: torch.Tensor, two: torch.Tensor) -> bool:
    return bool((one - two).norm() <= 1e-5 * two.norm())


# The others are slow tests.
QUICK = (HEEDED[0], HEEDED[8], INACTIVE[0])


@pytest.mark.parametrize(
    ("name", "changed", "without"),
    [case if case in QUICK else pytest.param(*case, marks=pytest.mark.slow) for case in HEEDED + INACTIVE],
)
def test_what_a_config_says_is_heeded(
    tmp_path: Path, name: str, changed: dict[str, Any], without: dict[str, Any]
) -> None:
    kind = PAIRS if name in ("t5", "marian") else CAUSAL
    assert AUTO_CLASSES[TASKS[kind]][0] == kind
    path = make_folder(tmp_path, name, kind, **changed)
    plain = getattr(transformers, kind).from_pretrained(path, attn_implementation="eager")
    want = outputs(plain, kind)
    assert close(loaded(path, kind), want)
    other = make_model(name, kind, **without)
    other.load_state_dict(plain.state_dict(), strict=name != "t5")
    assert close(outputs(other, kind), want) == ((name, changed, without) in INACTIVE), "it makes no difference"
