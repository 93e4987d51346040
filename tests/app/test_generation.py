"""Layer: application. generate(): with a cache as without, beams as a search of all, sampling as it is defined."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from fusemesh import Sampling, generate
from fusemesh.kernels import backends
from fusemesh.transformer import Transformer
from tests.support.ranks import architecture as ranks

KINDS = ("decoder", "translation")
END = ranks.END


def model_of(kind: str) -> tuple[Transformer, dict]:
    begin = {} if kind == "decoder" else {"begin": ranks.BEGIN}
    return ranks.build(kind, torch.float64, "reference"), begin


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "options", [{}, {"num_beams": 3}, {"sampling": Sampling(top_k=4)}], ids=["greedy", "beams", "k"]
)
def test_a_cache_changes_nothing(kind: str, options: dict) -> None:
    model, begin = model_of(kind)
    arguments = {"max_new_tokens": 6, "end": END, **begin, **options}
    backends.reset_call_counts()
    with_cache = generate(model, ranks.prompts(kind), **arguments)
    decoded = backends.call_counts()["attention_decode", "reference"]
    assert decoded % model.config.num_layers == 0 and 0 < decoded <= 6 * model.config.num_layers
    without = generate(model, ranks.prompts(kind), use_cache=False, **arguments)
    assert backends.call_counts()["attention_decode", "reference"] == decoded
    assert [row.tolist() for row in with_cache] == [row.tolist() for row in without]
    assert len({tuple(row.tolist()) for row in with_cache}) > 1


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("beams", [1, 3])
def test_a_row_does_not_see_the_others_nor_its_padding(kind: str, beams: int) -> None:
    model, begin = model_of(kind)
    arguments = {"max_new_tokens": 6, "end": END, "num_beams": beams, **begin}
    together = generate(model, ranks.prompts(kind), **arguments)
    for prompt, row in zip(ranks.prompts(kind), together, strict=True):
        (alone,) = generate(model, [prompt], **arguments)
        assert torch.equal(alone, row)


def log_likelihood(model: Transformer, prompt: torch.Tensor, begin: dict, whole: list[int]) -> float:
    """Of all these tokens after the prompt, or made of the source, by one forward pass."""
    if begin:
        target = torch.tensor([[ranks.BEGIN, *whole[:-1]]])
        logits = model.logits(prompt[None], lengths=torch.tensor([len(prompt)]), target_tokens=target)[0]
    else:
        logits = model.logits(torch.cat((prompt, torch.tensor(whole[:-1], dtype=torch.int64)))[None])
        logits = logits[0, len(prompt) - 1 :]
    return logits.log_softmax(-1).gather(-1, torch.tensor(whole)[:, None]).sum().item()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "options", [{}, {"num_beams": 3}, {"sampling": Sampling(temperature=2.0)}], ids=["greedy", "beams", "sampled"]
)
def test_a_score_is_the_log_likelihood_of_a_row_and_its_end(kind: str, options: dict) -> None:
    model, begin = model_of(kind)
    scores: dict[int, float] = {}
    rows = generate(
        model, ranks.prompts(kind), max_new_tokens=6, end=END, on_score=scores.__setitem__, **begin, **options
    )
    assert sorted(scores) == list(range(len(rows)))
    for number, (prompt, row) in enumerate(zip(ranks.prompts(kind), rows, strict=True)):
        whole = [*row.tolist(), END] if len(row) < 6 else row.tolist()
        assert scores[number] == pytest.approx(log_likelihood(model, prompt, begin, whole), rel=1e-9)


def best_of_all(model: Transformer, prompt: torch.Tensor, begin: dict, length: int, penalty: float) -> list[int]:
    """By trying everything: rows that end, and rows of the full length that do not."""
    vocabulary, found = range(model.config.vocab_size), []
    for n in range(length + 1):
        for row in itertools.product((token for token in vocabulary if token != END), repeat=n):
            whole = [*row, END] if n < length else [*row]
            found.append((log_likelihood(model, prompt, begin, whole) / len(whole) ** penalty, list(row)))
    return max(found)[1]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("penalty", [0.0, 1.0, 2.0])
def test_enough_beams_find_the_best_of_all(kind: str, penalty: float) -> None:
    model, begin = model_of(kind)
    beams = model.config.vocab_size
    for prompt in ranks.prompts(kind)[:2]:
        (found,) = generate(
            model, [prompt], max_new_tokens=2, end=END, num_beams=beams, length_penalty=penalty, **begin
        )
        assert found.tolist() == best_of_all(model, prompt, begin, 2, penalty)


def test_beams_find_no_worse_rows_than_greedy() -> None:
    """By total log-probability, without an end."""
    model, _ = model_of("decoder")

    def score(prompt: torch.Tensor, row: torch.Tensor) -> float:
        logits = model.logits(torch.cat((prompt, row))[None])[0, len(prompt) - 1 : -1]
        return logits.log_softmax(-1).gather(-1, row[:, None]).sum().item()

    gains = []
    for prompt in ranks.prompts("decoder"):
        greedy, searched = (generate(model, [prompt], max_new_tokens=5, num_beams=n)[0] for n in (1, 8))
        gains.append(score(prompt, searched) - score(prompt, greedy))
    assert min(gains) >= -1e-9 and max(gains) > 1e-3


def test_sampling_draws_by_the_probabilities_that_are_left() -> None:
    logits = torch.tensor([0.5, 0.25, 0.15, 0.1]).log().repeat(20000, 1)
    random = torch.Generator().manual_seed(0)

    def shares(sampling: Sampling) -> list[float]:
        return (torch.bincount(sampling.draw(logits, random), minlength=4) / len(logits)).tolist()

    three_sigma = 3 * math.sqrt(0.25 / len(logits))
    for sampling, expected in (
        (Sampling(), [0.5, 0.25, 0.15, 0.1]),
        (Sampling(top_k=2), [2 / 3, 1 / 3, 0, 0]),
        (Sampling(top_p=0.75), [2 / 3, 1 / 3, 0, 0]),
        (Sampling(top_p=0.76), [5 / 9, 2.5 / 9, 1.5 / 9, 0]),
        (Sampling(top_p=1e-9), [1, 0, 0, 0]),
        (Sampling(temperature=0.5), [p * p / 0.345 for p in (0.5, 0.25, 0.15, 0.1)]),
        (Sampling(top_k=3, top_p=0.5), [1, 0, 0, 0]),
    ):
        found = shares(sampling)
        assert all(abs(a - b) <= three_sigma for a, b in zip(found, expected, strict=True)), (sampling, found)
        assert all(a == 0 for a, b in zip(found, expected, strict=True) if b == 0)


def test_a_seed_repeats_a_text_and_another_does_not() -> None:
    model, _ = model_of("decoder")
    texts = [
        generate(model, ranks.prompts("decoder"), max_new_tokens=6, sampling=Sampling(), seed=seed)
        for seed in (1, 1, 2)
    ]
    one, same, other = ([row.tolist() for row in text] for text in texts)
    assert one == same != other


def test_tokens_are_told_as_they_come() -> None:
    model, _ = model_of("decoder")
    heard: list[tuple[int, int]] = []
    found = generate(
        model, ranks.prompts("decoder"), max_new_tokens=4, on_token=lambda row, token: heard.append((row, token))
    )
    assert heard == [(row, int(found[row][at])) for at in range(4) for row in range(3)]


def test_what_cannot_be_generated_is_refused() -> None:
    model, _ = model_of("decoder")
    prompt = ranks.prompts("decoder")
    for change, message in (
        ({"max_new_tokens": 0}, "max_new_tokens: expected at least 1"),
        ({"max_new_tokens": 7}, "max_new_tokens: expected at most 6 with a prompt of 6"),
        ({"begin": 1}, "begin: expected None for a decoder"),
        ({"num_beams": 0}, "num_beams: expected at least 1"),
        ({"num_beams": 2, "sampling": Sampling()}, "sampling: expected None with num_beams = 2"),
    ):
        with pytest.raises(ValueError, match=message):
            generate(model, prompt, **{"max_new_tokens": 3, **change})
    with pytest.raises(ValueError, match="prompts: expected at least one"):
        generate(model, [torch.zeros(0, dtype=torch.int64)], max_new_tokens=3)
    with pytest.raises(ValueError, match="begin: expected the token that begins every target"):
        generate(model_of("translation")[0], prompt, max_new_tokens=3)
    with pytest.raises(ValueError, match="model: expected a decoder or an encoder-decoder, received a encoder"):
        generate(model_of("span")[0], prompt, max_new_tokens=3)
    for arguments in ({"temperature": 0}, {"top_k": -1}, {"top_p": 0.0}):
        with pytest.raises(ValueError, match=f"{next(iter(arguments))}: expected"):
            Sampling(**arguments)
