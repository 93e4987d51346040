"""Layer: kernels in Triton's interpreter. What makes it faster changes no bit, and is taken away again."""

from __future__ import annotations

import pytest
import torch

from fusemesh import flash_attention
from fusemesh.kernels import backends
from fusemesh.kernels.runtime import interpreter, interpreter_speed

pytestmark = pytest.mark.interpreter


def results() -> list[torch.Tensor]:
    """Return outputs and gradients of attention with a causal mask, a bias and a softcap, in two dtypes."""
    generator = torch.Generator().manual_seed(0)
    found = []
    for dtype in (torch.float32, torch.bfloat16):
        q, k, v, bias = (
            torch.randn(shape, generator=generator).to(dtype).requires_grad_()
            for shape in ((1, 2, 19, 24), (1, 1, 33, 24), (1, 1, 33, 16), (2, 19, 33))
        )
        with backends.use_backend("triton"):
            out = flash_attention(q, k, v, causal=True, align="bottom_right", bias=bias, softcap=2.0)
        out.float().square().sum().backward()
        found += [out.detach(), *(x.grad for x in (q, k, v, bias))]
    return found


def test_results_are_equal_to_the_bit_and_everything_is_put_back(monkeypatch: pytest.MonkeyPatch) -> None:
    import triton.language as tl
    from triton.runtime import interpreter as of_triton

    replaced = [(tl.tensor, "__init__"), (tl.block_type, "__init__"), (of_triton, "_get_np_dtype")]
    interpreter.uninstall()
    before = [getattr(owner, name) for owner, name in replaced]
    fast = results()
    assert all(getattr(owner, name) is not found for (owner, name), found in zip(replaced, before, strict=True))
    assert not of_triton.interpreter_builder.options.sanitize_overflow
    interpreter.uninstall()
    assert [getattr(owner, name) for owner, name in replaced] == before
    assert of_triton.interpreter_builder.options.sanitize_overflow
    with monkeypatch.context() as patch:
        patch.setattr(interpreter_speed, "replacements", lambda _: {})
        slow = results()
        assert [getattr(owner, name) for owner, name in replaced] == before
        interpreter.uninstall()
    for a, b in zip(fast, slow, strict=True):
        assert torch.equal(a, b) and a.isfinite().all()
