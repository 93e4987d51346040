"""Question answering: which span of a passage answers a question. By default, composed facts about people.

A passage of the default corpus is a short life of somebody: six things out of eight in any order, each said in one of
several ways. A question asks for one of them in words that the passage need not share, and the answer is one to three
words. Who goes with which answer is held out by hash: no held-out fact was seen in training.

Tokens are words and punctuation marks, see spans.py, each by the hash of its lower case modulo WORDS (Weinberger et
al., 2009), so that any text has some, and equal words have equal tokens; an answer is cut out of the passage as it is
written there. A record may say where it stands, by ``answer_start``; without, it has to stand in one place. For a
pretrained model tokens are its tokenizer's, and a long passage is seen in several windows, see windows.py.

Metrics: exact match and F1 of words, by the rules of SQuAD (Rajpurkar et al., 2016): lower case, no punctuation, no
articles; of characters in scripts without spaces (CMRC, by Cui et al., 2019, counts their longest common run instead).
Beside them stands a baseline that looks for words alone: the last word of the first sentence that shares most words
with the question.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from .base import Batch, Examples, hash_of
from .passages import MOST_WORDS, WORDS, Passages, WordPassages
from .record_task import RecordTask
from .records import Record, split_line
from .spans import exact_match, f1, overlap_guess
from .windows import TokenPassages

if TYPE_CHECKING:
    import torch

    from fusemesh.transformer import Transformer, TransformerConfig

FIELDS = ("question", "passage", "answer")
OPTIONAL_FIELDS = ("answer_start",)
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
    optional_fields = OPTIONAL_FIELDS
    split_by = 1  # the passage: no question about a held-out one was trained on
    corpus = "composed facts"
    old_metadata: Mapping[str, Any] | None = {"words": WORDS, "answer_words": MOST_WORDS}

    @staticmethod
    def default_records() -> tuple[list[Record], list[Record]]:
        return composed_facts(held_out=False), composed_facts(held_out=True)

    @staticmethod
    def default_version() -> str:
        return "composed facts, version 1"

    @functools.cached_property
    def _passages(self) -> Passages:
        return TokenPassages(self) if self.maker.refines else WordPassages(self)

    def metadata_of(self, records: Sequence[Record]) -> Mapping[str, Any]:
        return self._passages.metadata(records)

    def length_of(self, record: Record) -> int:
        return self.lengths_of([record])[0]

    def lengths_of(self, records: Sequence[Record]) -> list[int]:
        return self._passages.lengths(records)

    def read_train(self) -> Examples:
        return self._passages.to_train_on(self._records[0])

    def examples(self, records: Sequence[Record]) -> Examples:
        found = self._passages.to_answer(records)
        if not found.targets_in(range(len(found))):
            raise self._passages.no_answer_fits()
        return found

    def cuts(self, part: str) -> dict[str, int]:
        found = super().cuts(part)
        # Of a pretrained model's passages nothing is cut.
        return {**found, "cut": found["questions_cut"]} if "questions_cut" in found else found

    def say_cut_lengths(self, whole: Sequence[int] | np.ndarray) -> str:
        if not self.maker.refines:
            return super().say_cut_lengths(whole)
        length = self.config.data.sequence_length
        long = int((np.asarray(whole, np.int64) > length).sum())
        if not long:
            return ""
        share = f"{long} of {len(whole)} {'takes' if long == 1 else 'take'}"
        return f"{share} more than data.sequence_length = {length} tokens, {max(whole)} at most: seen in windows"

    def sample_text(self) -> str:
        return self._passages.shown(self.train)

    def model_config(self) -> TransformerConfig:
        return self.sizes(vocab_size=self.metadata["words"], architecture="encoder", output="span")

    def predict(self, model: Transformer, batch: Batch, device: torch.device) -> torch.Tensor:
        """Return where the most probable span begins and ends that is no longer than answers are, [B, 2]."""
        return self.predict_scored(model, batch, device)[0]

    def predict_scored(
        self, model: Transformer, batch: Batch, device: torch.device
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return self._passages.predict_scored(model, batch, device)

    def named_scores(self, scores: np.ndarray) -> dict[str, Any]:
        return {"probability": float(scores[0])}

    def score(self, loss: float, predictions: np.ndarray | None, count: int) -> dict[str, float]:
        assert predictions is not None
        records = self.held_out_records[:count]
        found = [
            self._passages.answer(span, record.values[1]) for record, span in zip(records, predictions, strict=True)
        ]
        guesses = [overlap_guess(record.values[0], record.values[1]) for record in records]
        expected = [record.values[2] for record in records]
        result = {}
        for name, answers in (("", found), ("overlap_", guesses)):
            pairs = list(zip(answers, expected, strict=True))
            result[f"{name}exact_match"] = float(np.mean([exact_match(*pair) for pair in pairs]))
            result[f"{name}f1"] = float(np.mean([f1(*pair) for pair in pairs]))
        return result

    def examples_of(self, lines: Sequence[str], first: int = 1) -> Examples:
        pairs = [split_line(line, FIELDS[:2], f"line {number}") for number, line in enumerate(lines, first)]
        return self._passages.questions(pairs)

    def answer(self, prediction: np.ndarray, line: str) -> str:
        return self._passages.answer(prediction, split_line(line, FIELDS[:2], "line")[1])


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
