"""A Hugging Face folder as the model of a run: built on meta, placed, filled from the folder, exported as one."""

from __future__ import annotations

import dataclasses
import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fusemesh.models.base import ModelMaker

from . import folder
from .defaults import say_defaults

if TYPE_CHECKING:
    import torch

    from fusemesh.config import Config
    from fusemesh.hybrid.planner.model import ModelDescription
    from fusemesh.tasks.base import Task
    from fusemesh.tasks.tokens import Tokens

logger = logging.getLogger("fusemesh")

# The folder of a run into which the model is exported.
MODEL = "model"
# In the metadata of checkpoints: names that the configuration ties and the source's files did not.
_UNTIED = "untied"


class PretrainedModel(ModelMaker):
    """See the module."""

    refines = True

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        # Of a new run: how its model is exported, when it has weights, and which of them are untied.
        self.plan: dict[str, Any] | None = None
        self.untied: list[str] = []

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

    def tokens(self) -> Tokens:
        from .tokenizer import FolderTokens

        return FolderTokens(self.path)

    def labels(self) -> list[str]:
        config = folder.config_of(self.path)
        made = (list(getattr(config, "architectures", None) or []) or [""])[0]
        return [config.id2label[n] for n in sorted(config.id2label)] if made.endswith(folder.CLASSIFIER) else []

    def check(self) -> None:
        config = self.config
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
        untied, changed = task.metadata.get(_UNTIED), task.pretrained_config()
        model, self.untied = build(self.path, self.config.task, dtype=dtype, untied=untied, **changed)
        if changed and model.config.pad_token_id is None:
            # transformers asks for it where texts are classified together. The embedding is there already: told before,
            # it would never train that row.
            model.config.pad_token_id = self.tokens().pad
        return model

    def check_beginning(self, task: Task) -> None:
        from fusemesh.hybrid.hugging_face.names import check_tensors, match, own_state

        source, model = folder.read(self.path), self.build(task)
        try:
            matched = match(model, source)
            check_tensors(source, matched, own_state(model))
        except ValueError as error:
            raise ValueError(f"{folder.KEY}: {error}") from error
        if matched.missing and self.config.task == "language_model":
            raise ValueError(
                f"{folder.KEY}: expected all weights of a {type(model).__name__} in {self.path!r}, received none of "
                f"{_some(matched.missing)}: training would begin with random ones; give the whole model's folder"
            )

    def begin(self, model: Any) -> None:
        from fusemesh.hybrid.checkpoint.together import rank
        from fusemesh.hybrid.hugging_face.load import load_pretrained
        from fusemesh.hybrid.hugging_face.merge import export_plan

        source = folder.read(self.path)
        report = load_pretrained(model, source, seed=self.config.training.seed)
        self.plan = export_plan(model, source)
        if rank() == 0:
            for line in report.notes:
                logger.info("%s", line)
            if report.newly_initialised:
                logger.warning("new, to be trained: %s", _some(report.newly_initialised))
            if report.unexpected:
                logger.warning("in the folder and not of this model: %s", _some(report.unexpected))

    def give_memory(self, model: Any, device: torch.device) -> None:
        model.to_empty(device=device)

    def metadata(self) -> dict[str, Any]:
        return {} if self.plan is None else {"export": self.plan, _UNTIED: self.untied}

    def found_in(self, checkpoints: str | os.PathLike[str]) -> Config:
        kept = folder.kept_in(checkpoints)
        if kept is None:
            return self.config
        model = dataclasses.replace(self.config.model, pretrained=str(kept.absolute()))
        return dataclasses.replace(self.config, model=model)

    def keep(self, checkpoints: str | os.PathLike[str]) -> None:
        from fusemesh.hybrid.hugging_face.exports.documents import keep_small_files

        keep_small_files(Path(self.path), Path(checkpoints))

    def export(self, model: Any, metadata: Mapping[str, Any], run: str | os.PathLike[str]) -> str | None:
        from .exporting import export_as_planned

        if not self.config.run.export:
            return None
        target = Path(run) / MODEL
        export_as_planned(model, target, metadata["export"], Path(run) / "checkpoints" / folder.KEPT)
        return str(target)

    def describe(self, task: Task) -> ModelDescription:
        from .description import describe_model

        return describe_model(self.build(task), self.path)

    def generate(self, model: Any, prompts: Sequence[torch.Tensor], **options: Any) -> list[torch.Tensor]:
        from .generation import generate

        return generate(model, prompts, defaults=folder.generation_config_of(self.path), **options)


def _some(names: Sequence[str]) -> str:
    """Return the first of some names, and how many others there are."""
    return ", ".join(names[:4]) + (f" and {len(names) - 4} others" if len(names) > 4 else "")
