"""Attention forward on a CPU as other packages do it, for bench/cpu_engine.py: JAX, OpenVINO, onnxruntime.

Each is there only if its package is installed (pip install jax openvino onnxruntime onnx); inputs are handed over once,
outside the time that is measured, and each keeps the threads that it takes by itself.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable
from typing import Any

import torch

Tensors = dict[str, torch.Tensor]


def contenders(x: Tensors, causal: bool, dtype: str) -> dict[str, Callable[[], Any]]:
    """Return those that are installed and take this case, by name. Results are tensors [B, H, Sq, D]."""
    found = {}
    for name, make in (("openvino", _openvino), ("jax", _jax), ("onnxruntime", _onnxruntime)):
        if importlib.util.find_spec(name) is not None:
            call = make({n: t.detach() for n, t in x.items()}, causal, dtype)
            if call is not None:
                found[name] = call
    return found


def _jax(x: Tensors, causal: bool, dtype: str) -> Callable[[], Any]:
    import jax
    import jax.numpy as jnp
    import numpy as np

    # [B, S, H, D] is its layout.
    q, k, v = (
        jnp.asarray(np.ascontiguousarray(x[n].float().transpose(1, 2).numpy()), getattr(jnp, _NAMES[dtype]))
        for n in "qkv"
    )
    attention = jax.jit(lambda q, k, v: jax.nn.dot_product_attention(q, k, v, is_causal=causal))

    def call() -> torch.Tensor:
        out = attention(q, k, v).block_until_ready()
        return _Later(lambda: torch.from_numpy(np.array(out.astype(jnp.float32))).transpose(1, 2).to(x["q"].dtype))

    return call


_NAMES = {"fp32": "float32", "bf16": "bfloat16"}


class _Later:
    """A result that becomes a tensor only when somebody looks at it, which is not timed."""

    def __init__(self, make: Callable[[], torch.Tensor]) -> None:
        self.make = make


def tensor_of(result: Any) -> torch.Tensor:
    """A contender's result as a tensor."""
    return result.make() if isinstance(result, _Later) else torch.as_tensor(result)


def _openvino(x: Tensors, causal: bool, dtype: str) -> Callable[[], Any] | None:
    import openvino as ov
    from openvino import opset13 as ops

    if x["q"].shape[1] != x["k"].shape[1] or dtype != "fp32":
        return None  # its op takes equal numbers of heads, and its bf16 ends in a segmentation fault on one query
    arrays = [x[n].float().contiguous().numpy() for n in "qkv"]
    parameters = [ops.parameter(list(a.shape), ov.Type.f32, name=n) for n, a in zip("qkv", arrays, strict=True)]
    attention = ops.scaled_dot_product_attention(*parameters, causal=causal)
    precision = {"INFERENCE_PRECISION_HINT": ov.Type.f32}
    hints = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": torch.get_num_threads(), **precision}
    compiled = ov.Core().compile_model(ov.Model([attention], parameters), "CPU", hints)
    request = compiled.create_infer_request()
    for i, array in enumerate(arrays):
        request.set_input_tensor(i, ov.Tensor(array, shared_memory=True))

    def call() -> Any:
        request.infer()
        return _Later(lambda: torch.from_numpy(request.get_output_tensor(0).data.copy()).to(x["q"].dtype))

    return call


def _onnxruntime(x: Tensors, causal: bool, dtype: str) -> Callable[[], Any] | None:
    if importlib.util.find_spec("onnx") is None or dtype != "fp32":
        return None  # its CPU kernel of MultiHeadAttention is fp32's
    import onnxruntime
    from onnx import TensorProto, helper

    batch, heads, queries, dim = x["q"].shape
    if heads != x["k"].shape[1]:
        return None
    # com.microsoft.MultiHeadAttention: [B, S, H * D].
    arrays = {n: x[n].transpose(1, 2).reshape(batch, x[n].shape[2], heads * dim).numpy() for n in "qkv"}
    node = helper.make_node(
        "MultiHeadAttention",
        ["q", "k", "v"],
        ["out"],
        domain="com.microsoft",
        num_heads=heads,
        unidirectional=int(causal),
        scale=1 / math.sqrt(dim),
    )
    infos = [helper.make_tensor_value_info(n, TensorProto.FLOAT, a.shape) for n, a in arrays.items()]
    output = helper.make_tensor_value_info("out", TensorProto.FLOAT, arrays["q"].shape)
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(
        helper.make_graph([node], "attention", infos, [output]), opset_imports=opsets, ir_version=8
    )
    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(model.SerializeToString(), settings, providers=["CPUExecutionProvider"])

    def call() -> Any:
        (out,) = session.run(None, arrays)
        return _Later(lambda: torch.from_numpy(out).reshape(batch, queries, heads, dim).transpose(1, 2))

    return call
