"""A new Transformer of the configured sizes as the model of a run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from .base import ModelMaker

if TYPE_CHECKING:
    import torch

    from fusemesh.hybrid.planner.model import ModelDescription
    from fusemesh.tasks.base import Task
    from fusemesh.tasks.tokens import Tokens
    from fusemesh.transformer import Transformer


class OwnModel(ModelMaker):
    """See the module."""

    def sizes(self, stacks: int) -> dict[str, Any]:
        model = self.config.model
        return {
            "num_layers": model.num_layers * stacks,
            "num_heads": model.num_heads,
            "num_kv_heads": model.num_kv_heads,
            "intermediate_size": model.intermediate_size,
            "sequence_parallel": self.config.run.sequence_parallel,
        }

    @property
    def longest(self) -> int:
        return self.config.data.sequence_length

    def tokens(self) -> Tokens:
        from fusemesh.tasks.tokens import Bytes

        return Bytes()

    def build(self, task: Task) -> Transformer:
        import torch

        from fusemesh.transformer import Transformer

        training = self.config.training
        return Transformer(
            task.model_config(),
            backend=self.config.run.backend,
            seed=training.seed,
            dtype=torch.float64 if training.dtype == "float64" else torch.float32,
        )

    def describe(self, task: Task) -> ModelDescription:
        from fusemesh.transformer.description import describe

        return describe(task.model_config())

    def generate(
        self, model: Any, prompts: Sequence[torch.Tensor], *, ends: Sequence[int] = (), **options: Any
    ) -> list[torch.Tensor]:
        from fusemesh.transformer.generation import generate

        assert len(ends) <= 1
        return generate(model, prompts, end=ends[0] if ends else None, **options)
