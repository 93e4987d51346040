"""Layer: application. accelerate() where nothing is computed yet: torch.compile's tables, meta and fake tensors."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

import fusemesh
from fusemesh import compat
from tests.support import fresh_process

PADDED = """
    import torch
    from torch import nn

    import fusemesh

    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(64, 4, 128, batch_first=True), 2).eval()
    x, pad = torch.randn(2, 5, 64), torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    with fusemesh.accelerate():
        want = model(x, src_key_padding_mask=pad)
    for block in (fusemesh.accelerate(), fusemesh.accelerate(), torch.enable_grad(), fusemesh.accelerate("reference")):
        torch.compiler.reset()
        with block:
            compiled = torch.compile(model, fullgraph=True, backend="eager")
            torch.testing.assert_close(compiled(x, src_key_padding_mask=pad), want)
"""


@pytest.mark.slow
def test_the_compiler_is_imported_inside_a_block() -> None:
    """Compiled in that block, in a second one, outside, and on a backend by name."""
    fresh_process.run(PADDED)


def test_the_compilers_table_is_made_inside_a_block() -> None:
    """What PyTorch's table of functions holds must not be the replacements, which end with their block."""
    from torch._dynamo import trace_rules

    with fusemesh.accelerate():
        trace_rules.get_torch_obj_rule_map.cache_clear()
        table = trace_rules.get_torch_obj_rule_map()
    assert F.multi_head_attention_forward in table
    assert {getattr(torch, path.name) for path in (compat.FUSED_ATTENTION, compat.FUSED_ENCODER_LAYER)} <= set(table)
    layer = nn.MultiheadAttention(8, 1, batch_first=True)
    x, pad = torch.randn(2, 3, 8), torch.zeros(2, 3, dtype=torch.bool)

    def attend(x: torch.Tensor) -> torch.Tensor:
        return layer(x, x, x, key_padding_mask=pad)[0]

    want = attend(x)
    with fusemesh.accelerate():
        found = torch.compile(attend, fullgraph=True, backend="eager")(x)
    torch.testing.assert_close(found, want)


def modules() -> Any:
    def attend(**options: Any) -> Any:
        q = torch.randn(2, 4, 5, 16, requires_grad=True)
        return fusemesh.flash_attention(q, q, q, **options)

    def packed(**options: Any) -> Any:
        q, cu = torch.randn(9, 4, 16, requires_grad=True), torch.tensor([0, 4, 9])
        lengths = {"cu_seqlens_q": cu, "cu_seqlens_k": cu, "max_seqlen_q": 5, "max_seqlen_k": 5}
        return fusemesh.flash_attention_varlen(q, q, q, **lengths, **options)

    def weights() -> Any:
        x = torch.randn(2, 5, 32, requires_grad=True)
        return torch.cat([y.flatten() for y in nn.MultiheadAttention(32, 2, batch_first=True)(x, x, x)])

    def layer(train: bool, **masks: Any) -> Any:
        x = torch.randn(2, 5, 32, requires_grad=train)
        return nn.TransformerEncoderLayer(32, 2, 32, batch_first=True).train(train)(x)

    def hidden() -> Any:
        pad = torch.ones(2, 5, dtype=torch.bool)
        return nn.TransformerEncoderLayer(32, 2, 32, batch_first=True)(torch.randn(2, 5, 32), src_key_padding_mask=pad)

    def ours() -> Any:
        x = torch.randn(2, 5, 32)
        return fusemesh.MultiheadAttention(32, 2, batch_first=True)(x, x, x)[0]

    def linear() -> Any:
        return fusemesh.fused_linear(torch.randn(4, 16), torch.randn(8, 16, requires_grad=True))

    return {
        "attention": attend,
        "dropout": lambda: attend(dropout_p=0.5),
        "reference": lambda: attend(backend="reference"),
        "packed": packed,
        "packed-reference": lambda: packed(backend="reference"),
        "weights": weights,
        "training": lambda: layer(True),
        "inference": lambda: layer(False),
        "padding": hidden,
        "ours": ours,
        "linear": linear,
    }


@pytest.mark.parametrize("autocast", [False, True], ids=["", "autocast"])
@pytest.mark.parametrize("where", ["meta", "fake"])
@pytest.mark.parametrize("name", list(modules()))
def test_shapes_and_gradients_without_values(name: str, where: str, autocast: bool) -> None:
    """Those of the same call on the CPU."""
    run = modules()[name]
    mode = FakeTensorMode() if where == "fake" else torch.device("meta")
    found = []
    for place in (contextlib.nullcontext(), mode):
        with place, torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast), fusemesh.accelerate():
            y = run()
            if y.requires_grad:
                y.sum().backward()
            found.append((y.shape, y.dtype, y.requires_grad))
    if autocast and where == "meta":  # which has none
        assert found[0][0] == found[1][0]
    else:
        assert found[0] == found[1]
