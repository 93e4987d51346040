"""Private names of torch and transformers: each is still there, and does what src/fusemesh/compat.py takes it for.

Layer: one process. A test that fails here names what a new version has taken away.
"""

from __future__ import annotations

import inspect
import sys
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fusemesh import compat
from fusemesh.integrations.pytorch import signatures
from tests.support.private_names import ROOT, private_names


def test_private_names_stand_in_compat_alone() -> None:
    found = private_names(ROOT / "src" / "fusemesh")
    assert [use for use in found if use.file != "compat.py"] == []
    assert {"torch._foreach_norm"} <= {use.name for use in found}


@pytest.mark.parametrize("path", [compat.FUSED_ATTENTION, compat.FUSED_ENCODER_LAYER], ids=lambda path: path.shown)
def test_torch_nn_calls_its_fused_path_by_this_name(path: compat.FusedPath, monkeypatch: pytest.MonkeyPatch) -> None:
    called = []
    original = getattr(torch, path.name)
    monkeypatch.setattr(torch, path.name, lambda *args, **kwargs: called.append(path) or original(*args, **kwargs))
    x = torch.randn(2, 3, 8)
    with torch.inference_mode():
        if path is compat.FUSED_ATTENTION:
            nn.MultiheadAttention(8, 2, batch_first=True).eval()(x, x, x)
        else:
            nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()(x)
    assert called == [path]


def test_arguments_are_those_of_multi_head_attention_forward() -> None:
    parameters = inspect.signature(F.multi_head_attention_forward).parameters
    assert tuple(parameters) == signatures.MultiHeadAttention._fields
    defaults = {name: p.default for name, p in parameters.items() if p.default is not p.empty}
    assert defaults == signatures.MultiHeadAttention._field_defaults


@pytest.mark.parametrize(
    ("path", "arguments"),
    [
        (compat.FUSED_ATTENTION, signatures.FusedAttention),
        (compat.FUSED_ENCODER_LAYER, signatures.FusedEncoderLayer),
    ],
    ids=lambda value: getattr(value, "shown", ""),
)
def test_arguments_are_those_of_the_fused_path(path: compat.FusedPath, arguments: Any) -> None:
    schema = getattr(torch.ops.aten, path.name).default._schema.arguments
    assert tuple(argument.name for argument in schema) == arguments._fields
    defaults = {argument.name: argument.default_value for argument in schema if argument.has_default_value()}
    assert defaults == arguments._field_defaults


def test_tracing_tensors_stand_in_torch_subclasses() -> None:
    seen = []

    def f(x: torch.Tensor) -> torch.Tensor:
        seen.append(compat.is_tracing_tensor(type(x)))
        return x + 1

    torch.export.export(_Calls(f), (torch.zeros(2),), strict=False)
    assert seen[0] is True
    assert not compat.is_tracing_tensor(torch.Tensor) and not compat.is_tracing_tensor(nn.Parameter)


class _Calls(nn.Module):
    def __init__(self, function: object) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.function(x)  # type: ignore[operator]


def test_foreach_norm() -> None:
    tensors = [torch.randn(3, 4), torch.randn(5)]
    for found, x in zip(compat.norms(tensors), tensors, strict=True):
        torch.testing.assert_close(found, x.norm())


@pytest.mark.parametrize("flag", [0.0, 1.0])
def test_found_inf_skips_a_fused_step(flag: float) -> None:
    x = nn.Parameter(torch.ones(3))
    optimizer = torch.optim.AdamW([x], lr=0.1, fused=True)
    compat.skip_steps_where(optimizer, torch.tensor(flag))
    x.grad = torch.ones(3)
    optimizer.step()
    assert torch.equal(x.detach(), torch.ones(3)) == bool(flag)


# transformers


def test_causal_mask_function() -> None:
    pytest.importorskip("transformers")
    found = compat.causal_mask_function()
    q, k = torch.arange(3)[:, None], torch.arange(3)[None]
    assert torch.equal(found(0, 0, q, k), k <= q)


def test_bidirectional_mask_function() -> None:
    transformers = pytest.importorskip("transformers")
    found = compat.bidirectional_mask_function()
    assert found is not None or int(transformers.__version__.partition(".")[0]) < 5
    if found is not None:
        assert torch.as_tensor(found(0, 0, torch.tensor(1), torch.tensor(2))).item() is True


def test_sdpa_mask() -> None:
    pytest.importorskip("transformers")
    positions = {"q_length": 3, "q_offset": 0}
    from transformers.masking_utils import sdpa_mask

    if "cache_position" in inspect.signature(sdpa_mask).parameters:
        positions = {"cache_position": torch.arange(3)}
    found = compat.boolean_mask(
        batch_size=1,
        kv_length=3,
        mask_function=compat.causal_mask_function(),
        allow_is_causal_skip=False,
        allow_is_bidirectional_skip=False,
        **positions,
    )
    assert found is not None and torch.equal(found[0, 0], torch.ones(3, 3, dtype=torch.bool).tril())


def test_get_correct_attn_implementation_is_asked_before_a_model_is_built(monkeypatch: pytest.MonkeyPatch) -> None:
    transformers = pytest.importorskip("transformers")
    kind = transformers.PreTrainedModel
    monkeypatch.setattr(kind, "get_correct_attn_implementation", kind.get_correct_attn_implementation)
    asked = []

    def wrap(check):  # type: ignore[no-untyped-def]
        return lambda self, name, *args, **kwargs: asked.append(name) or check(self, name, *args, **kwargs)

    compat.wrap_implementation_check(wrap)
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    config = transformers.LlamaConfig(vocab_size=8, **sizes)
    config._attn_implementation = "eager"
    transformers.LlamaForCausalLM(config)
    assert "eager" in asked


def test_attention_registry() -> None:
    transformers = pytest.importorskip("transformers")
    assert compat.ATTENTION_REGISTRY in vars(sys.modules[transformers.LlamaForCausalLM.__module__])
