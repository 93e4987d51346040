"""Batches for models of every family and kind, and how plain transformers learns from them in one process."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional as F

from fusemesh.hybrid.hugging_face.sources import sources_of
from fusemesh.hybrid.hugging_face.stages import as_trainable
from tests.support.hugging_face import KeepDouble
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
    if name in ("bart", "marian"):
        wide["scale_embedding"] = True
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


def errors(
    found: dict[str, torch.Tensor], want: dict[str, torch.Tensor], total: float | None = None
) -> dict[str, float]:
    """The error of each gradient, relative to its own norm.

    Gradients that vanish by cancellation, as those of keys' biases, are noise: relative to ``total``, the norm of all.
    """
    assert found.keys() == want.keys(), found.keys() ^ want.keys()
    if total is None:
        total = float(torch.stack([x.norm() for x in want.values()]).norm())
    result = {}
    for name, x in want.items():
        scale = float(x.norm())
        if scale <= 1e-13 * total:
            scale = total
        result[name] = float((found[name] - x).norm()) / scale
    return result


def learned_alone(name: str, kind: str, **changed: Any) -> dict[str, Any]:
    """What two steps of plain transformers in one process in fp64 are, on texts one by one; see :func:`learned`."""
    with KeepDouble():
        model = build(name, kind, torch.float64, **changed)
        tokens, targets, inputs = batch(as_trainable(build(name, kind, torch.float64, **changed)))

        def step() -> torch.Tensor:
            losses: Any = losses_of_each(model, tokens, targets, inputs)
            (sum(losses) / count(targets)).backward()
            return sum(losses).detach()

        def clip() -> torch.Tensor:
            return torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM)

        return learned(model, step, clip, lambda x: x)


def learned(model: Any, step: Any, clip: Any, whole: Any) -> dict[str, Any]:
    """Losses and norms of steps of AdamW, the gradients of the first before and after clipping, the parameters behind.

    Args:
        step: adds gradients, and returns the loss of all texts.
        clip: clips them, and returns their norm.
        whole: makes a parameter or a gradient whole.
    """
    # eps: what vanishes by cancellation must not be blown up to a step.
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, eps=1e-5, weight_decay=0.1, foreach=False)
    found: dict[str, Any] = {"losses": [], "norms": []}
    for number in range(STEPS):
        optimizer.zero_grad()
        found["losses"].append(float(step()))
        for when in ("gradients", "clipped"):
            if when == "clipped":
                found["norms"].append(float(clip()))
            if number == 0:
                named = {key: x.grad for key, x in model.named_parameters() if x.grad is not None}
                found[when] = {key: whole(x).clone() for key, x in named.items()}
        optimizer.step()
    found["parameters"] = {key: whole(x.detach()).clone() for key, x in model.named_parameters()}
    return found


def wrong(found: dict[str, Any], want: dict[str, Any], tolerance: float) -> dict[str, float]:
    """What differs by more than that, relative; of a stage, whose parameters are some of the whole model's."""
    result: dict[str, float] = {}
    for key in {"losses", "norms"} & want.keys():
        for number, (mine, theirs) in enumerate(zip(found[key], want[key], strict=True)):
            result[f"{key} {number}"] = abs(mine - theirs) / abs(theirs)
    for key in {"gradients", "clipped", "parameters"} & want.keys():
        assert found[key].keys() <= want[key].keys(), found[key].keys() - want[key].keys()
        part = {name: want[key][name] for name in found[key]}
        total = float(torch.stack([x.norm() for x in want[key].values()]).norm())
        result |= {f"{key} {name}": e for name, e in errors(found[key], part, total).items()}
    return {key: e for key, e in result.items() if not e <= tolerance}


def cut_as(want: dict[str, Any], model: Any) -> dict[str, Any]:
    """The same, of fused projections the parts that the model ``model``, in which they are cut, has in their places."""
    sources = sources_of(model)

    def part(whole: dict[str, torch.Tensor], name: str) -> torch.Tensor:
        source = sources[name]
        found = whole[source.name]
        if source.length is not None:
            found = found.narrow(source.dim, source.start, source.length)
        return found.t() if source.transposed else found

    names = dict(model.named_parameters())
    tensors = ("gradients", "clipped", "parameters")
    cut = {key: {n: part(want[key], n) for n in names if sources[n].name in want[key]} for key in tensors}
    return {**want, **cut}
