"""Where each tensor of a model stands in a Hugging Face folder.

Names on disk are the model's own. Only a module that was cut before tp (the fused projections of GPT-2 and Phi-3) holds
tensors that are parts of one on disk, or transposed; it says so in its attribute ``sources``.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import nn


@dataclass(frozen=True)
class Source:
    """A tensor on disk, or a part of one: ``disk.narrow(dim, start, length)``, then transposed or not.

    Args:
        name: of the tensor on disk.
        dim, start, length: the part of it; ``length`` None: all of it.
        transposed: whether the model's tensor [m, n] is the transpose of the part [n, m].
    """

    name: str
    dim: int = 0
    start: int = 0
    length: int | None = None
    transposed: bool = False


def sources_of(model: nn.Module) -> dict[str, Source]:
    """Return for each name of the model's state dict where its values stand on disk.

    A module says by ``sources``, a dict from the names of its own state dict to :class:`Source` with names relative to
    the module's own, what differs from its own names.
    """
    found = {name: Source(name) for name in model.state_dict()}
    for prefix, module in model.named_modules():
        start = f"{prefix}." if prefix else ""
        for name, source in (getattr(module, "sources", None) or {}).items():
            assert start + name in found, (start, name)
            found[start + name] = replace(source, name=start + source.name)
    return found
