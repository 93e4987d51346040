"""The tokenizer of a pretrained model's folder, as a language model's texts need it."""

from __future__ import annotations

import functools
import hashlib
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fusemesh.tasks.encodings import check_characters
from fusemesh.tasks.tokens import Tokens

from .folder import KEY, check_version, config_of, generation_config_of

_FILES = ("tokenizer.json", "vocab.*", "*.model", "*.spm", "merges.txt", "tekken.json")
_SMALL = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
_BATCH = 256  # documents that are encoded together


class FolderTokens(Tokens):
    """Tokens as transformers' AutoTokenizer makes them, beginning tokens included where the tokenizer adds them itself.

    Args:
        path: of the folder.

    Raises:
        ValueError: the folder has no tokenizer that works, none with a token for the end of a text, or one with more
            tokens than the model has.
    """

    def __init__(self, path: str) -> None:
        self.path, self._tokenizer = path, load(path)
        self.end: int = next(
            number for number in (self._tokenizer.eos_token_id, self._tokenizer.sep_token_id) if number is not None
        )
        pad = self._tokenizer.pad_token_id
        self.pad = self.end if pad is None else pad

    @functools.cached_property
    def ends(self) -> list[int]:
        """The tokens that end a text: the tokenizer's, and those that the model's configurations name."""
        found = {self.end}
        for config in (config_of(self.path), generation_config_of(self.path)):
            named = getattr(config, "eos_token_id", None)
            found.update(named if isinstance(named, list) else [named] if isinstance(named, int) else [])
        return sorted(found)

    @functools.cached_property
    def line_ends(self) -> Sequence[int]:  # type: ignore[override]
        """Those, and all tokens that hold a newline."""
        texts = self._tokenizer.batch_decode([[number] for number in range(len(self._tokenizer))])
        return sorted({*self.ends, *(number for number, text in enumerate(texts) if "\n" in text)})

    @property
    def target_ends(self) -> Sequence[int]:  # type: ignore[override]
        """The same."""
        return self.ends

    @functools.cached_property
    def begin(self) -> int:  # type: ignore[override]
        """The token that the decoder of a sequence-to-sequence model begins with.

        Raises:
            ValueError: neither configuration of the folder names it.
        """
        for config in (config_of(self.path), generation_config_of(self.path)):
            found = getattr(config, "decoder_start_token_id", None)
            if isinstance(found, int):
                return found
        raise ValueError(
            f"{KEY}: expected decoder_start_token_id, with which a decoder begins, in config.json of {self.path!r}, "
            "received none; add it (the id of the padding token of T5 and Marian, of </s> of BART)"
        )

    @property
    def tokenizer(self) -> Any:
        """The tokenizer itself."""
        return self._tokenizer

    @functools.cached_property
    def hashes(self) -> dict[str, str]:
        """What identifies the tokenizer: SHA-256 of its files, of what it does where transformers can say that, and of
        its chat template.

        Two are one if either of the first two is the same: files may be saved again, and another version of
        transformers may read them otherwise.
        """
        files = hashlib.sha256()
        for path in sorted({path for pattern in (*_FILES, *_SMALL) for path in Path(self.path).glob(pattern)}):
            files.update(f"{path.name}\0{path.stat().st_size}\0".encode())
            files.update(path.read_bytes())
        template = json.dumps(getattr(self._tokenizer, "chat_template", None), sort_keys=True)
        found = {"files": files.hexdigest(), "template": hashlib.sha256(template.encode()).hexdigest()}
        if (backend := getattr(self._tokenizer, "backend_tokenizer", None)) is not None:
            does = json.loads(backend.to_str())
            # State that calls leave behind.
            does.update(truncation=None, padding=None, ends=[self.end, *self.ends])
            found["behaviour"] = hashlib.sha256(json.dumps(does, sort_keys=True).encode()).hexdigest()
        return found

    def beginning(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the tokens of texts that go on: without those that the tokenizer adds to end them."""
        if not texts:
            return []
        rows = self._tokenizer(list(texts), return_attention_mask=False, verbose=False)["input_ids"]
        return [self._without_end(row) for row in rows]

    def stream(self, documents: Sequence[bytes]) -> np.ndarray:
        return _stream(self, tuple(documents))

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the tokens of texts, each with one end token at its end."""
        found: list[list[int]] = self._tokenizer(list(texts), return_attention_mask=False, verbose=False)["input_ids"]
        return [row if row and row[-1] in self.ends else [*row, self.end] for row in found]

    def whole(self, texts: Sequence[str], most: int) -> tuple[list[list[int]], list[int]]:
        if not texts:
            return [], []
        uncut = self._tokenizer(list(texts), return_attention_mask=False, verbose=False)["input_ids"]
        # Tokens that begin and end a text stay where its end is cut.
        rows = self._tokenizer(list(texts), truncation=True, max_length=most, return_attention_mask=False)["input_ids"]
        # What the tokenizer makes nothing of is one token, too: each text has a last one.
        return [row or [self.end] for row in rows], [len(row) for row in uncut]

    def targets(self, texts: Sequence[str], most: int) -> tuple[list[list[int]], list[int]]:
        if not texts:
            return [], []
        # As targets: some tokenizers have a vocabulary of their own for each language.
        found = self._tokenizer(text_target=list(texts), return_attention_mask=False, verbose=False)["input_ids"]
        rows = [row if row and row[-1] in self.ends else [*row, self.end] for row in found]
        # The end stays where the text before it is cut.
        cut = [row if len(row) <= most else [*row[: most - 1], row[-1]] for row in rows]
        return cut, [len(row) for row in rows]

    def _without_end(self, row: list[int]) -> list[int]:
        last = len(row)
        while last and row[last - 1] in self.ends:
            last -= 1
        return row[:last]

    def _beginning(self, text: str) -> list[int]:
        return self.beginning([text])[0]

    def line(self, text: str, most: int) -> tuple[list[int], int]:
        row = self._beginning(text)
        return row[:most] or [self.end], len(row)

    def prompt(self, text: str, most: int) -> list[int]:
        check_characters(text, "the prompt")
        return self._beginning(text)[-most:] or [self.end]

    def decoder(self) -> Callable[[Sequence[int], bool], str]:
        seen: list[int] = []
        shown = ""

        def decode(tokens: Sequence[int], last: bool) -> str:
            nonlocal shown
            seen.extend(tokens)
            text = self._text(seen)
            # A character of which tokens are missing is shown as this until they are there.
            if not last and text.endswith("\ufffd"):
                return ""
            new, shown = text.removeprefix(shown), text
            return new

        return decode

    def text(self, tokens: np.ndarray) -> str:
        return self._text(tokens.tolist()).split("\n")[0]

    def target_text(self, tokens: np.ndarray) -> str:
        row = tokens.tolist()
        return self._text(row[: next((at for at, token in enumerate(row) if token in self.ends), None)]).strip()

    def _text(self, tokens: Sequence[int]) -> str:
        found: str = self._tokenizer.decode(list(tokens), skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return found

    def metrics(self, loss: float) -> dict[str, float]:
        return {"perplexity": math.exp(loss) if loss < 700 else math.inf}


@functools.lru_cache(maxsize=2)
def load(path: str) -> Any:
    """Return the tokenizer of a folder; raise ValueError as :class:`FolderTokens` does."""
    check_version()
    from transformers import AutoTokenizer

    config = config_of(path)
    if not any(any(Path(path).glob(pattern)) for pattern in _FILES):
        # transformers would make an empty one of the model's type.
        raise ValueError(
            f"{KEY}: expected the files of a tokenizer beside the weights in {path!r}, received none; copy the model's "
            "tokenizer.json and tokenizer_config.json (or vocab and merges files) into the folder"
        )
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True)
    except Exception as error:
        # Whatever its files, or packages that are missing, raise.
        text = " ".join((str(error) or type(error).__name__).split())[:300]
        raise ValueError(
            f"{KEY}: expected a tokenizer that transformers can load in {path!r}, received none ({text}); copy the "
            "model's tokenizer files into the folder (tokenizer.json, tokenizer_config.json), or install what is named"
        ) from error
    if tokenizer.eos_token_id is None and tokenizer.sep_token_id is None:
        raise ValueError(
            f"{KEY}: expected a tokenizer with a token that ends texts, received one of {path!r} with neither "
            "eos_token nor sep_token; name it in tokenizer_config.json"
        )
    rows = getattr(config, "vocab_size", None)
    if isinstance(rows, int) and len(tokenizer) > rows:
        raise ValueError(
            f"{KEY}: expected a tokenizer of at most {rows} tokens, as many as the model's embedding has rows, "
            f"received {len(tokenizer)} in {path!r}; give the tokenizer of this model, or resize the embedding with "
            "transformers' resize_token_embeddings() and save the model again"
        )
    return tokenizer


def _stream(tokens: FolderTokens, documents: tuple[bytes, ...]) -> np.ndarray:
    digest = hashlib.sha256(tokens.path.encode())
    for text in documents:
        digest.update(b"%d\0" % len(text))
        digest.update(text)
    key = digest.hexdigest()
    if key not in _streams:
        # A process asks for the same few: to choose the length, to check the run, to train.
        while len(_streams) >= 4:
            _streams.pop(next(iter(_streams)))
        parts = [np.zeros(0, np.int32)]
        for first in range(0, len(documents), _BATCH):
            texts = [text.decode("utf-8", "replace") for text in documents[first : first + _BATCH]]
            parts += [np.asarray(row, np.int32) for row in tokens.encode(texts)]
        _streams[key] = np.concatenate(parts)
    return _streams[key]


_streams: dict[str, np.ndarray] = {}
