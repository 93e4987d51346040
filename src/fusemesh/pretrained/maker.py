"""A Hugging Face folder as the model of a run: built on meta, placed, filled from the folder, exported as one."""

from __future__ import annotations

import dataclasses
import logging
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from fusemesh.models.base import ModelMaker
from fusemesh.tasks.names import PRETRAINED_TASKS

from . import folder
from .defaults import say_defaults

if TYPE_CHECKING:
    import torch

    from fusemesh.config import Config
    from fusemesh.hybrid.layout import Layout
    from fusemesh.hybrid.planner.model import ModelDescription
    from fusemesh.tasks.base import Task

logger = logging.getLogger("fusemesh")


class PretrainedModel(ModelMaker):
    """See the module."""

    refines = True

    @property
    def path(self) -> str:
        """The folder: the user's, or the small files of it that a run has kept."""
        return self.config.model.pretrained

    def sizes(self, stacks: int) -> dict[str, Any]:
        from .build import sizes_of

        # Tables of Hugging Face's models split no activations along the sequence.
        return {**sizes_of(folder.config_of(self.path)), "sequence_parallel": False}

    @property
    def longest(self) -> int:
        from .build import longest

        found = longest(folder.config_of(self.path))
        return 2**20 if found is None else found

    def check(self) -> None:
        config = self.config
        if config.task not in PRETRAINED_TASKS:
            raise ValueError(
                f"{folder.KEY}: expected task {' or '.join(PRETRAINED_TASKS)}, whose texts a pretrained model's tokenizer can "
                f"read, received {config.task}; leave it out to train a new model"
            )
        folder.check_task(folder.config_of(self.path), self.path, config.task)
        if config.data.sequence_length > self.longest:
            raise ValueError(
                f"data.sequence_length: expected at most {self.longest}, for which {self.path!r} has positions, "
                f"received {config.data.sequence_length}"
            )

    def say_settings(self) -> str:
        return say_defaults(self.config.training, self.config.data.sequence_length)

    def entries(self) -> dict[str, Any]:
        return {folder.KEY: folder.fingerprint(self.path)}

    def build(self, task: Task) -> Any:
        import torch

        from .build import build

        dtype = torch.float64 if self.config.training.dtype == "float64" else torch.float32
        return build(self.path, self.config.task, dtype=dtype)

    def begin(self, model: Any) -> None:
        from .standin import load_pretrained

        load_pretrained(model, folder.read(self.path))

    def give_memory(self, model: Any, device: torch.device) -> None:
        model.to_empty(device=device)

    def found_in(self, run: str | os.PathLike[str]) -> Config:
        kept = folder.kept_in(run)
        if kept is None:
            return self.config
        model = dataclasses.replace(self.config.model, pretrained=str(kept.absolute()))
        return dataclasses.replace(self.config, model=model)

    def keep(self, run: str | os.PathLike[str]) -> None:
        folder.keep(self.path, run)

    def describe(self, task: Task) -> ModelDescription:
        from fusemesh.hybrid.planner.published import find_model

        return find_model(self.path)

    def check_generating(self, layout: Layout) -> None:
        if layout.pp > 1:
            other = str(dataclasses.replace(layout, pp=1))
            raise ValueError(
                f"layout: expected one without pp, over whose stages transformers' generate() does not go, received "
                f"{layout}; give --layout {other if ' ' not in other else repr(other)}: a model is loaded in any layout"
            )

    def generate(self, model: Any, prompts: Sequence[torch.Tensor], **options: Any) -> list[torch.Tensor]:
        from .generation import generate

        return generate(model, prompts, **options)
