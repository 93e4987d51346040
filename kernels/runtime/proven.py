"""Which Triton kernels a GPU has run and found right (leaf)."""

from __future__ import annotations

import torch

# {(kernels, compute capability): where the record is}. On a GPU auto chooses Triton's kernels only if they stand here;
# asked for by name, they run wherever Triton compiles. Kernels: attention (packed, too), attention_decode, linear.
PROVEN_ON_GPU: dict[tuple[str, str], str] = {}


def proven(kernels: str, device: torch.device) -> bool:
    """Return whether a GPU of this device's kind has run these kernels and found them right."""
    if device.type != "cuda":
        return False
    major, minor = torch.cuda.get_device_capability(device)
    return (kernels, f"sm_{major}{minor}") in PROVEN_ON_GPU
