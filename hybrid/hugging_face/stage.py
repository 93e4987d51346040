"""A stage of a Hugging Face model: transformers' own forward, of some of its blocks.

The modules of other stages are replaced by ones that pass through: a block keeps its index, by which transformers
chooses its mask, and everything keeps its name. Shapes: B batch, S sequence, T target sequence, E hidden size.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..pipeline_parallel import StageModule
from . import heads, packed
from .anatomy import base_name, within
from .stand_ins import replaced

Shape = tuple[int, ...]
State = tuple[torch.Tensor, ...]


@dataclass(frozen=True)
class Place:
    """Which part of a model a stage is.

    Args:
        span: its blocks, an encoder's counted before its decoder's.
        border: the number of an encoder's blocks, that a decoder's follow; None of a model with one stack.
        last: whether the head is among it.
        embeds_ahead: whether the first stage looks up the decoder's tokens, too, and their embeddings travel with the
            encoder's h. So it is where both stacks have one table, which else a stage more would hold.
    """

    span: range
    border: int | None
    last: bool
    embeds_ahead: bool = False


class HuggingFaceStage(StageModule):
    """Blocks ``span`` of a Hugging Face model, with what acts before and behind them if they are ends.

    Its child ``model`` is transformers' own class, whose modules are the whole model's but for those of other stages.
    ``tied`` holds the whole model's modules that name parameters of this stage otherwise, so that they stay one.
    """

    def __init__(self, whole: Any, span: range, last: bool) -> None:
        super().__init__()
        base, border, stacks = base_name(whole), border_of(whole), stacks_of(whole)
        others: dict[str, nn.Module | None] = {}
        if not last:
            others |= {name: None for name, _ in whole.named_children() if name != base}
        self.table: nn.Module | None = None
        is_shared = False
        if border is not None:
            # Each stack looks tokens up in a table of its own, which may be the same parameter.
            others[within(base, "shared")] = None
            source, target = (whole.get_submodule(within(base, name, "embed_tokens")) for name in stacks)
            is_shared = source.weight is target.weight
            if is_shared and span.start == 0 and span.stop <= border:
                self.table = target
        self.place = Place(span, border, last, is_shared)
        start = 0
        for name, stack in whole.anatomy.stacks.items():
            path = within(base, name)
            length = len(stacks[name])
            part = range(max(span.start - start, 0), min(span.stop - start, length))
            made = stack.part(whole.get_submodule(path), part) if part else None
            if made is not None and is_shared and 0 < span.start <= start == border:
                made = replaced(made, {"embed_tokens": None})
            others[path] = made
            start += length
        self.model: Any = replaced(whole, others)
        self.tied = _Tied(self, whole)

    def forward(
        self, *state: torch.Tensor, targets: torch.Tensor | None = None, **inputs: torch.Tensor
    ) -> torch.Tensor | State:
        return run(self.model, self.place, state, inputs, targets, self.table)

    def state_shapes(self, block: int, batch: Mapping[str, Shape]) -> list[Shape]:
        """Return the shapes of the state before block number ``block``, for a batch of these shapes."""
        if block == 0:
            return [batch["tokens"]]
        hidden = self.model.config.hidden_size
        h, border = (*batch["tokens"], hidden), self.place.border
        if border is None:
            return [h]
        target = (*batch["target_tokens"], hidden)
        if block > border:
            return [target, h]
        return [h, target] if self.place.embeds_ahead else [h]

    def input_shapes(self, batch: Mapping[str, Shape]) -> list[Shape]:
        return self.state_shapes(self.place.span.start, batch)

    def output_shapes(self, batch: Mapping[str, Shape]) -> list[Shape]:
        if self.place.last:
            return [heads.shape(self.model.kind, self.model, batch)]
        return self.state_shapes(self.place.span.stop, batch)


class _Tied(nn.Module):
    """Modules of the whole model that are in no stage, all of whose parameters a stage has under other names."""

    def __init__(self, stage: nn.Module, whole: nn.Module) -> None:
        super().__init__()
        modules = {id(module) for module in stage.modules()}
        held = {id(parameter) for parameter in stage.parameters()}
        for name, module in whole.named_modules():
            own = [id(parameter) for parameter in module.parameters(recurse=False)]
            if own and id(module) not in modules and held.issuperset(own):
                self.add_module(name.replace(".", "/"), module)


def stacks_of(model: Any) -> dict[str, list[nn.Module]]:
    """Return the blocks of each stack of a trainable model; with pp those of this rank."""
    found = {}
    for name, stack in model.anatomy.stacks.items():
        try:
            blocks: Any = model.get_submodule(within(base_name(model), name, stack.blocks))
        except AttributeError:
            blocks = ()  # all of them are other stages'
        found[name] = list(blocks)
    return found


def border_of(model: Any) -> int | None:
    """Return the number of a whole model's blocks that are an encoder's; None of a model with one stack."""
    return len(stacks_of(model)["encoder"]) if model.anatomy.is_pair else None


def run(
    model: Any,
    place: Place,
    state: State,
    inputs: Mapping[str, torch.Tensor],
    targets: torch.Tensor | None = None,
    table: nn.Module | None = None,
) -> torch.Tensor | State:
    """Return the state for the next stage; of the last one the logits, or with targets the loss summed over them.

    Args:
        model: the whole model, or a stage's.
        place: its part of the whole.
        state: the tokens, or the state before its first block: h, behind which the decoder's embeddings may stand;
            where an encoder ends, its output, the memory, in the place of h; within the decoder h and the memory.
        table: the decoder's, of a first stage that looks up its tokens for a later one.
    """
    border, span = place.border, place.span
    given: dict[str, Any] = {"use_cache": False} if getattr(model.config, "use_cache", None) is not None else {}
    lengths = inputs.get("lengths")
    if lengths is not None:
        length = (state[0] if border is None or span.start <= border else state[1]).shape[1]
        given["attention_mask"] = (torch.arange(length, device=lengths.device) < lengths[:, None]).long()
    if border is not None:
        return _run_pair(model, place, state, inputs, targets, given, table)
    if "positions" in inputs:
        with packed.documents(model, inputs["positions"]) as bounds:
            return _run_stack(model, place, state, inputs, targets, {**given, **bounds})
    return _run_stack(model, place, state, inputs, targets, given)


def _run_stack(
    model: Any,
    place: Place,
    state: State,
    inputs: Mapping[str, torch.Tensor],
    targets: torch.Tensor | None,
    given: dict[str, Any],
) -> torch.Tensor | State:
    """:func:`run` of a model of one stack."""
    if place.span.start == 0:
        given["input_ids"] = state[0]
        if "segments" in inputs:
            given["token_type_ids"] = inputs["segments"]
    else:
        given["inputs_embeds"] = state[0]
    if place.last:
        return _end(model, given, inputs, targets)
    return model.get_submodule(base_name(model))(**given)[0]


def _end(
    model: Any, given: Mapping[str, Any], inputs: Mapping[str, torch.Tensor], targets: torch.Tensor | None
) -> torch.Tensor:
    if targets is None:
        return heads.read(model, given, inputs)
    return heads.loss(model, given, inputs, targets)


def _run_pair(
    model: Any,
    place: Place,
    state: State,
    inputs: Mapping[str, torch.Tensor],
    targets: torch.Tensor | None,
    given: dict[str, Any],
    table: nn.Module | None,
) -> torch.Tensor | State:
    """:func:`run` of an encoder and a decoder."""
    base, border, span = base_name(model), place.border, place.span
    assert border is not None
    is_before = span.start <= border
    memory = state[0] if is_before else state[1]
    if span.start < border:
        source = {"input_ids" if span.start == 0 else "inputs_embeds": state[0]}
        memory = model.get_submodule(within(base, "encoder"))(**source, **{**given, "use_cache": False})[0]
    h = {"input_ids": inputs["target_tokens"]}
    if table is not None:
        h = {"inputs_embeds": table(inputs["target_tokens"])}
    elif not is_before:
        h = {"inputs_embeds": state[0]}
    elif place.embeds_ahead and span.start > 0:
        h = {"inputs_embeds": state[1]}
    if span.stop <= border:
        return (memory, h["inputs_embeds"]) if place.embeds_ahead else memory
    if place.last:
        given |= {f"decoder_{name}": x for name, x in h.items()}
        return _end(model, {**given, "encoder_outputs": (memory,)}, inputs, targets)
    mask = given.pop("attention_mask", None)
    decoder = model.get_submodule(within(base, "decoder"))
    return decoder(**h, **given, encoder_hidden_states=memory, encoder_attention_mask=mask)[0], memory
