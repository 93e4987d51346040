"""How the texts of a language model become tokens: bytes, or what the tokenizer of a pretrained model makes of them."""

from __future__ import annotations

import codecs
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

import numpy as np

from .base import BEGIN, END, PAD, decode, encode, shortened
from .corpus import in_bytes
from .encodings import check_characters


class Tokens(ABC):
    """Texts of a task as tokens, and back.

    ``pad`` fills samples up; ``line_ends`` are the tokens each of which ends the continuation of a line. Of a
    sequence-to-sequence model ``begin`` is the token that its decoder begins with, and each of ``target_ends`` ends a
    target."""

    pad: int
    line_ends: Sequence[int]
    begin: int
    target_ends: Sequence[int]

    @abstractmethod
    def stream(self, documents: Sequence[bytes]) -> np.ndarray:
        """Return documents in UTF-8 as one stream [tokens], each with the token that ends it."""

    @abstractmethod
    def whole(self, texts: Sequence[str], most: int) -> tuple[list[list[int]], list[int]]:
        """Return the tokens of texts that are each seen as a whole, at most ``most`` a text, and how many each takes
        uncut."""

    @abstractmethod
    def line(self, text: str, most: int) -> tuple[list[int], int]:
        """Return the first tokens of a line that is to be continued, at least one and at most ``most``, and how many it
        has."""

    @abstractmethod
    def prompt(self, text: str, most: int) -> list[int]:
        """Return the last tokens of a text that is to be continued, at most ``most``."""

    @abstractmethod
    def decoder(self) -> Callable[[Sequence[int], bool], str]:
        """Return a function from next tokens to characters; see :meth:`fusemesh.tasks.base.Task.token_decoder`."""

    @abstractmethod
    def text(self, tokens: np.ndarray) -> str:
        """Return the text of a continuation's tokens."""

    @abstractmethod
    def targets(self, texts: Sequence[str], most: int) -> tuple[list[list[int]], list[int]]:
        """Return the tokens of targets of a sequence-to-sequence model, their ends among them, at most ``most`` each,
        and how many each takes uncut."""

    @abstractmethod
    def target_text(self, tokens: np.ndarray) -> str:
        """Return the text of a target's tokens, up to the first that ends it or fills it up."""

    @abstractmethod
    def metrics(self, loss: float) -> dict[str, float]:
        """Return the metrics of a mean loss per token in nats."""


class Bytes(Tokens):
    """Each byte of UTF-8 is a token; PAD, a byte that no text holds, ends documents."""

    pad = PAD
    line_ends = (ord("\n"),)
    begin = BEGIN
    target_ends = (END,)

    def stream(self, documents: Sequence[bytes]) -> np.ndarray:
        return in_bytes(documents)

    def whole(self, texts: Sequence[str], most: int) -> tuple[list[list[int]], list[int]]:
        data = [encode(text) for text in texts]
        return [list(shortened(text, most)) for text in data], [len(text) for text in data]

    def line(self, text: str, most: int) -> tuple[list[int], int]:
        data = encode(text)
        return list(shortened(data, most) or b"\n"), len(data)

    def prompt(self, text: str, most: int) -> list[int]:
        check_characters(text, "the prompt")
        # Not from the middle of a character on.
        return list(text.encode()[-most:].decode(errors="ignore").encode())

    def decoder(self) -> Callable[[Sequence[int], bool], str]:
        decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        return lambda tokens, last: decoder.decode(bytes(tokens), last)

    def text(self, tokens: np.ndarray) -> str:
        return decode(tokens)

    def targets(self, texts: Sequence[str], most: int) -> tuple[list[list[int]], list[int]]:
        data = [encode(text) for text in texts]
        return [[*shortened(text, most - 1), END] for text in data], [len(text) + 1 for text in data]

    def target_text(self, tokens: np.ndarray) -> str:
        return decode(tokens)

    def metrics(self, loss: float) -> dict[str, float]:
        return {"bits_per_byte": bits_per_byte(loss)}


def bits_per_byte(loss: float) -> float:
    """Convert a mean loss per byte from nats to bits."""
    return loss / math.log(2)
