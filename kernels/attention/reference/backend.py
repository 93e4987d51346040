"""The record of backend ``reference``: eager PyTorch, every option, any float dtype, and memory of Sq * Sk."""

from __future__ import annotations

from ...backend_record import Backend

REFERENCE = Backend(
    name="reference",
    implementations={
        "attention": "fusemesh.kernels.attention.reference.dense",
        "attention_varlen": "fusemesh.kernels.attention.reference.varlen",
        "attention_decode": "fusemesh.kernels.attention.reference.decode",
        "linear": "fusemesh.kernels.matmul.reference",
    },
    automatic=lambda request: f"the plain formula on {request.device.type}",
    differentiable=frozenset({"attention", "attention_varlen", "linear"}),
    # The loss in chunks is PyTorch's, in any dtype.
    instead={"vocab_loss": "torch"},
    stores_scores=True,
    keeps_rest=True,
)
