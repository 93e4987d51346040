"""The interface of what makes a run's model, for the trainer, the evaluator and the predictor: build, fill, keep."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from fusemesh.config import Config
    from fusemesh.hybrid.planner.model import ModelDescription
    from fusemesh.tasks.base import Task
    from fusemesh.tasks.tokens import Tokens


class ModelMaker(ABC):
    """Makes the model of a configuration.

    ``refines`` says whether it begins with the weights of an earlier training, so that defaults are those of
    fine-tuning and the model can be exported for others.
    """

    refines = False

    def __init__(self, config: Config) -> None:
        self.config = config

    @abstractmethod
    def sizes(self, stacks: int) -> dict[str, Any]:
        """Return those arguments of :meth:`fusemesh.hybrid.layout.Layout.validate` that the model decides.

        Args:
            stacks: of the task's model; see :class:`fusemesh.tasks.base.Task`.
        """

    @property
    @abstractmethod
    def longest(self) -> int:
        """The most tokens that the model takes at once: of a prompt and its continuation together."""

    @abstractmethod
    def tokens(self) -> Tokens:
        """Return how texts become the model's tokens."""

    def labels(self) -> list[str]:
        """Return the labels that a classifier's head has already, in its order; [] if it is new."""
        return []

    def check(self) -> None:  # noqa: B027 (a new model can always be made)
        """Check in one process, before ranks start, that the model can be made for the configured task.

        Raises:
            ValueError: it cannot; names the key, and the remedy.
        """

    def say_settings(self) -> str:
        """Return in a line with which settings the model is trained that users may not expect; "" for none."""
        return ""

    def entries(self) -> dict[str, Any]:
        """Return, as JSON by the name that errors say, what must be the same on all ranks before they build a model."""
        return {}

    @abstractmethod
    def build(self, task: Task) -> Any:
        """Return the task's model, whole, before it is placed: a :class:`PipelinedModel` with loss() and logits().

        On the CPU with the values that it begins with, or on meta.
        """

    def check_beginning(self, task: Task) -> None:  # noqa: B027 (a new model has its own weights)
        """Check in one process, before ranks start, the weights with which a new run begins.

        Raises:
            ValueError: they are another model's, or not all of them are there.
        """

    def begin(self, model: Any) -> None:  # noqa: B027 (a new model has its values when it is built)
        """Give a placed model the weights with which a new run begins; every rank calls it.

        Raises:
            ValueError: they cannot be read, or are another model's.
        """

    def give_memory(self, model: Any, device: torch.device) -> None:  # noqa: B027 (a new model has it when it is built)
        """Give a placed model memory for the weights of a checkpoint; every rank calls it."""

    def metadata(self) -> dict[str, Any]:
        """Return, as JSON by name, what a new run's checkpoints say of the model beside its weights and configuration.

        It joins the metadata of the task, by which the model of a checkpoint is built.
        """
        return {}

    def found_in(self, checkpoints: str | os.PathLike[str]) -> Config:
        """Return the configuration by which the model finds what :meth:`keep` has written beside checkpoints."""
        return self.config

    def keep(self, checkpoints: str | os.PathLike[str]) -> None:  # noqa: B027 (a configuration says all of a new model)
        """Write beside a run's checkpoints what the model needs beside the weights; rank 0 calls it."""

    def export(self, model: Any, metadata: Mapping[str, Any], run: str | os.PathLike[str]) -> str | None:
        """Write the placed model of a run for other libraries, if it is one of theirs; every rank calls it.

        Args:
            metadata: of the run's checkpoints.
            run: its folder.

        Returns:
            The folder within it; None where there is nothing to write.
        """
        return None

    @abstractmethod
    def describe(self, task: Task) -> ModelDescription:
        """Return the task's model as the planner sees it."""

    @abstractmethod
    def generate(
        self,
        model: Any,
        prompts: Sequence[torch.Tensor],
        *,
        max_new_tokens: int,
        begin: int | None = None,
        ends: Sequence[int] = (),
        sampling: Any = None,
        num_beams: int = 1,
        seed: int = 0,
        on_token: Callable[[int, int], None] | None = None,
        on_score: Callable[[int, float], None] | None = None,
    ) -> list[torch.Tensor]:
        """Return the tokens that a model of texts adds to each prompt, or that one of sequence to sequence makes of
        each source; see :func:`fusemesh.generate`.

        Args:
            begin: the token with which the decoder of a sequence-to-sequence model begins; None of other models.
            ends: tokens each of which ends a row.
        """
