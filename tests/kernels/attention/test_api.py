"""Layer: one process (and fresh ones), CPU, no Triton. The public attention functions: what they compute and who runs.

Values are compared with the reference, which test_attention_reference.py compares with loops in numpy.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable

import pytest
import torch

import fusemesh
from fusemesh import Origin, attention_backward, attention_forward, flash_attention
from fusemesh.kernels import backends
from fusemesh.kernels.attention.call import validation
from fusemesh.kernels.attention.call.options import Call, Options
from fusemesh.kernels.attention.call.spec import AttentionSpec
from fusemesh.kernels.attention.reference import dense as reference
from fusemesh.kernels.runtime import launch
from fusemesh.kernels.testing import attention as budget
from tests.support import fresh_process
from tests.support.attention_inputs import close, qkv
from tests.support.interpreted_device import InterpretedDevice

FORWARD, BACKWARD = "attention_forward", "attention_backward"


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)
    backends.reset_call_counts()


def by_reference(q, k, v, spec, mask=None, bias=None, origin=None):  # type: ignore[no-untyped-def]
    return reference.forward(q, k, v, Call(spec, mask=mask, bias=bias, origin=origin))


class TestWhoRuns:
    """The choice of backend, by the counts of what ran."""

    def test_auto_on_the_cpu_takes_torch(self) -> None:
        flash_attention(*qkv())
        assert backends.call_counts() == {(FORWARD, "torch"): 1}

    @pytest.mark.parametrize("options", [{"return_lse": True}, {"window": (2, None)}], ids=["lse", "window"])
    def test_auto_takes_the_reference_for_what_torch_does_not_express(self, options: dict) -> None:
        flash_attention(*qkv(), **options)
        assert backends.call_counts() == {(FORWARD, "reference"): 1}

    def test_forward_and_backward_without_autograd_take_the_reference(self) -> None:
        q, k, v = qkv()
        out, lse = attention_forward(q, k, v)
        attention_backward(out, q, k, v, out, lse)
        assert backends.call_counts() == {(FORWARD, "reference"): 1, (BACKWARD, "reference"): 1}

    @pytest.mark.parametrize("name", ["reference", "torch"])
    def test_a_backend_given_by_name_runs(self, name: str) -> None:
        flash_attention(*qkv(), backend=name)
        assert backends.call_counts() == {(FORWARD, name): 1}

    def test_use_backend_fills_in_for_auto_only(self) -> None:
        q, k, v = qkv()
        with fusemesh.use_backend("reference"):
            flash_attention(q, k, v)
            flash_attention(q, k, v, backend="torch")
            with fusemesh.use_backend("torch"):
                flash_attention(q, k, v)
            flash_attention(q, k, v)
        flash_attention(q, k, v)
        assert backends.call_counts() == {(FORWARD, "reference"): 2, (FORWARD, "torch"): 3}
        with (
            fusemesh.use_backend("torch"),
            pytest.raises(ValueError, match=r"^backend: expected .*, received 'torch'.*window"),
        ):
            flash_attention(q, k, v, window=(2, None))
        with (
            pytest.raises(ValueError, match=r"^backend: expected one of .*, received 'cuda'"),
            fusemesh.use_backend("cuda"),
        ):
            pass

    def test_environment_variable_fills_in_for_auto_only(self) -> None:
        code = """
            import torch, fusemesh
            from fusemesh.kernels import backends
            q = torch.randn(1, 1, 3, 16)
            fusemesh.flash_attention(q, q, q)
            fusemesh.flash_attention(q, q, q, backend="torch")
            print(backends.call_counts())
        """
        printed = fresh_process.run(code, env={"FUSEMESH_BACKEND": "reference"})
        assert printed.strip() == str({(FORWARD, "reference"): 1, (FORWARD, "torch"): 1})

    def test_a_wrong_environment_variable_is_named(self) -> None:
        code = """
            import torch, fusemesh
            q = torch.randn(1, 1, 3, 16)
            try:
                fusemesh.flash_attention(q, q, q)
            except ValueError as error:
                print(error)
        """
        printed = fresh_process.run(code, env={"FUSEMESH_BACKEND": "cuda"})
        assert printed.startswith("FUSEMESH_BACKEND: expected one of ") and "received 'cuda'" in printed

    def test_triton_on_the_cpu_needs_the_interpreter(self) -> None:
        if backends.env.INTERPRET:
            pytest.fail("run this file without TRITON_INTERPRET=1")
        with pytest.raises(ValueError, match=r"backend='triton' cannot run here: .*TRITON_INTERPRET=1"):
            flash_attention(*qkv(dtype=torch.float32, dim_v=16), backend="triton")
        assert not backends.call_counts()

    def test_the_choice_is_announced_once(
        self, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(backends, "_announced", set())
        with caplog.at_level(logging.INFO, logger="fusemesh"):
            for _ in range(3):
                flash_attention(*qkv())
            flash_attention(*qkv(), return_lse=True)
            flash_attention(*qkv(), backend="reference")
        assert [record.levelname for record in caplog.records] == ["INFO", "INFO"]
        first, second = (record.getMessage() for record in caplog.records)
        assert "attention: auto chose backend 'torch'" in first
        assert "attention: auto chose backend 'reference'" in second and "return_lse" in second

    def test_compiled_kernels_are_left_to_the_op_where_they_can_do_the_call(self) -> None:
        from fusemesh.kernels.attention.dense import api

        chosen = {}
        for name, tensors in {
            "fp32": qkv(dtype=torch.float32, dim_v=16),
            "fp64": qkv(dim_v=16),
            "small head": qkv(dtype=torch.float32),
        }.items():
            q, k, v = tensors
            call = validation.normalise(q, k, Options())
            with launch.execute_on(InterpretedDevice()):
                chosen[name] = api._choose("auto", (q, k, v), call, needs_lse=False).name
        assert chosen == {"fp32": "auto", "fp64": "torch", "small head": "torch"}


# options, the spec they stand for, Sq and Sk
POSITIONS: dict[str, tuple[dict, AttentionSpec, int, int]] = {
    "nothing": ({}, AttentionSpec(0.25), 5, 7),
    "scale": ({"scale": 0.5}, AttentionSpec(0.5), 5, 7),
    "scale_negative": ({"scale": -1}, AttentionSpec(-1.0), 5, 7),
    "causal_equal_lengths": ({"causal": True}, AttentionSpec(0.25, None, 0), 6, 6),
    "causal_top_left": ({"causal": True, "align": "top_left"}, AttentionSpec(0.25, None, 0), 5, 7),
    "causal_top_left_long": ({"causal": True, "align": "top_left"}, AttentionSpec(0.25, None, 0), 7, 5),
    "causal_bottom_right": ({"causal": True, "align": "bottom_right"}, AttentionSpec(0.25, None, 0, 2, 0), 5, 7),
    "causal_bottom_right_long": ({"causal": True, "align": "bottom_right"}, AttentionSpec(0.25, None, 0, -2, 0), 7, 5),
    "causal_origin": ({"causal": True, "origin": Origin(q=3, k=1)}, AttentionSpec(0.25, None, 0, 3, 1), 5, 7),
    "causal_origin_no_key": ({"causal": True, "origin": Origin(k=9)}, AttentionSpec(0.25, None, 0, 0, 9), 5, 7),
    "window": ({"window": (2, 1), "align": "top_left"}, AttentionSpec(0.25, 2, 1), 5, 7),
    "window_left": ({"window": [2, None], "align": "bottom_right"}, AttentionSpec(0.25, 2, None, 2, 0), 5, 7),
    "window_causal": ({"window": (2, 3), "causal": True}, AttentionSpec(0.25, 2, 0), 6, 6),
    "window_open": ({"window": (None, None)}, AttentionSpec(0.25), 5, 7),
    "align_without_effect": ({"align": "bottom_right"}, AttentionSpec(0.25), 5, 7),
}


def options_for(name: str) -> list[str]:
    return ["reference"] if name.startswith("window") and name != "window_open" else ["reference", "torch"]


@pytest.mark.parametrize(("name", "backend"), [(name, backend) for name in POSITIONS for backend in options_for(name)])
def test_options_mean_what_they_say(name: str, backend: str) -> None:
    """Forward and gradients of every option equal those of the AttentionSpec that it stands for."""
    options, spec, sq, sk = POSITIONS[name]
    tensors = qkv(sq, sk, requires_grad=True)
    out = flash_attention(*tensors, backend=backend, **options)
    want, want_lse = by_reference(*tensors, spec)
    close(out, want)
    do = torch.randn_like(out)
    for mine, theirs in zip(
        torch.autograd.grad(out, tensors, do), torch.autograd.grad(want, tensors, do, retain_graph=True), strict=True
    ):
        close(mine, theirs)
    if backend == "reference":
        out, lse = flash_attention(*tensors, backend=backend, return_lse=True, **options)
        close(out, want)
        close(lse, want_lse)


FEATURES = ["nothing", "mask", "mask_keys", "bias", "bias_heads", "mask_and_bias", "bias_of_minus_inf"]


@pytest.mark.parametrize("align", [None, "top_left", "bottom_right"])
@pytest.mark.parametrize("feature", FEATURES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_torch_backend_within_the_budget(feature: str, align: str | None, dtype: torch.dtype) -> None:
    """PyTorch's kernel under our contract: GQA, D != Dv, rows without keys, mask with bias, the bias gradient.

    Causal where ``align`` is given.
    """
    q, k, v = qkv(9, 13, dtype=dtype, requires_grad=True)
    mask = bias = None
    if "mask" in feature:
        mask = torch.rand((2, 1, 1, 13) if feature == "mask_keys" else (2, 1, 9, 13)) > 0.4
        mask[1] = mask[1] & (torch.arange(mask.shape[2]) != 3)[:, None]
    if "bias" in feature:
        bias = torch.randn((4, 1, 13) if feature == "bias_heads" else (1, 4, 9, 13)).to(dtype)
        if feature == "bias_of_minus_inf":
            bias[:, :, 3] = -math.inf
        bias.requires_grad_()
    causal = align is not None
    out = flash_attention(q, k, v, causal=causal, align=align, mask=mask, bias=bias, backend="torch")
    assert out.dtype == dtype and backends.call_counts() == {(FORWARD, "torch"): 1}
    inputs = [x for x in (q, k, v, bias) if x is not None]
    do = torch.randn_like(out)
    actual = dict(zip(["out", "dq", "dk", "dv", "dbias"], [out, *torch.autograd.grad(out, inputs, do)], strict=False))
    spec = AttentionSpec(0.25, None, 0 if causal else None, 4 if align == "bottom_right" else 0)
    four = None if bias is None else bias.detach()[(None,) * (4 - bias.dim())]
    if bias is not None:
        assert actual["dbias"].shape == bias.shape
        actual["dbias"] = actual["dbias"].reshape(four.shape)
    if dtype == torch.float64:
        want = budget.expected(q, k, v, Call(spec, mask=mask, bias=four), do=do).exact
        for name, value in actual.items():
            close(value, want[name])
    else:
        budget.check(actual, budget.expected(q, k, v, Call(spec, mask=mask, bias=four), do=do))


@pytest.mark.parametrize("backend", ["reference", "torch"])
@pytest.mark.parametrize(("sq", "sk"), [(0, 4), (4, 0), (0, 0)])
@pytest.mark.parametrize("causal", [False, True])
def test_empty_sequences(backend: str, sq: int, sk: int, causal: bool) -> None:
    tensors = qkv(sq, sk, requires_grad=True)
    out = flash_attention(*tensors, causal=causal, align="bottom_right", backend=backend)
    assert out.shape == (2, 4, sq, 8) and (out == 0).all()
    for x, gradient in zip(tensors, torch.autograd.grad(out.sum(), tensors), strict=True):
        assert gradient.shape == x.shape and (gradient == 0).all()


@pytest.mark.parametrize("how", ["mask", "bias", "causal"])
@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_rows_without_keys(how: str, backend: str) -> None:
    q, k, v = qkv(6, 4, requires_grad=True)
    options: dict = {
        "mask": {"mask": (torch.arange(6) > 1)[:, None]},
        "causal": {"causal": True, "align": "bottom_right"},
    }
    bias = torch.zeros(6, 1, dtype=torch.float64).masked_fill((torch.arange(6) < 2)[:, None], -math.inf)
    options = options.get(how, {"bias": bias.requires_grad_()})
    out = flash_attention(q, k, v, backend=backend, **options)
    assert (out[:, :, :2] == 0).all() and (out[:, :, 2:] != 0).any(-1).all()
    inputs = [q, k, v] if how != "bias" else [q, k, v, bias]
    gradients = torch.autograd.grad(out, inputs, torch.randn_like(out))
    assert all(x.isfinite().all() for x in gradients)
    assert (gradients[0][:, :, :2] == 0).all() and (gradients[0][:, :, 2:] != 0).any()
    _, lse = attention_forward(q, k, v, **options)
    assert (lse[:, :, :2] == -math.inf).all() and lse[:, :, 2:].isfinite().all()


class TestPositions:
    """A shard of a tensor, told where it stands, computes what the whole would."""

    options: dict = {"causal": True, "window": (6, None)}  # noqa: RUF012

    @pytest.mark.parametrize("as_tensor", [False, True], ids=["int", "device_tensor"])
    def test_shards_of_the_queries(self, as_tensor: bool) -> None:
        q, k, v = qkv(12, 12)
        whole, whole_lse = flash_attention(q, k, v, return_lse=True, **self.options)
        for start in range(0, 12, 4):
            position = torch.tensor([start], dtype=torch.int32) if as_tensor else start
            out, lse = flash_attention(
                q[:, :, start : start + 4], k, v, origin=Origin(q=position), return_lse=True, **self.options
            )
            close(out, whole[:, :, start : start + 4])
            close(lse, whole_lse[:, :, start : start + 4])

    @pytest.mark.parametrize("as_tensor", [False, True], ids=["int", "device_tensor"])
    def test_shards_of_the_keys_merge_by_their_lse(self, as_tensor: bool) -> None:
        """What ring attention does: outputs of shards of the keys, weighted by their shares of the softmax."""
        q, k, v = qkv(12, 12)
        whole, whole_lse = flash_attention(q, k, v, return_lse=True, **self.options)
        outs, lses = [], []
        for start in range(0, 12, 4):
            keys = slice(start, start + 4)
            position = torch.tensor(start) if as_tensor else start
            out, lse = attention_forward(q, k[:, :, keys], v[:, :, keys], origin=Origin(k=position), **self.options)
            outs.append(out)
            lses.append(lse)
        assert any((lse == -math.inf).any() for lse in lses)  # the rows before and far behind a shard
        total = torch.logsumexp(torch.stack(lses), 0)
        close(total, whole_lse)
        close(sum(out * (lse - total).exp()[..., None] for out, lse in zip(outs, lses, strict=True)), whole)

    def test_shards_of_the_keys_give_their_part_of_the_gradients(self) -> None:
        q, k, v = qkv(12, 12, requires_grad=True)
        out, lse = flash_attention(q, k, v, return_lse=True, **self.options)
        do, dlse = torch.randn_like(out), torch.randn_like(lse)
        want = torch.autograd.grad([out, lse], [q, k, v], [do, dlse])
        parts = []
        for start in range(0, 12, 4):
            keys, origin = slice(start, start + 4), Origin(k=start)
            part = attention_backward(
                do, q, k[:, :, keys], v[:, :, keys], out, lse, dlse, origin=origin, **self.options
            )
            assert part[3] is None and not any(x.requires_grad for x in part[:3])
            parts.append(part)
        close(sum(part[0] for part in parts), want[0])
        close(torch.cat([part[1] for part in parts], 2), want[1])
        close(torch.cat([part[2] for part in parts], 2), want[2])

    def test_only_differences_of_positions_count(self) -> None:
        q, k, v = qkv(5, 7)
        options = {"causal": True, "backend": "torch"}
        near = flash_attention(q, k, v, origin=Origin(q=1, k=0), **options)
        far = flash_attention(q, k, v, origin=Origin(q=2**40 + 1, k=torch.tensor(2**40), head=3, batch=5), **options)
        assert torch.equal(near, far)
        close(near, by_reference(q, k, v, AttentionSpec(0.25, None, 0, 1, 0))[0])


class TestLse:
    def test_gradients_flow_through_it(self) -> None:
        tensors = qkv(requires_grad=True)
        assert torch.autograd.gradcheck(
            lambda *x: flash_attention(*x, causal=True, return_lse=True), tensors, fast_mode=True
        )

    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
    def test_natural_logarithm_in_fp32(self, dtype: torch.dtype) -> None:
        q, k, v = qkv(dtype=dtype, kv_heads=4)
        _, lse = attention_forward(q, k, v)
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        assert lse.dtype == wide and lse.shape == (2, 4, 5)
        torch.testing.assert_close(lse, torch.logsumexp(0.25 * q.to(wide) @ k.to(wide).mT, -1))


def test_expanded_masks_are_narrowed() -> None:
    q, k, v = qkv(5, 7)
    mask = (torch.rand(2, 1, 1, 7) > 0.4).expand(2, 4, 5, 7)
    call = validation.normalise(q, k, Options(mask=mask))
    assert call.mask is not None and call.mask.shape == (2, 1, 1, 7)
    assert call.mask.data_ptr() == mask.data_ptr()
    close(flash_attention(q, k, v, mask=mask), by_reference(q, k, v, AttentionSpec(0.25), mask=mask.contiguous())[0])


STRIDES: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "heads_last": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    "dim_not_contiguous": lambda x: x.mT.contiguous().mT,
    "every_second": lambda x: x.repeat_interleave(2, dim=2)[:, :, ::2],
    "flipped_batch": lambda x: x.flip(0).contiguous().flip(0),
}


@pytest.mark.parametrize("backend", ["reference", "torch"])
@pytest.mark.parametrize("how", STRIDES)
def test_any_strides(how: str, backend: str) -> None:
    tensors = qkv()
    want = flash_attention(*tensors, causal=True, backend=backend)
    close(flash_attention(*(STRIDES[how](x) for x in tensors), causal=True, backend=backend), want)
