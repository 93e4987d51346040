"""Hugging Face models that train in every layout: losses of every kind of head, and stages of a pipeline.

:func:`as_trainable` gives a model of a known family the methods of :class:`PipelinedModel`, in place. A stage is the
model's own forward in which the modules of other stages are replaced by ones that pass through: a block keeps its
index, by which transformers chooses its mask, and everything keeps its name. Shapes: B batch, S sequence, T target
sequence, E hidden size.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..dropout import dropout_of
from ..pipeline_parallel import PipelinedModel, StageModule
from . import heads
from .anatomy import ANATOMIES, Anatomy, base_name, kind_of, model_type_of, within
from .stand_ins import replaced

Shape = tuple[int, ...]
State = tuple[torch.Tensor, ...]


@dataclass(frozen=True)
class Batch:
    """What a model as :func:`as_trainable` makes it is called with for logits, in the place of transformers' inputs."""

    tokens: torch.Tensor
    inputs: dict[str, torch.Tensor]


def as_trainable(model: Any) -> Any:
    """Give a Hugging Face model, in place, ``loss``, ``loss_and_gradients``, ``logits``, and stages; return it.

    Its own forward, names, state dict and methods stay. A model that is trainable already stays as it is.

    Raises:
        ValueError: a family, or a kind of head, that is not known, or a language model that sees what follows.
    """
    if isinstance(model, PipelinedModel):
        return model
    check_known(model)
    if kind_of(model) == "tokens" and getattr(model.config, "is_decoder", None) is False and _is_encoder(model):
        raise ValueError(
            f"{type(model).__name__}: expected config.is_decoder true of a model that predicts next tokens, received "
            "false, with which each token sees those that follow; set it, or take another kind of model"
        )
    kind: Any = type(model)
    model.__class__ = _trainable(kind)
    return model


def is_known(model: nn.Module) -> bool:
    """Return whether :func:`as_trainable` takes ``model``."""
    return kind_of(model) != ""


def check_known(model: nn.Module) -> None:
    """Raise ValueError, saying what to add, unless :func:`as_trainable` takes ``model``."""
    if is_known(model):
        return
    name = model_type_of(model)
    if name not in ANATOMIES:
        what = f"a model_type out of {', '.join(ANATOMIES)}, received {name!r}"
        remedy = f"add an Anatomy of {name!r} to hybrid/hugging_face/anatomy.py, which says where its blocks are"
    else:
        what = (
            "a causal language model, a sequence-to-sequence model, or one of sequence classification or question "
            f"answering, received {type(model).__name__}"
        )
        remedy = "take its class for one of these"
    raise ValueError(f"{type(model).__name__}: expected {what}; {remedy}")


def _is_encoder(model: nn.Module) -> bool:
    return model_type_of(model) in ("bert", "roberta")


@functools.cache
def _trainable(kind: Any) -> Any:
    """Return a class of ``kind`` and :class:`TrainableModel`, which looks like ``kind``."""

    # wraps: transformers reads the names of what it may pass off the signature.
    @functools.wraps(kind.forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        if len(args) == 1 and isinstance(args[0], Batch):
            return self._logits(args[0])
        if self.pipeline is not None:
            raise ValueError(
                f"forward: expected loss(), loss_and_gradients() or logits() of {type(self).__name__} with pp, where a "
                "rank has some of the blocks alone, received a call of the model; call one of these, or use pp1"
            )
        return kind.forward(self, *args, **kwargs)

    members = {"__module__": kind.__module__, "forward": forward, "plain_forward": staticmethod(kind.forward)}
    return type(kind.__name__, (TrainableModel, kind), members)


class TrainableModel(PipelinedModel):
    """In front of a Hugging Face model's class: what :class:`PipelinedModel` promises, and :meth:`logits`.

    Inputs are ``tokens``, int64 [B, S], and by name ``lengths``, int64 [B], tokens of each text before its padding
    (None: no padding), ``segments``, int64 [B, S], token types of a model that has them, and of a sequence-to-sequence
    model ``target_tokens``, int64 [B, T], what its decoder has seen. Targets, -100 where one does not count: [B, S] of
    the next token, [B, T] of a sequence-to-sequence model, [B, 1] of the class, [B, 2] of a span's first and last
    token.
    """

    plain_forward: Any
    config: Any

    @property
    def anatomy(self) -> Anatomy:
        """Return where its blocks are."""
        return ANATOMIES[model_type_of(self)]

    @property
    def kind(self) -> str:
        """Return the kind of its head; see :func:`kind_of`."""
        return kind_of(self)

    @property
    def border(self) -> int | None:
        """Return the number of an encoder's blocks, that a decoder's follow; None of a model with one stack."""
        return len(self._lists()["encoder"]) if self.anatomy.is_pair else None

    @property
    def blocks(self) -> list[nn.Module]:  # type: ignore[override]
        """Return all blocks, an encoder's before its decoder's."""
        return [block for stack in self._lists().values() for block in stack]

    def _lists(self) -> dict[str, list[nn.Module]]:
        found = {}
        for name, stack in self.anatomy.stacks.items():
            blocks: Any = self.get_submodule(within(base_name(self), name, stack.blocks))
            found[name] = list(blocks)
        return found

    def stage(self, blocks: range, *, first: bool, last: bool) -> HuggingFaceStage:
        return HuggingFaceStage(self, blocks, last)

    def train(self, mode: bool = True) -> Any:
        """Set the mode of training, of what the stages run, too."""
        super().train(mode)
        for stage in self.pipeline.parts.stages.values() if self.pipeline is not None else ():
            stage.train(mode)
        return self

    def loss(self, tokens: torch.Tensor, targets: torch.Tensor, **inputs: torch.Tensor) -> torch.Tensor:
        given = self._complete(tokens, inputs)
        if self.pipeline is not None:
            return self.pipeline.loss(tokens, targets, **given)
        with dropout_of(self).forward(len(tokens)):
            # By the call, not by forward: fully_shard's hooks hang on it.
            logits = self(Batch(tokens, given))
        return heads.summed_loss(logits, targets)

    def loss_and_gradients(
        self, tokens: torch.Tensor, targets: torch.Tensor, count: int | torch.Tensor, **inputs: torch.Tensor
    ) -> torch.Tensor:
        if self.pipeline is not None:
            return self.pipeline.loss_and_gradients(tokens, targets, count, **self._complete(tokens, inputs))
        return super().loss_and_gradients(tokens, targets, count, **inputs)

    @torch.no_grad()
    def logits(self, tokens: torch.Tensor, **inputs: torch.Tensor) -> torch.Tensor:
        """Return the whole logits on every rank, in any layout; every rank of a replica calls it.

        Returns:
            [B, S, V], [B, T, V], [B, 1, C], or [B, 2, S] of where a span starts and ends, -inf at padding.
        """
        given = self._complete(tokens, inputs)
        if self.pipeline is None:
            return self(Batch(tokens, given))
        shapes = {name: tuple(x.shape) for name, x in {"tokens": tokens, **given}.items()}
        border = self.border
        leaving = [_state_shapes(self, border, span.stop, shapes) for span in self.pipeline.parts.spans[:-1]]
        leaving.append([heads.shape(self.kind, self, shapes)])
        return self.pipeline.flow((tokens,), leaving, 0, **given)[0]

    def _logits(self, batch: Batch) -> torch.Tensor:
        """Return the logits, computed by the whole model in this process."""
        number = len(self.blocks)
        found = _run(self, range(number), self.border, True, (batch.tokens,), batch.inputs)
        assert isinstance(found, torch.Tensor)
        return found

    def _complete(self, tokens: torch.Tensor, inputs: Mapping[str, torch.Tensor | None]) -> dict[str, torch.Tensor]:
        """Return the inputs that there are, checked, and those that follow from the tokens.

        Raises:
            ValueError: an input that the model does not have, one that it lacks, or a text that is too long.
        """
        anatomy, kind = self.anatomy, self.kind
        given = {name: x for name, x in inputs.items() if x is not None}
        legal = ["lengths"] + ["segments"] * anatomy.segments + ["target_tokens"] * (kind == "pair")
        for name in given:
            if name not in legal:
                raise ValueError(
                    f"inputs: expected none but {', '.join(legal)} of {type(self).__name__}, received {name}"
                )
        if kind == "pair" and "target_tokens" not in given:
            raise ValueError(
                f"target_tokens: expected what the decoder of {type(self).__name__} has seen, received none"
            )
        if kind != "pair" and anatomy.is_pair:
            # The decoder of a text's class or span sees the text, as transformers' own forward lets it.
            start = torch.full_like(tokens[:, :1], self.config.decoder_start_token_id)
            given["target_tokens"] = torch.cat([start, tokens[:, :-1]], 1)
        if kind == "class" and anatomy.pools != "first":
            given["ends"] = heads.ends_of(anatomy, self, tokens, given.get("lengths"))
        for name, x in {"tokens": tokens, "target_tokens": given.get("target_tokens", tokens)}.items():
            self._check_length(name, x)
        return given

    def _check_length(self, name: str, x: torch.Tensor) -> None:
        if x.ndim != 2:
            raise ValueError(f"{name}: expected shape [B, S], received {tuple(x.shape)}")
        if not self.anatomy.positions:
            return
        before = self.anatomy.first_position
        most = self.config.max_position_embeddings - (self.config.pad_token_id + 1 if before is None else before)
        if x.shape[1] > most:
            raise ValueError(
                f"{name}: expected at most {most} a sample, for which {type(self).__name__} has positions "
                f"(config.max_position_embeddings), received {x.shape[1]}; cut the samples"
            )


class HuggingFaceStage(StageModule):
    """Blocks ``span`` of a Hugging Face model, with what acts before and behind them if they are ends.

    Its child ``model`` is transformers' own class, whose modules are the whole model's but for those of other stages.
    ``tied`` holds the whole model's modules that name parameters of this stage otherwise, so that they stay one.
    """

    def __init__(self, whole: TrainableModel, span: range, last: bool) -> None:
        super().__init__()
        self.span, self.last, self.border = span, last, whole.border
        base = base_name(whole)
        others: dict[str, nn.Module | None] = {}
        if not last:
            others |= {name: None for name, _ in whole.named_children() if name != base}
        if whole.anatomy.is_pair:
            # Each stack looks tokens up in a table of its own, which is the same parameter.
            others[within(base, "shared")] = None
        start = 0
        for name, stack in whole.anatomy.stacks.items():
            path = within(base, name)
            module = whole.get_submodule(path)
            length = len(whole._lists()[name])
            part = range(max(span.start - start, 0), min(span.stop - start, length))
            start += length
            others[path] = stack.part(module, part) if part else None
        self.model: Any = replaced(whole, others)
        self.tied = _Tied(self, whole)

    def forward(self, *state: torch.Tensor, **inputs: torch.Tensor) -> torch.Tensor | State:
        return _run(self.model, self.span, self.border, self.last, state, inputs)

    def input_shapes(self, batch: Mapping[str, Shape]) -> list[Shape]:
        return _state_shapes(self.model, self.border, self.span.start, batch)

    def output_shapes(self, batch: Mapping[str, Shape]) -> list[Shape]:
        if self.last:
            return [heads.shape(self.model.kind, self.model, batch)]
        return _state_shapes(self.model, self.border, self.span.stop, batch)

    def summed_loss(self, output: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return heads.summed_loss(output, targets)


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


def _state_shapes(model: Any, border: int | None, block: int, batch: Mapping[str, Shape]) -> list[Shape]:
    """Return the shapes of the state before block number ``block``, for a batch of these shapes."""
    if block == 0:
        return [batch["tokens"]]
    h = (*batch["tokens"], model.config.hidden_size)
    if border is None or block <= border:
        return [h]
    return [(*batch["target_tokens"], model.config.hidden_size), h]


def _run(
    model: Any, span: range, border: int | None, last: bool, state: State, inputs: Mapping[str, torch.Tensor]
) -> torch.Tensor | State:
    """Return the logits, of the last stage, or the state for the next.

    Args:
        model: the whole model, or a stage's.
        span: its blocks.
        border: see :func:`_border`.
        state: the tokens, or the state before its first block: h; where an encoder ends, its output, the memory; within
            the decoder behind it h and the memory.
    """
    given = _options(model)
    lengths = inputs.get("lengths")
    if lengths is not None:
        length = (state[0] if border is None or span.start <= border else state[1]).shape[1]
        given["attention_mask"] = (torch.arange(length, device=lengths.device) < lengths[:, None]).long()
    if border is not None:
        return _run_pair(model, span, border, last, state, inputs, given)
    if span.start == 0:
        given["input_ids"] = state[0]
        if "segments" in inputs:
            given["token_type_ids"] = inputs["segments"]
    else:
        given["inputs_embeds"] = state[0]
    if last:
        return heads.read(model, given, inputs)
    return model.get_submodule(base_name(model))(**given)[0]


def _run_pair(
    model: Any,
    span: range,
    border: int,
    last: bool,
    state: State,
    inputs: Mapping[str, torch.Tensor],
    given: dict[str, Any],
) -> torch.Tensor | State:
    """:func:`_run` of an encoder and a decoder."""
    base = base_name(model)
    memory = state[-1]
    if span.start < border:
        source = {"input_ids" if span.start == 0 else "inputs_embeds": state[0]}
        memory = model.get_submodule(within(base, "encoder"))(**source, **{**given, "use_cache": False})[0]
    if span.stop <= border:
        return memory
    if span.start > border:
        h = {"inputs_embeds": state[0]}
    else:
        h = {"input_ids": inputs["target_tokens"]}
    if last:
        given |= {f"decoder_{name}": x for name, x in h.items()}
        return heads.read(model, {**given, "encoder_outputs": (memory,)}, inputs)
    mask = given.pop("attention_mask", None)
    decoder = model.get_submodule(within(base, "decoder"))
    return decoder(**h, **given, encoder_hidden_states=memory, encoder_attention_mask=mask)[0], memory


def _options(model: Any) -> dict[str, Any]:
    """Return what a forward is told, whatever the config says."""
    return {"use_cache": False} if getattr(model.config, "use_cache", None) is not None else {}
