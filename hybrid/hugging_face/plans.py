"""Plans that Hugging Face models bring along (``model._tp_plan``), in the styles of fusemesh.hybrid.tensor.table."""

from __future__ import annotations

from torch import nn

from .. import compat
from ..tensor.patterns import matches

# transformers' names, of 4.57 and of 5: what they mean here.
HUGGING_FACE = {
    "colwise": "column",
    "rowwise": "row",
    "colwise_rep": "vocab",
    "colwise_gather_output": "vocab",
    "rowwise_rep": "row_of_whole",
    "rowwise_split_input": "row_of_whole",
    "embedding_rowwise": "vocab",
    "replicated_with_grad_allreduce": "heads",
    "replicate": "whole",
}


def translated_plan(model: nn.Module) -> dict[str, str] | None:
    """Return the plan of ``model`` itself, pattern to style; None where it has none.

    Raises:
        ValueError: a style that is not known, for a module that the model has.
    """
    found = compat.hugging_face_plan(model)
    if not found:
        return None
    names = [name for name, _ in model.named_modules()] + [name for name, _ in model.named_parameters()]
    # A plan serves all sizes of a family: what names nothing in this model does not matter.
    used = {pattern: style for pattern, style in found.items() if any(matches(pattern, name) for name in names)}
    for pattern, style in used.items():
        if style not in HUGGING_FACE:
            raise ValueError(
                f"model._tp_plan: expected styles out of {', '.join(HUGGING_FACE)}, received {style!r} for "
                f"{pattern!r}; pass a table of your own by plan=, or use tp1"
            )
    return {pattern: HUGGING_FACE[style] for pattern, style in used.items()}
