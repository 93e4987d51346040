"""Batches for models of every family and kind, and how plain transformers learns from them in one process."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional as F

from tests.support.pretrained.folders import VOCABULARY, make_model

BATCH, LENGTH, TARGETS = 8, 9, 7
END = 2
STEPS, MAX_NORM = 2, 0.5


def batch(model: Any, *, seed: int = 1, length: int = LENGTH) -> tuple[torch.Tensor, torch.Tensor, dict[str, Any]]:
    """Tokens, targets and inputs of texts of different lengths; the padding's id and the end's occur within texts."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int, most: int = VOCABULARY) -> torch.Tensor:
        return torch.randint(3 if most == VOCABULARY else 0, most, shape, generator=generator)

    kind, config = model.kind, model.config
    lengths = torch.tensor([length, 4, 6, 5, length - 1, 3, 7, length])
    tokens = draw(BATCH, length)
    tokens[:, 1] = 0
    tokens[2, 2] = END
    for row, end in enumerate(lengths.tolist()):
        # A decoder reads the class off this token, whatever it is; the others need an end.
        tokens[row, end - 1] = 0 if model.anatomy.pools == "last" and row % 2 else END
        tokens[row, end:] = 0
    inputs = {"lengths": lengths}
    if model.anatomy.segments:
        inputs["segments"] = draw(BATCH, length, most=config.type_vocab_size)
    if kind in ("class", "span"):
        most = config.num_labels if kind == "class" else 3
        return tokens, draw(BATCH, 1 if kind == "class" else 2, most=most), inputs
    if kind == "pair":
        inputs["target_tokens"] = draw(BATCH, TARGETS)
        ends = torch.tensor([TARGETS, 3, 5, TARGETS, 2, 6, TARGETS, 4])
    else:
        ends = lengths - 1
    targets = draw(BATCH, TARGETS if kind == "pair" else length)
    targets[torch.arange(targets.shape[1]) >= ends[:, None]] = -100
    return tokens, targets, inputs


def count(targets: torch.Tensor) -> int:
    return int((targets != -100).sum())


def build(name: str, kind: str, dtype: torch.dtype, **changed: Any) -> Any:
    """The plain model; attention is not uniform, and biases, equal on all tokens, do not make these alike.

    Where tokens are alike the gradients of queries are differences of almost equal terms, and rounding is all they are.
    """
    wide: dict[str, Any] = (
        {} if name == "t5" else {"init_std" if name in ("bart", "marian") else "initializer_range": 0.1}
    )
    model = make_model(name, kind, **wide, **changed).to(dtype)
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if parameter_name.endswith("bias"):
                parameter *= 0.1
    return model


def losses_of_each(model: Any, tokens: Any, targets: Any, inputs: dict[str, Any]) -> list[torch.Tensor]:
    """The loss of each text, that plain transformers sees alone and without its padding; ``model`` is its own."""
    found = []
    # With none, a decoder reads the class off the last token.
    model.config.pad_token_id = None
    for row, end in enumerate(inputs["lengths"].tolist()):
        given = {"input_ids": tokens[row : row + 1, :end]}
        if "segments" in inputs:
            given["token_type_ids"] = inputs["segments"][row : row + 1, :end]
        if "target_tokens" in inputs:
            given["decoder_input_ids"] = inputs["target_tokens"][row : row + 1]
        elif model.config.is_encoder_decoder:
            start = torch.tensor([[model.config.decoder_start_token_id]])
            given["decoder_input_ids"] = torch.cat([start, given["input_ids"][:, :-1]], 1)
        output = model(**given)
        if "logits" in output:
            logits = output.logits.flatten(0, -2)
        else:
            logits = torch.cat([output.start_logits, output.end_logits])
        found.append(F.cross_entropy(logits, targets[row, : len(logits)], reduction="sum"))
    return found


def errors(found: dict[str, torch.Tensor], want: dict[str, torch.Tensor]) -> dict[str, float]:
    """The error of each gradient, relative to its own norm.

    Gradients that vanish by cancellation, as those of keys' biases, are noise: relative to the norm of all, both.
    """
    assert found.keys() == want.keys(), found.keys() ^ want.keys()
    total = float(torch.stack([x.norm() for x in want.values()]).norm())
    result = {}
    for name, x in want.items():
        scale = float(x.norm())
        if scale <= 1e-13 * total:
            scale = total
        result[name] = float((found[name] - x).norm()) / scale
    return result
