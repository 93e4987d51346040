"""Lines that a language model is asked: texts, and as JSON prompts and chats that end with a user's turn."""

from __future__ import annotations

import json
from typing import Any

from .records import ASSISTANT, Chat, messages_of, text_in, without_weights

_KEYS = ("messages", "prompt")


def _object_of(line: str) -> dict[str, Any] | None:
    """Return the JSON object with messages or a prompt that a line is; None of any other line."""
    if not line.lstrip().startswith("{"):
        return None
    try:
        found = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) and any(key in found for key in _KEYS) else None


def read_question(line: str, where: str) -> Chat | str | None:
    """Return the chat or the prompt of a line that is one as JSON; None of a line that is text.

    Raises:
        ValueError: it cannot be answered.
    """
    item = _object_of(line)
    if item is None:
        return None
    if "messages" not in item:
        prompt = text_in(item, "prompt", where)
        if not prompt:
            raise ValueError(f"{where}: expected a prompt to continue, received an empty text")
        return prompt
    messages, tools = messages_of(item, where)
    if messages[-1]["role"] == ASSISTANT:
        raise ValueError(
            f"{where}: expected a chat that ends with the user's turn, which the model answers, received one that ends "
            f"with the turn of {ASSISTANT!r}; leave its last message out"
        )
    return Chat(without_weights(messages), tools, ())


def as_chat(line: str, where: str) -> str:
    """Return a line as a chat: one that is text, or a prompt, as a user's message."""
    item = _object_of(line)
    if item is not None and "messages" in item:
        return line
    text = line if item is None else text_in(item, "prompt", where)
    return json.dumps({"messages": [{"role": "user", "content": text}]})


def written(line: str, answer: str) -> str:
    """Return an answer in one line, of the kind of the line that it answers: a message to a chat, a completion to a
    prompt, a text, in which ``\\n`` stands for a newline, to a text."""
    item = _object_of(line)
    if item is None:
        return answer.replace("\n", "\\n")
    found = {"role": ASSISTANT, "content": answer} if "messages" in item else {"completion": answer}
    return json.dumps(found, ensure_ascii=False)
