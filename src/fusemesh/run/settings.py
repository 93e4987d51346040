"""Settings of a run, checked in one process before torch is imported or any rank starts."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fusemesh import config as configuration
from fusemesh.config import Config
from fusemesh.hybrid.layout import Layout
from fusemesh.hybrid.pipeline_options import PipelineOptions
from fusemesh.models.registry import maker_of
from fusemesh.tasks.registry import defaults_of, task_class


def load_config(
    path: str | os.PathLike[str] | None = None,
    overrides: Mapping[str, str] | None = None,
    *,
    base: Mapping[str, Any] | None = None,
) -> Config:
    """Return the configuration as :func:`fusemesh.config.load` does, with the defaults of the use beneath.

    Raises:
        ValueError: as :func:`fusemesh.config.load`; or there is no such task, or no such pretrained model; or
            ``data.packing`` is given with a new language model.
    """
    config = configuration.load(path, overrides, base=base, defaults=_defaults)
    is_new = config.task == "language_model" and not config.model.pretrained
    # Whatever is saved holds the default.
    if is_new and ("data.packing" in (overrides or {}) or not config.data.packing):
        raise ValueError(
            "data.packing: expected nothing with a new language model, whose samples are windows of one stream of "
            f"bytes, received {str(config.data.packing).lower()}; leave it out, or give model.pretrained, whose "
            "documents are packed"
        )
    return config


def _defaults(values: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the defaults of a task, or those of fine-tuning a pretrained model for it, given the known values.

    The length of samples is that of the task's own corpus, and left out where there are other data or another model.
    """
    found = dict(defaults_of(values.get("task", configuration.fields_of(Config)["task"].default)))
    if values.get("model.pretrained"):
        from fusemesh.pretrained.defaults import fine_tuning_defaults

        kept = {key: value for key, value in found.items() if not key.startswith(("model.", "training.", "data."))}
        return {**kept, **fine_tuning_defaults(values)}
    if values.get("data.path"):
        found.pop("data.sequence_length", None)
    return found


# Keys that decide what a model is.
MODEL_KEYS = ("task", "model.", "data.sequence_length")


def first_change(saved: Config, config: Config, keys: tuple[str, ...]) -> tuple[str, Any, Any] | None:
    """Return the first of these keys, or of those that begin so, whose values differ, with both; None if none does."""
    for key in configuration.fields_of(Config):
        old, new = configuration.get(saved, key), configuration.get(config, key)
        if key.startswith(keys) and old != new:
            return key, old, new
    return None


def pipeline_options(config: Config) -> PipelineOptions:
    """Return the configured pipeline options.

    Raises:
        ValueError: they do not fit each other; named by their keys.
    """
    return PipelineOptions(**dataclasses.asdict(config.pipeline))


@dataclass(frozen=True)
class Settings:
    """A run's configuration, with its layout and pipeline options as the parallel layer takes them.

    Made by :meth:`of`, the one place where the configured layout is parsed.
    """

    config: Config
    layout: Layout
    pipeline: PipelineOptions

    @classmethod
    def of(cls, config: Config) -> Settings:
        """Return the settings of a configuration.

        Raises:
            ValueError: the layout is none, or the pipeline options do not fit each other.
        """
        return cls(config, Layout.parse(config.layout), pipeline_options(config))

    def check(self, world_size: int) -> None:
        """Check that this many ranks can run the configured model in the layout.

        Raises:
            ValueError: they cannot; named by the key to change. No communication has happened.
        """
        config, layout = self.config, self.layout
        layout.validate(
            world_size=world_size,
            sequence_length=config.data.sequence_length,
            virtual_stages=self.pipeline.virtual_stages,
            **maker_of(config).sizes(task_class(config.task).stacks),
        )
        if layout.pp > 1:
            self.pipeline.evaluating().microbatches_of(layout.pp, config.evaluation.batch_size, "evaluation.batch_size")
