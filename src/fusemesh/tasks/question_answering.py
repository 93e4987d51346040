"""Question answering: which span of a passage answers a question. By default, composed facts about people.

A passage of the default corpus is a short life of somebody: six things out of eight in any order, each said in one of
several ways. A question asks for one of them in words that the passage need not share, and the answer is one to three
words. Who goes with which answer is held out by hash: no held-out fact was seen in training.

Tokens are words and punctuation marks, each by the hash of its lower case modulo WORDS (Weinberger et al., 2009), so
that any text has some, and equal words have equal tokens; an answer is cut out of the passage as it is written there.

Metrics: exact match and F1 of words, by the rules of SQuAD (Rajpurkar et al., 2016): lower case, no punctuation, no
articles. Beside them stands a baseline that looks for words alone: the last word of the first sentence that shares
most words with the question.
"""

from __future__ import annotations

import functools
import re
import string
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from .base import IGNORED, PAD, SEPARATOR, Batch, Examples, hash_of
from .record_task import RecordTask
from .records import Record, split_line

if TYPE_CHECKING:
    import torch

    from fusemesh.transformer import Transformer, TransformerConfig

FIELDS = ("question", "passage", "answer")
WORDS = 4096
MOST_WORDS = 16  # of an answer
_WORD = re.compile(r"\w+|[^\w\s]")
DEFAULTS: Mapping[str, Any] = {
    "data.sequence_length": 64,
    "model.num_layers": 2,
    "training.steps": 450,
    "training.global_batch_size": 64,
    "training.learning_rate": 2e-3,
    "training.min_learning_rate": 1e-4,
    "evaluation.batch_size": 64,
    "evaluation.samples": 512,
}
NAMES = (
    "Anna", "Boris", "Clara", "David", "Emma", "Felix", "Greta", "Hugo", "Irene", "Jonas",
    "Karin", "Louis", "Maria", "Nils", "Olga", "Pavel", "Rosa", "Simon", "Tessa", "Victor",
)  # fmt: skip
_CITIES = (
    "Paris",
    "Rome",
    "Oslo",
    "Lima",
    "New York",
    "Cairo",
    "Cape Town",
    "Quito",
    "Tokyo",
    "Rio de Janeiro",
    "Perth",
)


@dataclass(frozen=True)
class Fact:
    """A kind of fact: ways to say it of a person, ways to ask for it, and what it may be."""

    said: tuple[str, ...]
    asked: tuple[str, ...]
    answers: tuple[str, ...]


FACTS = (
    Fact(
        ("{} lives in {}.", "{} has a flat in {}.", "The home of {} is in {}."),
        ("Where does {} live?", "In which city does one find {} today?"),
        _CITIES,
    ),
    Fact(
        ("{} was born in {}.", "{} came to the world in {}."),
        ("What is the birthplace of {}?", "Where did the life of {} begin?"),
        _CITIES,
    ),
    Fact(
        ("{} works as a {}.", "{} earns money as a {}.", "{} is a {} by trade."),
        ("What is the job of {}?", "How does {} make a living?"),
        (
            "baker",
            "nurse",
            "pilot",
            "taxi driver",
            "farmer",
            "lawyer",
            "sailor",
            "music teacher",
            "cook",
            "fire fighter",
        ),
    ),
    Fact(
        ("{} plays the {}.", "{} practises the {} every day."),
        ("Which instrument does {} know?", "On what does {} make music?"),
        ("flute", "piano", "violin", "cello", "bass guitar", "drums", "harp", "trumpet", "church organ", "lute"),
    ),
    Fact(
        ("{} married in {}.", "The wedding of {} was in {}."),
        ("When did {} become a spouse?", "In what year was there a marriage for {}?"),
        ("1981", "1984", "1988", "1992", "1995", "1997", "2003", "2006", "2009", "2010", "2014"),
    ),
    Fact(
        ("{} likes to eat {}.", "The favourite meal of {} is {}."),
        ("What does {} order in a restaurant?", "Which food makes {} happy?"),
        ("rice", "fried fish", "noodles", "onion soup", "bread and butter", "salad", "beans", "apple cake"),
    ),
    Fact(
        ("{} has a {} at home.", "{} keeps a {}.", "A {1} belongs to {0}."),
        ("Which animal does {} own?", "What is the pet of {}?"),
        ("dog", "cat", "parrot", "gold fish", "rabbit", "guinea pig", "snake", "turtle"),
    ),
    Fact(
        ("{} speaks {}.", "{} learnt {} as a child.", "The language of {} is {}."),
        ("In what tongue does one talk to {}?", "What can {} say things in?"),
        ("Welsh", "Greek", "Danish", "Finnish", "Swiss German", "Polish", "Old Norse", "Turkish"),
    ),
)
_SAMPLES, _HELD_OUT_SAMPLES, _SENTENCES = 16000, 1024, 6


class QuestionAnswering(RecordTask):
    """See the module."""

    metric = "f1"
    fields = FIELDS
    split_by = 1  # the passage: no question about a held-out one was trained on
    corpus = "composed facts"
    old_metadata: Mapping[str, Any] | None = {"words": WORDS}

    @staticmethod
    def default_records() -> tuple[list[Record], list[Record]]:
        return composed_facts(held_out=False), composed_facts(held_out=True)

    @staticmethod
    def default_version() -> str:
        return "composed facts, version 1"

    def metadata_of(self, records: Sequence[Record]) -> Mapping[str, Any]:
        return {"words": WORDS}

    def read_train(self) -> Examples:
        return self._without_cut_answers(super().read_train())

    def examples(self, records: Sequence[Record]) -> Examples:
        spans = []
        for record in records:
            question, passage, answer = record.values
            at = passage.find(answer.strip())
            words = [index for index, (start, end) in enumerate(spans_of(passage)) if _overlap(start, end, at, answer)]
            if at < 0 or not words:
                raise ValueError(
                    f"{record.where}: expected an answer that stands in the passage, received {answer!r}; quote it as "
                    "it is written there"
                )
            before = len(self._question(question))
            start, end = before + words[0], before + words[-1]
            # An answer behind the end of a passage that was cut: nothing to learn from it.
            fits = end < self.config.data.sequence_length
            spans.append((start, end) if fits else (IGNORED, IGNORED))
        return self._texts([record.values[:2] for record in records], np.array(spans, np.int64))

    def _without_cut_answers(self, examples: Examples) -> Examples:
        """Drop passages that were cut before their answers. Held out ones stay, and count as wrong."""
        kept = np.flatnonzero(examples.targets[:, 0] != IGNORED)
        if not len(kept):
            raise ValueError(
                f"data.sequence_length: expected enough words to hold a question and a passage up to its answer, "
                f"received {self.config.data.sequence_length}, which cuts every answer in {self.source}"
            )
        inputs = {name: values[kept] for name, values in examples.inputs.items()}
        return Examples(examples.tokens[kept], examples.targets[kept], **inputs)

    def _question(self, question: str) -> list[int]:
        return [*tokens_of(question)[: self.config.data.sequence_length // 2], SEPARATOR]

    def _texts(self, pairs: Sequence[Sequence[str]], targets: np.ndarray) -> Examples:
        length = self.config.data.sequence_length
        questions = [self._question(question) for question, _ in pairs]
        tokens = np.full((len(pairs), length), PAD, np.uint16)
        lengths = np.zeros(len(pairs), np.int64)
        for row, (question, (_, passage)) in enumerate(zip(questions, pairs, strict=True)):
            found = [*question, *tokens_of(passage)][:length]
            tokens[row, : len(found)], lengths[row] = found, len(found)
        starts = np.array([len(question) for question in questions], np.int64)
        return Examples(tokens, targets, lengths=lengths, span_starts=starts)

    def model_config(self) -> TransformerConfig:
        return self.sizes(vocab_size=self.metadata["words"], architecture="encoder", output="span")

    def predict(self, model: Transformer, batch: Batch, device: torch.device) -> torch.Tensor:
        """Return first and last word, in the passage, of the most probable span of at most MOST_WORDS, [B, 2]."""
        import torch

        inputs: dict[str, Any] = {name: torch.from_numpy(x).to(device) for name, x in batch.inputs.items()}
        logits = model.logits(torch.from_numpy(batch.tokens).to(device), **inputs)
        length = logits.shape[-1]
        # [B, start, end]
        pairs = logits[:, 0, :, None] + logits[:, 1, None, :]
        near = torch.ones((length, length), dtype=torch.bool, device=device).triu().tril(MOST_WORDS - 1)
        best = pairs.masked_fill(~near, float("-inf")).flatten(1).argmax(-1)
        return torch.stack((best // length, best % length), dim=-1) - inputs["span_starts"][:, None]

    def score(self, loss: float, predictions: np.ndarray | None, count: int) -> dict[str, float]:
        assert predictions is not None
        records = self.held_out_records[:count]
        found = [cut(record.values[1], span) for record, span in zip(records, predictions, strict=True)]
        guesses = [overlap_guess(record.values[0], record.values[1]) for record in records]
        expected = [record.values[2] for record in records]
        result = {}
        for name, answers in (("", found), ("overlap_", guesses)):
            pairs = list(zip(answers, expected, strict=True))
            result[f"{name}exact_match"] = float(np.mean([exact_match(*pair) for pair in pairs]))
            result[f"{name}f1"] = float(np.mean([f1(*pair) for pair in pairs]))
        return result

    def examples_of(self, lines: Sequence[str]) -> Examples:
        pairs = [split_line(line, FIELDS[:2], f"line {number}") for number, line in enumerate(lines, 1)]
        return self._texts(pairs, np.full((len(lines), 2), IGNORED, np.int64))

    def answer(self, prediction: np.ndarray, line: str) -> str:
        return cut(split_line(line, FIELDS[:2], "line")[1], prediction)


def spans_of(text: str) -> list[tuple[int, int]]:
    """Return the start and end of each word or mark of a text."""
    return [match.span() for match in _WORD.finditer(text)]


def tokens_of(text: str) -> list[int]:
    """Return the words and marks of a text as hashes, none of which is a control token."""
    return [_token(word.lower()) for word in _WORD.findall(text)]


@functools.lru_cache(maxsize=1 << 16)
def _token(word: str) -> int:
    return SEPARATOR + 1 + hash_of(word) % (WORDS - SEPARATOR - 1)


def cut(passage: str, span: np.ndarray) -> str:
    """Return the text from the first to the last word of a span."""
    words = spans_of(passage)
    last = min(int(span[1]), len(words) - 1)
    return passage[words[int(span[0])][0] : words[last][1]] if words else ""


def _overlap(start: int, end: int, at: int, answer: str) -> bool:
    """Return whether two spans overlap."""
    return start < at + len(answer.strip()) and at < end


def normalised(text: str) -> str:
    """Return an answer as SQuAD compares it: lower case, without punctuation and articles, with single spaces."""
    text = "".join(letter for letter in text.lower() if letter not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def exact_match(found: str, expected: str) -> float:
    """Return 1 if the normalised answers are equal, else 0."""
    return float(normalised(found) == normalised(expected))


def f1(found: str, expected: str) -> float:
    """Return the harmonic mean of precision and recall of the normalised words; 1 if both have none."""
    a, b = normalised(found).split(), normalised(expected).split()
    if not a or not b:
        return float(a == b)
    common = sum((Counter(a) & Counter(b)).values())
    return 2 * common / (len(a) + len(b))


def overlap_guess(question: str, passage: str) -> str:
    """Return the baseline's answer."""
    words = set(normalised(question).split())
    sentences = [part for part in re.split(r"(?<=[.!?])\s+", passage) if part.strip()] or [passage]
    best = max(sentences, key=lambda sentence: len(words & set(normalised(sentence).split())))
    return (normalised(best).split() or [""])[-1]


def composed_facts(*, held_out: bool) -> list[Record]:
    """Return the default corpus: (question, passage, answer), with facts that are held out or not."""
    draw = np.random.default_rng(hash_of("held-out facts" if held_out else "facts") % 2**32)

    def one_of(values: Sequence[str]) -> str:
        return values[int(draw.integers(len(values)))]

    records: list[Record] = []
    while len(records) < (_HELD_OUT_SAMPLES if held_out else _SAMPLES):
        name = one_of(NAMES)
        kinds = draw.permutation(len(FACTS))[:_SENTENCES].tolist()
        asked = kinds[draw.integers(_SENTENCES)]
        sentences, answer = [], ""
        for kind in kinds:
            # What is said beside the answer is free where it is held out, and never held out in training.
            is_free = held_out and kind != asked
            legal = [a for a in FACTS[kind].answers if is_free or is_held_out_fact(name, kind, a) == held_out]
            if not legal:
                break
            value = one_of(legal)
            sentences.append(one_of(FACTS[kind].said).format(name, value))
            answer = value if kind == asked else answer
        passage = " ".join(sentences)
        # An answer that stands in two places would be two.
        if len(sentences) == _SENTENCES and passage.count(answer) == 1:
            records.append(Record((one_of(FACTS[asked].asked).format(name), passage, answer), "composed", len(records)))
    return records


def is_held_out_fact(name: str, kind: int, answer: str) -> bool:
    """Return whether the training data never give this answer to this question about this person."""
    return hash_of(f"{name} {kind} {answer}") % 5 == 0
