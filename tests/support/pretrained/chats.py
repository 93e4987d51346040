"""Folders with a tokenizer, a chat template and no weights, and records of chats."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from fusemesh.pretrained.tokenizer import FolderTokens
from fusemesh.tokenized.document import Document
from fusemesh.tokenized.encoder import Counts, Encoder
from fusemesh.tokenized.records import Columns, entries_of

TEXT = [
    "The quick brown fox jumps over the lazy dog, and the dog sleeps on.",
    "Sphinx of black quartz, judge my vow! 0123456789 (a + b) * c = d?",
    "user assistant system tool User: Assistant: What is it? It is a fox. It is. It was.\n\nuser\n\nAnd\n\n\n",
]
_TURN = "'<|im_start|>' + m.role + '\\n'"
_PROMPT = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
CHATML = "{% for m in messages %}{{ " + _TURN + " + m.content + '<|im_end|>\\n' }}{% endfor %}" + _PROMPT
# The same text with marks: around the content alone, with the end, and with the end and its newline.
MARKED = {
    marks: "{% for m in messages %}{{ "
    + _TURN
    + " }}{% if m.role == 'assistant' %}"
    + text
    + "{% else %}{{ m.content + '<|im_end|>\\n' }}{% endif %}{% endfor %}"
    + _PROMPT
    for marks, text in (
        ("content", "{% generation %}{{ m.content }}{% endgeneration %}{{ '<|im_end|>\\n' }}"),
        ("end", "{% generation %}{{ m.content + '<|im_end|>' }}{% endgeneration %}{{ '\\n' }}"),
        ("newline", "{% generation %}{{ m.content + '<|im_end|>\\n' }}{% endgeneration %}"),
    )
}
# Writes a thought into the last answer alone, as templates of reasoning models do.
REWRITING = (
    "{% for m in messages %}{{ " + _TURN + " }}"
    "{% if m.role == 'assistant' and loop.last %}{{ '<think></think>' }}{% endif %}"
    "{{ m.content + '<|im_end|>\\n' }}{% endfor %}" + _PROMPT
)
# Without a token of its own: the blank behind the colon and the answer's first letters are one token.
PLAIN = (
    "{% for m in messages %}{{ m.role + ': ' + m.content + '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)
WITH_BOS = "{{ bos_token }}" + CHATML


def make_chat_folder(
    path: Path, template: str | None = CHATML, *, pad: str = "<pad>", bos: bool = False, dummy: bool = False
) -> Path:
    """Save a tokenizer and a configuration.

    Args:
        template: of chats; None: without one.
        pad: the padding token; ``</s>`` makes it the end token, too.
        bos: the tokenizer puts a beginning token before each text.
        dummy: and a blank, as SentencePiece does.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=dummy)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<pad>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        TEXT, trainers.BpeTrainer(vocab_size=300, special_tokens=special, initial_alphabet=alphabet)
    )
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    made = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=pad, bos_token="<s>", eos_token="</s>"
    )
    made.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    made.chat_template = template
    made.save_pretrained(path)
    model_config().save_pretrained(path)
    return path


def model_config() -> Any:
    """Return the configuration of a small model for the tokenizer."""
    return transformers.LlamaConfig(
        vocab_size=320, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2
    )


def make_chat_model(path: Path, template: str | None = CHATML, *, bos: bool = False) -> Path:
    """Save a small random model with the tokenizer of :func:`make_chat_folder`."""
    make_chat_folder(path, template, bos=bos)
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(model_config()).save_pretrained(path)
    return path


def chat(*turns: str, **more: Any) -> dict[str, Any]:
    """Return a chat whose turns are the user's and the assistant's in turn."""
    roles = ("user", "assistant")
    return {"messages": [{"role": roles[n % 2], "content": text} for n, text in enumerate(turns)], **more}


def lines(items: Iterable[Any]) -> str:
    """Return JSON lines."""
    return "".join(json.dumps(item) + "\n" for item in items)


def encode(folder: Path, items: Iterable[Any], columns: str = "") -> tuple[list[Document], Counts]:
    """Return the documents of records, and their counts."""
    counts, found = Counts(), entries_of(lines(items), "file.jsonl", Columns(columns))
    made = [document for _, document in Encoder(FolderTokens(str(folder))).documents(found, counts)]
    return made, counts


def trained(folder: Path, document: Document) -> list[str]:
    """Return the texts of the runs of tokens that count."""
    tokenizer = FolderTokens(str(folder)).tokenizer
    runs: list[list[int]] = []
    for number, (token, counts) in enumerate(zip(document.ids.tolist(), document.counts.tolist(), strict=True)):
        if counts and (number == 0 or not document.counts[number - 1]):
            runs.append([])
        if counts:
            runs[-1].append(token)
    return [tokenizer.decode(run) for run in runs]
