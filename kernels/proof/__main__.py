"""``python -m fusemesh.kernels.proof TEXT``: prove the kernels of a call again, as a warning of wrong results tells it.

TEXT is what the warning says: the op and its arguments, tensors by dtype, sizes, strides and how far their address is
off a multiple of 16. Tensors are made anew; what the proof compares are small calls of its own. The device is the
current GPU. The exit status is 0 where the kernels are right, 1 where they are wrong or could not be proven.
"""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any

import torch

from . import first_use


def made(described: Any, device: torch.device) -> Any:
    """Return an argument of an op: report.py writes what this reads."""
    if not isinstance(described, list):
        return described
    dtype = getattr(torch, described[0], None) if described and isinstance(described[0], str) else None
    if not isinstance(dtype, torch.dtype):
        return [made(x, device) for x in described]
    _, sizes, strides, *off = described
    last = sum((size - 1) * stride for size, stride in zip(sizes, strides, strict=True))
    offset = off[0] // dtype.itemsize if off else 0
    base = torch.zeros(offset + (0 if 0 in sizes else last + 1), dtype=dtype, device=device)
    return base.as_strided(sizes, strides, offset)


def main(arguments: list[str] | None = None, device: torch.device | None = None) -> int:
    """The command; returns its exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m fusemesh.kernels.proof", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("text", help="what the warning says behind the command")
    operation, described = json.loads(parser.parse_args(arguments).text)
    if device is None and not torch.cuda.is_available():
        parser.error("no GPU is visible to PyTorch, and a kernel proves itself on the GPU that runs it")
    from .. import backends  # noqa: F401
    from ..attention.decode import ops as _decode  # noqa: F401
    from ..attention.dense import ops as _dense  # noqa: F401
    from ..attention.varlen import ops as _varlen  # noqa: F401
    from ..matmul import ops as _linear  # noqa: F401
    from ..vocab_loss import ops as _vocab_loss  # noqa: F401

    op = getattr(torch.ops.fusemesh, operation).default
    values = made(described, torch.device("cuda") if device is None else device)
    options = {}
    if operation in ("attention_backward", "attention_varlen_backward"):
        values.append(False)  # aux_grad
    elif operation in ("attention_forward", "attention_varlen_forward"):
        options["keep_rest"] = values.pop()
    first_use.forget()
    try:
        with first_use.mode(first_use.ALWAYS), torch.no_grad():
            op(*values, "triton", **options)
    except first_use.NotProven as error:
        print(error)
        return 1
    print(f"{operation}: right")
    return 0


if __name__ == "__main__":
    sys.exit(main())
