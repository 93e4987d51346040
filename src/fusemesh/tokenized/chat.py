"""Chats as tokens: rendered by a chat template, with the assistant's turns as targets, their ends among them.

The turns are found by the template's own marks ({% generation %}); without marks by rendering growing prefixes of the
chat, each of which must be the beginning of the next, in text and in tokens. Templates render beginning tokens
themselves, so the tokenizer adds none.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from .document import Document
from .records import ASSISTANT, Chat, Entry

_MARK = re.compile(r"\{%-?\s*generation\s*-?%\}")
_FILE = "chat_template.jinja"
_Cut = tuple[int, bool]  # so many messages, and whether the prompt of an answer follows


class ChatTemplate:
    """The chat template of a tokenizer.

    Args:
        tokenizer: of transformers.
        end: the token that ends a text.
        path: the folder, for messages.
    """

    def __init__(self, tokenizer: Any, end: int, path: str) -> None:
        self.tokenizer, self.end, self.path = tokenizer, end, path
        added = tokenizer.added_tokens_decoder
        # A turn ends with one of these; a template's line end behind it is nobody's to learn.
        self.specials = {end, *tokenizer.all_special_ids, *(n for n, token in added.items() if token.special)}

    def documents(self, entries: Sequence[Entry]) -> list[Document]:
        """Return chats as documents; raise ValueError, with file and line, where the turns cannot be told apart."""
        chats = [(entry.value, entry.where) for entry in entries if isinstance(entry.value, Chat)]
        # Texts are made tokens of together; of a chat with marks there are none here.
        rendered: list[list[tuple[_Cut, str]]] = []
        for chat, where in chats:
            source = self._source(
                chat.tools, where, "for records with messages", "give records with prompt and completion"
            )
            has_marks = _MARK.search(source)
            rendered.append([] if has_marks else self._prefixes(chat, where))
        rows = iter(self._rows([text for prefixes in rendered for _, text in prefixes]))
        found = []
        for (chat, where), prefixes in zip(chats, rendered, strict=True):
            own = list(itertools.islice(rows, len(prefixes)))
            spans = self._by_prefixes(where, prefixes, own) if prefixes else self._by_marks(chat, where)
            found.append(self._document(chat, *spans))
        return found

    def check(self) -> None:
        """Raise ValueError if there is no template to ask by."""
        self._source(None, "--chat", "to ask by", "leave --chat out")

    def question(self, chat: Chat, where: str) -> tuple[list[int], int]:
        """Return the tokens of a chat and of what the template writes before an answer, and the token that ends one.

        Raises:
            ValueError: there is no template, or it refuses the chat.
        """
        self._source(chat.tools, where, "for a line with messages", "give lines of text")
        ids = self._rows([str(self._apply(chat, len(chat.messages), where, True, tokenize=False))])[0]
        answer = {"role": ASSISTANT, "content": "Yes."}
        answered = Chat([*chat.messages, answer], chat.tools, (len(chat.messages),))
        try:
            (document,) = self.documents([Entry(answered, where, "")])
        except ValueError:
            # Its answers cannot be told apart, or follow no such turn.
            return ids, self.end
        return ids, int(document.ids[np.flatnonzero(document.counts)[-1]])

    def _document(self, chat: Chat, ids: list[int], spans: list[tuple[int, int]]) -> Document:
        """Return tokens with those of some places as targets, to the end of the turn in each."""
        counts = np.zeros(len(ids) + 1, bool)
        for begin, end in spans:
            counts[begin : self._end_of_turn(ids, begin, end)] = True
        places = np.flatnonzero(counts)
        if len(places) and len(chat.messages) - 1 in chat.trained and ids[places[-1]] not in self.specials:
            # No token of the template ends the last turn: the one that ends texts does.
            ids = [*ids[: places[-1] + 1], self.end]
            counts[places[-1] + 1] = True
        counts = counts[: len(ids)]
        counts[:1] = False
        return Document(np.asarray(ids, np.int32), counts)

    def _source(self, tools: list[Any] | None, where: str, use: str, instead: str) -> str:
        try:
            found: str = self.tokenizer.get_chat_template(None, tools)
        except ValueError:
            raise ValueError(
                f"{where}: expected a folder with a chat template {use}, received {self.path!r}, which has no {_FILE}; "
                f"put the model's {_FILE} into it, or {instead}"
            ) from None
        return found

    def _end_of_turn(self, ids: Sequence[int], begin: int, end: int) -> int:
        """Return where a turn's targets end: behind the token that ends it, within the template's marks or not."""
        last = next((n + 1 for n in range(end - 1, begin - 1, -1) if ids[n] in self.specials), 0)
        if last and not self.tokenizer.decode(list(ids[last:end])).strip():
            return last
        return end + 1 if end < len(ids) and ids[end] in self.specials else end

    def _by_marks(self, chat: Chat, where: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Return the tokens, and where the trained turns begin and end by the template's marks."""
        found = self._apply(
            chat, len(chat.messages), where, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
        )
        ids, mask = list(found["input_ids"]), np.array([0, *found["assistant_masks"], 0])
        edges = np.flatnonzero(np.diff(mask))
        spans = [(int(begin), int(end)) for begin, end in zip(edges[::2], edges[1::2], strict=True)]
        turns = [n for n, message in enumerate(chat.messages) if message["role"] == "assistant"]
        if len(turns) == len(chat.trained):
            return ids, spans
        if len(spans) != len(turns):
            raise ValueError(
                f"{where}: expected one place between {{% generation %}} and {{% endgeneration %}} for each of "
                f"{len(turns)} assistant's turns, some of weight 0, received {len(spans)} in the {_FILE} of "
                f"{self.path!r}; mark each turn, or leave weight out"
            )
        return ids, [span for turn, span in zip(turns, spans, strict=True) if turn in chat.trained]

    def _prefixes(self, chat: Chat, where: str) -> list[tuple[_Cut, str]]:
        """Return the beginnings of a chat as text: before each trained turn and behind it, and the whole at last."""
        last = len(chat.messages)
        cuts = [cut for turn in chat.trained for cut in ((turn, True), (turn + 1, False))]
        if (last, False) not in cuts:
            cuts.append((last, False))
        texts = [str(self._apply(chat, count, where, prompt, tokenize=False)) for count, prompt in cuts]
        for (count, prompt), text, after in zip(cuts, texts, texts[1:], strict=False):
            if not after.startswith(text):
                raise ValueError(self._refusal(where, count, prompt, "is written otherwise"))
        return list(zip(cuts, texts, strict=True))

    def _by_prefixes(
        self, where: str, prefixes: list[tuple[_Cut, str]], rows: list[list[int]]
    ) -> tuple[list[int], list[tuple[int, int]]]:
        """Return the tokens, and where the trained turns begin and end: where prefixes, whose rows are given, end."""
        if any(after[: len(row)] != row for row, after in itertools.pairwise(rows)):
            # What the template writes before an answer, and the answer's beginning, would be one token, of which a
            # model that is asked is given a part: each piece is made tokens of by itself.
            texts = ["", *(text for _, text in prefixes)]
            pieces = [after[len(text) :] for text, after in itertools.pairwise(texts)]
            apart = list(itertools.accumulate(self._rows(pieces)))
            if self.tokenizer.decode(apart[-1]) != self.tokenizer.decode(rows[-1]):
                at = next(n for n, (row, after) in enumerate(itertools.pairwise(rows)) if after[: len(row)] != row)
                raise ValueError(self._refusal(where, *prefixes[at][0], "ends within a token"))
            rows = apart
        ends = [len(row) for row in rows]
        return list(rows[-1]), [(ends[2 * n], ends[2 * n + 1]) for n in range(len(ends) // 2)]

    def _rows(self, texts: list[str]) -> list[list[int]]:
        if not texts:
            return []
        found: list[list[int]] = self.tokenizer(
            texts, add_special_tokens=False, return_attention_mask=False, verbose=False
        )["input_ids"]
        return found

    def _refusal(self, where: str, count: int, prompt: bool, why: str) -> str:
        what = f"what stands before message {count + 1}" if prompt else f"the chat up to message {count}"
        return (
            f"{where}: expected a chat template that writes the beginning of a chat the same whatever follows, "
            f"received the {_FILE} of {self.path!r}, by which {what} {why} in the whole chat, so that the answers "
            f"cannot be found; mark them by {{% generation %}} and {{% endgeneration %}} in {_FILE}, or give all "
            'answers but the last "weight": 0, to train on the last alone'
        )

    def _apply(self, chat: Chat, count: int, where: str, prompt: bool = False, **options: Any) -> Any:
        """Return the first messages as the template renders them."""
        messages, tools = chat.messages[:count], chat.tools
        if not messages:
            return ""
        try:
            return self.tokenizer.apply_chat_template(messages, tools=tools, add_generation_prompt=prompt, **options)
        except Exception as error:
            # Whatever a template raises: most have rules of their own about roles.
            text = " ".join((str(error) or type(error).__name__).split())[:200]
            raise ValueError(
                f"{where}: expected messages that the {_FILE} of {self.path!r} takes, received what it refuses "
                f"({text}); change the chat, or the template"
            ) from error
