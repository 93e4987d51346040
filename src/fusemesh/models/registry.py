"""The maker of a configuration's model."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fusemesh.config import Config

    from .base import ModelMaker


def maker_of(config: Config) -> ModelMaker:
    """Return what makes the model of a run; nothing is read yet."""
    if config.model.pretrained:
        from fusemesh.pretrained.maker import PretrainedModel

        return PretrainedModel(config)
    from .own import OwnModel

    return OwnModel(config)
