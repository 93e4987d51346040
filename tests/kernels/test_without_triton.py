"""Layer: fresh processes on CPU, in which triton is not installed. Everything that does not need it works."""

from __future__ import annotations

import json

from fusemesh.kernels import engine
from tests.support import fresh_process


def without_triton(code: str) -> str:
    checked = code + '\n            import sys; assert "triton" not in sys.modules'
    return fresh_process.run(checked, preamble=fresh_process.WITHOUT_TRITON)


def test_the_process_is_really_without_it() -> None:
    """The tests below prove nothing unless looking for triton fails there as it does where it was never installed."""
    code = """
            import importlib.util
            try:
                import triton.language
            except ModuleNotFoundError:
                print("hidden", importlib.util.find_spec("triton"))
            """
    assert without_triton(code).strip() == "hidden None"


def test_attention_and_linear_layers_forward_and_backward() -> None:
    code = """
            import torch, fusemesh
            from fusemesh.kernels import backends
            from fusemesh.kernels.testing import attention, budget, poison
            q, k, v = (torch.randn(1, 2, 5, 16, requires_grad=True) for _ in range(3))
            x, w, w_up = (torch.randn(*shape, requires_grad=True) for shape in ((3, 8), (5, 8), (5, 8)))
            for backend in ("auto", "torch", "reference"):
                out = fusemesh.flash_attention(q, k, v, causal=True, backend=backend)
                torch.autograd.grad(out.sum(), (q, k, v), create_graph=True)[0].sum().backward()
                y = fusemesh.fused_linear(x, w, activation="silu", w_up=w_up, backend=backend)
                torch.testing.assert_close(y, torch.nn.functional.silu(x @ w.T) * (x @ w_up.T))
                y.sum().backward()
            out, lse = fusemesh.attention_forward(q, k, v)
            fusemesh.attention_backward(out, q, k, v, out, lse)
            print(sorted(backends.call_counts().items()))
            for call, tensors in ((fusemesh.flash_attention, (q, k, v)), (fusemesh.fused_linear, (x, w))):
                try:
                    call(*tensors, backend="triton")
                except ValueError as error:
                    print(error)
            """
    counts, *messages = without_triton(code).splitlines()
    # auto takes the engine where it was built: twice forward, and backward on the tape and by hand.
    has_engine = engine.why_unavailable() is None
    expected = {
        ("attention_forward", "torch"): 1 + (not has_engine),
        ("attention_forward", "reference"): 1 + (not has_engine),
        ("linear_forward", "reference"): 1,
        ("linear_forward", "torch"): 2,
    }
    if has_engine:
        expected |= {("attention_forward", "cpu"): 2, ("attention_backward", "cpu"): 2}
    else:
        expected |= {("attention_backward", "reference"): 1}
    assert counts == str(sorted(expected.items()))
    assert len(messages) == 2
    assert all(line.startswith("backend='triton' cannot run here: triton is not installed") for line in messages)


def test_attention_on_the_cpu_engine_and_doctor() -> None:
    """Where the engine was built it agrees with the reference, where not it says why; doctor says the same."""
    code = """
            import torch, fusemesh
            from fusemesh.kernels import backends
            q, k, v = (torch.randn(1, 2, 5, 16) for _ in range(3))
            reason = backends.why_unavailable("cpu", "cpu")
            if reason is None:
                out = fusemesh.flash_attention(q, k, v, causal=True, backend="cpu")
                want = fusemesh.flash_attention(q, k, v, causal=True, backend="reference")
                torch.testing.assert_close(out, want)
                print("ran", backends.call_counts()["attention_forward", "cpu"])
            else:
                try:
                    fusemesh.flash_attention(q, k, v, backend="cpu")
                except ValueError as error:
                    print("refused", reason in str(error))
            from fusemesh.cli import main
            assert main(["doctor", "--json"]) == 0
            """
    outcome, report = without_triton(code).splitlines()
    assert outcome in ("ran 1", "refused True")
    found = json.loads(report)
    assert found["libraries"]["triton"] is None
    assert found["backends"]["cpu"]["triton"].startswith("triton is not installed")
    assert (found["backends"]["cpu"]["cpu"] is None) == (outcome == "ran 1")
    chosen = ("cpu", "cpu") if outcome == "ran 1" else ("torch", "reference")
    assert found["auto"]["cpu"] == {"attention": chosen[0], "linear": "torch", "loss": "torch", "decode": chosen[1]}
