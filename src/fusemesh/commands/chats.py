"""What commands that ask a language model share about chats."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fusemesh.config import Config


def check_chats(config: Config) -> None:
    """Check that a model's folder has a chat template to ask by; raise ValueError by ``--chat`` if not."""
    from fusemesh.models.registry import maker_of

    if not _takes_json(config):
        kind = f"of task {config.task}" if config.model.pretrained else "whose tokens are bytes"
        raise ValueError(
            f"--chat: expected a pretrained language model, whose folder has a chat template, received a model {kind}; "
            "leave it out"
        )
    tokens: Any = maker_of(config).tokens()
    tokens.chats.check()


def writer_of(config: Config) -> Callable[[str, str], str]:
    """Return what makes the line to write of a line that was asked and its answer."""
    from fusemesh.tokenized.questions import written

    return written if _takes_json(config) else lambda line, answer: answer


def _takes_json(config: Config) -> bool:
    """Return whether lines may be chats and prompts in JSON."""
    from fusemesh.tasks.registry import task_class

    return bool(config.model.pretrained) and task_class(config.task).continues_texts
