"""Records of a language model: texts, prompts with their completions, and chats; errors name file, line and remedy."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from fusemesh.tasks.encodings import check_characters
from fusemesh.tasks.records import json_objects

ENDINGS = (".jsonl", ".ndjson")
ASSISTANT = "assistant"


@dataclass(frozen=True)
class Text:
    """A text whose every token is a target."""

    text: str


@dataclass(frozen=True)
class Completion:
    """A prompt, and the completion of which every token is a target."""

    prompt: str
    completion: str


@dataclass(frozen=True)
class Chat:
    """Messages as a chat template takes them, of which the assistant's are targets; and its tools.

    trained: the numbers of the messages to train on: the assistant's, but for those with a weight of 0.
    """

    messages: list[dict[str, Any]]
    tools: list[Any] | None
    trained: tuple[int, ...]


Value = Text | Completion | Chat
# Keys of a record by its kind; those in brackets are optional.
KINDS = {Text: "text", Completion: "prompt and completion", Chat: "messages"}


@dataclass(frozen=True)
class Entry:
    """One record, where it stands, and the name by whose hash it is held out: equal prompts have equal names."""

    value: Value
    where: str
    name: str


@dataclass(frozen=True)
class Columns:
    """The keys of a record, as ``data.columns`` names them.

    Raises:
        ValueError: they are more than two.
    """

    given: str = ""

    def __post_init__(self) -> None:
        if len(self.names) > 2 or (self.given and not all(self.names)):
            raise ValueError(
                "data.columns: expected one name, of the text or the messages, or two, of prompt and completion or of "
                f"messages and tools, received {self.given!r}; separate them by a comma"
            )

    @property
    def names(self) -> list[str]:
        """The names; [] where the records have the usual ones."""
        return [name.strip() for name in self.given.split(",")] if self.given else []

    def renamed(self, found: Mapping[str, Any], where: str) -> Mapping[str, Any]:
        """Return an object with the usual keys."""
        names = self.names
        if not names:
            return found
        missing = [name for name in names if name not in found]
        is_chat = isinstance(found.get(names[0]), list)
        if is_chat:
            missing = missing[:1] if missing[:1] == names[:1] else []
        if missing:
            raise ValueError(
                f"{where}: expected a key {missing[0]!r}, as data.columns says, received "
                f"{', '.join(map(repr, found)) or 'none'}; rename it, or change data.columns"
            )
        usual = ("messages", "tools") if is_chat else ("prompt", "completion") if len(names) == 2 else ("text",)
        return {key: found.get(name) for key, name in zip(usual, names, strict=False)}


def entries_of(text: str, file: str, columns: Columns, line: int = 1, kind: type | None = None) -> Iterator[Entry]:
    """Yield the records of JSON lines, which are all of one kind.

    Args:
        file: for messages.
        line: number of the first line.
        kind: of the records; None: that of the first.

    Raises:
        ValueError: a line is broken, is no record, or is of another kind than the lines before it.
    """
    for number, found in json_objects(text, file, line):
        where = f"{file}, line {number}"
        value = _value(found, columns, where)
        kind = kind or type(value)
        if type(value) is not kind:
            raise ValueError(
                f"{where}: expected {KINDS[kind]}, as in the lines before it, received {KINDS[type(value)]}; give "
                "records of each kind in a file of their own"
            )
        yield Entry(value, where, _name(value))


def kind_in(text: str, file: str, columns: Columns) -> type | None:
    """Return the kind of the first record of JSON lines; None if there is none."""
    first = next(iter(entries_of(text, file, columns)), None)
    return None if first is None else type(first.value)


def _value(found: Any, columns: Columns, where: str) -> Value:
    if not isinstance(found, dict):
        raise ValueError(f"{where}: expected a JSON object, received a {type(found).__name__}; write one object a line")
    item = columns.renamed(found, where)
    if "messages" in item:
        return _chat(item, where)
    if "prompt" in item and "completion" in item:
        return Completion(text_in(item, "prompt", where), text_in(item, "completion", where))
    if "text" in item:
        return Text(text_in(item, "text", where))
    raise ValueError(
        f"{where}: expected the key text, the keys prompt and completion, or the key messages, received "
        f"{', '.join(map(repr, item)) or 'none'}; rename them, or name them by data.columns"
    )


def text_in(item: Mapping[str, Any], key: str, where: str) -> str:
    value = item[key]
    if not isinstance(value, str):
        shown = json.dumps(value)
        raise ValueError(
            f"{where}: expected a text as {key!r}, received {shown if len(shown) < 60 else shown[:56] + ' ...'}; write "
            "it as a text, or drop the record"
        )
    check_characters(value, where)
    return value


def _chat(item: Mapping[str, Any], where: str) -> Chat:
    messages, tools = messages_of(item, where)
    last = messages[-1]["role"]
    if last != ASSISTANT:
        raise ValueError(
            f"{where}: expected a chat that ends with the assistant's turn, of which a model learns, received one that "
            f"ends with the turn of {last!r}; add the answer, or drop the turn"
        )
    trained = tuple(n for n, m in enumerate(messages) if m["role"] == ASSISTANT and m.get("weight", 1) != 0)
    return Chat(without_weights(messages), tools, trained)


def without_weights(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return messages as a template takes them."""
    return [{key: value for key, value in message.items() if key != "weight"} for message in messages]


def messages_of(item: Mapping[str, Any], where: str) -> tuple[list[dict[str, Any]], list[Any] | None]:
    """Return the messages of a chat and its tools; raise ValueError where they are none."""
    messages = item["messages"]
    if not isinstance(messages, list) or not messages:
        found = "an empty list" if messages == [] else f"a {type(messages).__name__}"
        raise ValueError(f"{where}: expected messages as a list of objects with role and content, received {found}")
    for number, message in enumerate(messages, 1):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            keys = ", ".join(map(repr, message)) if isinstance(message, dict) else f"a {type(message).__name__}"
            raise ValueError(
                f"{where}, message {number}: expected an object with role and content, received {keys}; write "
                '{"role": "user", "content": "..."}'
            )
        if message.get("content") is None and not (message["role"] == ASSISTANT and message.get("tool_calls")):
            raise ValueError(
                f"{where}, message {number}: expected a content, received none; write it, or drop the chat"
            )
    check_characters(json.dumps(messages, ensure_ascii=False), where)
    tools = item.get("tools")
    if tools is not None and not isinstance(tools, list):
        raise ValueError(f"{where}: expected tools as a list of JSON schemas, received a {type(tools).__name__}")
    return messages, tools or None


def _name(value: Value) -> str:
    """Return the text by whose hash a record is held out: what stands before the last thing that is learned."""
    if isinstance(value, Text):
        return value.text
    if isinstance(value, Completion):
        return value.prompt
    return json.dumps(value.messages[:-1] or value.messages, sort_keys=True)


def is_blank(value: Value) -> bool:
    """Return whether a record has nothing to learn: no text, no completion, or no turn to train on."""
    if isinstance(value, Chat):
        return not value.trained
    return not (value.text if isinstance(value, Text) else value.completion).strip()
