"""Hugging Face models that train in every layout: losses of every kind of head, and stages of a pipeline.

:func:`as_trainable` gives a model of a known family the methods of :class:`PipelinedModel`, in place. Shapes: B batch,
S sequence, T target sequence, V vocabulary, C classes.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..dropout import dropout_of
from ..pipeline_parallel import PipelinedModel
from . import generating, heads
from .anatomy import ANATOMIES, Anatomy, kind_of, model_type_of
from .stage import HuggingFaceStage, Place, border_of, run, stacks_of


@dataclass(frozen=True)
class Batch:
    """What a model as :func:`as_trainable` makes it is called with, in the place of transformers' inputs: for logits,
    or with targets for the loss summed over them."""

    tokens: torch.Tensor
    inputs: dict[str, torch.Tensor]
    targets: torch.Tensor | None = None


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
            return self._run(args[0])
        if self.pipeline is not None and self.next_logits is not None:
            return self.next_logits(self, *args, **kwargs)
        if self.pipeline is not None:
            raise ValueError(
                f"forward: expected loss(), loss_and_gradients(), logits() or generate() of {type(self).__name__} with "
                "pp, where a rank has some of the blocks alone, received a call of the model; call one of these, or "
                "use pp1"
            )
        return kind.forward(self, *args, **kwargs)

    members = {"__module__": kind.__module__, "forward": forward, "plain_forward": staticmethod(kind.forward)}
    if hasattr(kind, "generate"):

        @functools.wraps(kind.generate)
        def generate(self: Any, *args: Any, **options: Any) -> Any:
            if self.pipeline is None:
                return kind.generate(self, *args, **options)
            given = inspect.signature(kind.generate).bind_partial(self, *args, **options).arguments
            options = {name: x for name, x in given.items() if name not in ("self", "kwargs")}
            return generating.over_stages(self, kind.generate, {**options, **given.get("kwargs", {})})

        members["generate"] = generate
    return type(kind.__name__, (TrainableModel, kind), members)


class TrainableModel(PipelinedModel):
    """In front of a Hugging Face model's class: what :class:`PipelinedModel` promises, and :meth:`logits`.

    Inputs are ``tokens``, int64 [B, S], and by name ``lengths``, int64 [B], tokens of each text before its padding
    (None: no padding), ``segments``, int64 [B, S], token types of a model that has them, of a language model
    ``positions``, int64 [B, S], which begin at 0 with each of the documents that share a row, and of a sequence-to-
    sequence model ``target_tokens``, int64 [B, T], what its decoder has seen. Targets, -100 where one does not count:
    [B, S] of the next token, [B, T] of a sequence-to-sequence model, [B, 1] of the class, [B, 2] of a span's first and
    last token.
    """

    plain_forward: Any
    config: Any
    # Within generate() with pp: what a call of the model returns.
    next_logits: Any = None

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
        return border_of(self)

    @property
    def blocks(self) -> list[nn.Module]:  # type: ignore[override]
        """Return all blocks, an encoder's before its decoder's; with pp those of this rank."""
        return [block for stack in stacks_of(self).values() for block in stack]

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
            found: torch.Tensor = self(Batch(tokens, given, targets))
        return found

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
        stage: Any = next(iter(self.pipeline.parts.stages.values()))
        leaving = [stage.state_shapes(span.stop, shapes) for span in self.pipeline.parts.spans[:-1]]
        leaving.append([heads.shape(self.kind, self, shapes)])
        return self.pipeline.flow((tokens,), leaving, 0, **given)[0]

    def _run(self, batch: Batch) -> torch.Tensor:
        """Return the logits or the loss, computed by the whole model in this process."""
        whole = Place(range(len(self.blocks)), border_of(self), last=True)
        found = run(self, whole, (batch.tokens,), batch.inputs, batch.targets)
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
        legal += ["positions"] * (kind == "tokens")
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
