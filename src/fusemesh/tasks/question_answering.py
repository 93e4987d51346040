"""Question answering: which span of a passage answers a question. By default, composed facts about people.

A passage of the default corpus says several things of several people, so that an answer must agree with the question in
the person and in what is asked. Which person goes with which answer is held out by hash: no held-out fact was seen in
training.

Tokens are words and punctuation marks, each by the hash of its lower case modulo WORDS (Weinberger et al., 2009), so
that any text has some, and which words are equal is plain to see; an answer is cut out of the passage as it is written
there.

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
from typing import TYPE_CHECKING, Any

import numpy as np

from .base import IGNORED, PAD, SEPARATOR, Batch, Examples, Task, hash_of, is_held_out
from .records import Record, read_records, split_line

if TYPE_CHECKING:
    import torch

    from fusemesh.config import Config
    from fusemesh.transformer import Transformer, TransformerConfig

FIELDS = ("question", "passage", "answer")
WORDS = 4096
MOST_WORDS = 16  # of an answer
_WORD = re.compile(r"\w+|[^\w\s]")
DEFAULTS: Mapping[str, Any] = {
    "data.sequence_length": 48,
    "model.num_layers": 4,
    "training.steps": 600,
    "training.global_batch_size": 64,
    "training.learning_rate": 2e-3,
    "training.min_learning_rate": 1e-4,
    "evaluation.batch_size": 64,
    "evaluation.samples": 512,
}
NAMES = (
    "Anna",
    "Boris",
    "Clara",
    "David",
    "Emma",
    "Felix",
    "Greta",
    "Hugo",
    "Irene",
    "Jonas",
    "Karin",
    "Louis",
    "Maria",
    "Nils",
    "Olga",
    "Pavel",
    "Rosa",
    "Simon",
    "Tessa",
    "Victor",
)
# What is said of a person, what is asked, and the answers.
FACTS = (
    ("{} lives in {}.", "Where does {} live?", "Paris Rome Oslo Lima Cairo Delhi Quito Tokyo Minsk Dakar Sofia Perth"),
    (
        "{} works as a {}.",
        "What is the job of {}?",
        "baker nurse pilot tailor doctor farmer lawyer sailor porter cook",
    ),
    ("{} plays the {}.", "What does {} play?", "flute piano violin cello guitar drums harp trumpet oboe organ lute"),
    ("{} was born in {}.", "When was {} born?", "1961 1964 1968 1972 1975 1977 1983 1986 1989 1990 1994 1998"),
)
_SAMPLES, _HELD_OUT_SAMPLES, _SENTENCES = 16000, 1024, 5


class QuestionAnswering(Task):
    """See the module."""

    metric = "f1"

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        data = config.data
        if data.path:
            train = read_records(data.path, FIELDS, data.columns)
            self.source = data.path
            if data.held_out:
                held_out = read_records(data.held_out, FIELDS, data.columns)
            else:
                # By the passage: no question about a held-out one was trained on.
                held_out = [record for record in train if is_held_out(record.values[1])]
                train = [record for record in train if not is_held_out(record.values[1])]
        else:
            train, held_out = composed_facts(held_out=False), composed_facts(held_out=True)
            self.source = "composed facts"
        for part, records in (("to train on", train), ("held out", held_out)):
            if not records:
                raise ValueError(
                    f"data.path: expected enough records to hold some out, received none {part} in {self.source}; give "
                    "more, or a file of them as data.held_out"
                )
        self.held_out, self._records = self._examples(held_out), held_out
        self.train = self._without_cut_answers(self._examples(train))

    def _examples(self, records: Sequence[Record]) -> Examples:
        spans = []
        for record in records:
            question, passage, answer = record.values
            at = passage.find(answer.strip())
            words = [index for index, (start, end) in enumerate(spans_of(passage)) if _meet(start, end, at, answer)]
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
        """Nothing can be learnt from a passage that was cut before its answer; held out, it counts as wrong."""
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
        return self.sizes(vocab_size=WORDS, architecture="encoder", output="span")

    def predict(self, model: Transformer, batch: Batch, device: torch.device) -> torch.Tensor:
        """First and last word of the most probable span of at most MOST_WORDS, counted in the passage, [B, 2]."""
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
        records = self._records[:count]
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
    """Where each word or mark of a text begins and ends."""
    return [match.span() for match in _WORD.finditer(text)]


def tokens_of(text: str) -> list[int]:
    """The words and marks of a text by their hashes; none is a token with another meaning."""
    return [_token(word.lower()) for word in _WORD.findall(text)]


@functools.lru_cache(maxsize=1 << 16)
def _token(word: str) -> int:
    return SEPARATOR + 1 + hash_of(word) % (WORDS - SEPARATOR - 1)


def cut(passage: str, span: np.ndarray) -> str:
    """What stands from the first to the last word of a span."""
    words = spans_of(passage)
    last = min(int(span[1]), len(words) - 1)
    return passage[words[int(span[0])][0] : words[last][1]] if words else ""


def _meet(start: int, end: int, at: int, answer: str) -> bool:
    """Whether a word is in the answer, or a part of it."""
    return start < at + len(answer.strip()) and at < end


def normalised(text: str) -> str:
    """As SQuAD compares answers: lower case, without punctuation and articles, with single spaces."""
    text = "".join(letter for letter in text.lower() if letter not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def exact_match(found: str, expected: str) -> float:
    """1 if they are equal, normalised; else 0."""
    return float(normalised(found) == normalised(expected))


def f1(found: str, expected: str) -> float:
    """The harmonic mean of precision and recall of words, normalised; 1 if both have none."""
    a, b = normalised(found).split(), normalised(expected).split()
    if not a or not b:
        return float(a == b)
    common = sum((Counter(a) & Counter(b)).values())
    return 2 * common / (len(a) + len(b))


def overlap_guess(question: str, passage: str) -> str:
    """The baseline's answer."""
    words = set(normalised(question).split())
    sentences = [part for part in re.split(r"(?<=[.!?])\s+", passage) if part.strip()] or [passage]
    best = max(sentences, key=lambda sentence: len(words & set(normalised(sentence).split())))
    return (normalised(best).split() or [""])[-1]


def composed_facts(*, held_out: bool) -> list[Record]:
    """The default corpus: (question, passage, answer), with facts that are held out or not."""
    records: list[Record] = []
    # Of every person and kind of fact, the answers of this part.
    answers = {
        (name, kind): [a for a in FACTS[kind][2].split() if is_held_out_fact(name, kind, a) == held_out]
        for name in NAMES
        for kind in range(len(FACTS))
    }
    draw = np.random.default_rng(hash_of("held-out facts" if held_out else "facts") % 2**32)
    legal = [key for key, values in answers.items() if values]
    while len(records) < (_HELD_OUT_SAMPLES if held_out else _SAMPLES):
        asked = legal[draw.integers(len(legal))]
        # Another person with the same kind of fact, and the same person with another kind; then any.
        names = [name for name in NAMES if name != asked[0] and (name, asked[1]) in answers]
        kinds = [kind for kind in range(len(FACTS)) if kind != asked[1]]
        said = {asked, (names[draw.integers(len(names))], asked[1]), (asked[0], kinds[draw.integers(len(kinds))])}
        while len(said) < _SENTENCES:
            said.add((NAMES[draw.integers(len(NAMES))], int(draw.integers(len(FACTS)))))
        order = sorted(said)
        draw.shuffle(order)
        sentences, answer = [], ""
        for name, kind in order:
            is_free = held_out and (name, kind) != asked
            own = FACTS[kind][2].split() if is_free else answers[name, kind]
            value = own[draw.integers(len(own))]
            sentences.append(FACTS[kind][0].format(name, value))
            answer = value if (name, kind) == asked else answer
        question = FACTS[asked[1]][1].format(asked[0])
        if " ".join(sentences).find(answer) == _place(sentences, order.index(asked), answer):
            records.append(Record((question, " ".join(sentences), answer), "composed", len(records) + 1))
    return records


def _place(sentences: Sequence[str], index: int, answer: str) -> int:
    """Where the answer stands in its own sentence of the passage."""
    return sum(len(sentence) + 1 for sentence in sentences[:index]) + sentences[index].rfind(answer)


def is_held_out_fact(name: str, kind: int, answer: str) -> bool:
    """Whether nobody reads in training that this person has this answer to this question."""
    return hash_of(f"{name} {kind} {answer}") % 5 == 0
