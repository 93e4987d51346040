"""generate(): tokens one after another, in any layout: greedy, sampled, or the best of several beams.

Every rank calls it. The ranks of tp and pp of a replica get the same prompts and find the same tokens: logits are made
whole on each, and random numbers come from one seed. Replicas may have different prompts, and go on until all are done.

Sources: Holtzman et al., "The Curious Case of Neural Text Degeneration" (2020) for top-p; Wu et al., "Google's Neural
Machine Translation System" (2016), section 7, for beams that are compared by log-probability / length ^ penalty.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch.nn import functional as F

from fusemesh.hybrid.data_parallel import sum_over_replicas
from fusemesh.transformer import Transformer


@dataclass(frozen=True)
class Sampling:
    """The distribution that the next token is drawn from.

    temperature: divides the logits. top_k: only the k most probable tokens; 0: all. top_p: only the most probable
    tokens whose probabilities just reach p together; 1: all.

    Raises:
        ValueError: a number that is out of range.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        if not 0 < self.temperature < math.inf:
            raise ValueError(
                f"temperature: expected a positive number, received {self.temperature!r}; for the most probable token "
                "leave sampling away"
            )
        if self.top_k < 0:
            raise ValueError(f"top_k: expected at least 0, which keeps all tokens, received {self.top_k!r}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p: expected above 0 and at most 1, which keeps all tokens, received {self.top_p!r}")

    def draw(self, logits: torch.Tensor, random: torch.Generator) -> torch.Tensor:
        """One token int64 [R] for each row of logits [R, V]; ``random`` is a CPU's."""
        values, tokens = (logits.double() / self.temperature).sort(dim=-1, descending=True, stable=True)
        if self.top_k:
            values[:, self.top_k :] = float("-inf")
        probabilities = values.softmax(-1)
        total = probabilities.cumsum(-1)
        # The token with which the sum reaches p is the last that stays.
        probabilities = probabilities.masked_fill(total - probabilities >= self.top_p, 0.0)
        total = probabilities.cumsum(-1)
        point = torch.rand(len(logits), 1, generator=random, dtype=torch.float64).to(logits.device) * total[:, -1:]
        place = (total <= point).sum(-1, keepdim=True).clamp(max=logits.shape[-1] - 1)
        return tokens.gather(-1, place).squeeze(-1)


@torch.no_grad()
def generate(
    model: Transformer,
    prompts: Sequence[torch.Tensor],
    *,
    max_new_tokens: int,
    begin: int | None = None,
    end: int | None = None,
    sampling: Sampling | None = None,
    num_beams: int = 1,
    length_penalty: float = 1.0,
    seed: int = 0,
    use_cache: bool = True,
    on_token: Callable[[int, int], None] | None = None,
    on_score: Callable[[int, float], None] | None = None,
) -> list[torch.Tensor]:
    """Return the tokens that a decoder adds to each prompt, or that an encoder-decoder makes of each source.

    Args:
        prompts: int64 [n] each, on the model's device, at least one token; they are padded on the left.
        max_new_tokens: of each row.
        begin: the first token of the decoder of an encoder-decoder, which needs one.
        end: the token that ends a row; None: rows end at max_new_tokens.
        sampling: None takes the most probable token every time.
        num_beams: more than 1 keeps as many beginnings of each row, and returns the most probable whole row found;
            not with sampling.
        length_penalty: rows are compared by log-probability / length ^ length_penalty.
        seed: of the random numbers.
        use_cache: False computes every token anew at each step, for comparison.
        on_token: called with (row, token) as soon as a token is known; not with beams.
        on_score: called at the end with (row, log-probability of its tokens, ``end`` among them if it was reached).

    Returns:
        int64 [m] for each prompt, m <= max_new_tokens, without ``end``.

    Raises:
        ValueError: an argument is wrong, or prompt and new tokens are longer than the model's max_sequence_length.
    """
    _check(model, prompts, max_new_tokens, begin, sampling, num_beams, on_token)
    was_training = model.training
    model.eval()
    try:
        with model.whole_sequences():
            steps = (_Steps if model.config.memory_at is None else _TargetSteps)(model, prompts, max_new_tokens, begin)
            steps.use_cache = use_cache
            if num_beams > 1:
                rows, scores = _beams(steps, len(prompts), num_beams, max_new_tokens, end, length_penalty)
            else:
                scored = on_score is not None
                rows, scores = _rows(steps, len(prompts), max_new_tokens, end, sampling, seed, on_token, scored)
    finally:
        model.train(was_training)
    if on_score is not None:
        for row, score in enumerate(scores):
            on_score(row, score)
    return rows


def _check(
    model: Transformer,
    prompts: Sequence[torch.Tensor],
    max_new_tokens: int,
    begin: int | None,
    sampling: Sampling | None,
    num_beams: int,
    on_token: Callable[[int, int], None] | None,
) -> None:
    config = model.config
    if not model.output.generates:
        raise ValueError(f"model: expected a decoder or an encoder-decoder, received a {config.architecture}")
    if not prompts or any(prompt.ndim != 1 or prompt.numel() == 0 for prompt in prompts):
        shapes = [tuple(prompt.shape) for prompt in prompts]
        raise ValueError(f"prompts: expected at least one, each [n] with n >= 1, received {shapes}")
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens: expected at least 1, received {max_new_tokens}")
    longest, limit = max(len(prompt) for prompt in prompts), config.max_sequence_length
    needed = longest + max_new_tokens if config.memory_at is None else max(longest, max_new_tokens)
    if needed > limit:
        raise ValueError(
            f"max_new_tokens: expected at most {limit - (longest if config.memory_at is None else 0)} with a prompt of "
            f"{longest} and max_sequence_length = {limit}, received {max_new_tokens}; cut the prompt"
        )
    if (config.memory_at is not None) != (begin is not None):
        expected = "the token that begins every target" if config.memory_at is not None else "None for a decoder"
        raise ValueError(f"begin: expected {expected}, received {begin!r}")
    if num_beams < 1:
        raise ValueError(f"num_beams: expected at least 1, received {num_beams}")
    for name, value in (("sampling", sampling), ("on_token", on_token)):
        if num_beams > 1 and value is not None:
            raise ValueError(f"{name}: expected None with num_beams = {num_beams}, received {value!r}; use one beam")


class _Steps:
    """The tokens so far of some rows, and the logits of the next one; for a decoder."""

    use_cache = True

    def __init__(
        self, model: Transformer, prompts: Sequence[torch.Tensor], max_new_tokens: int, begin: int | None
    ) -> None:
        self.model = model
        device = prompts[0].device
        lengths = torch.tensor([len(prompt) for prompt in prompts], device=device)
        most = int(max(len(prompt) for prompt in prompts))
        # [R, most], prompts at the right
        self.tokens = torch.stack([F.pad(prompt, (most - len(prompt), 0)) for prompt in prompts])
        self.starts = most - lengths
        self.caches = model.new_caches(most + max_new_tokens, self.starts)

    def logits(self) -> torch.Tensor:
        """Return the logits [R, V] of the next token."""
        if self.use_cache:
            return self.model.logits(self.tokens[:, self.caches.used :], caches=self.caches)[:, -1]
        # Moved to the left, rows need no mask: what is behind a row's end is not seen.
        length = self.tokens.shape[1]
        at = (torch.arange(length, device=self.tokens.device) + self.starts[:, None]) % length
        logits = self.model.logits(self.tokens.gather(1, at))
        last = (length - 1 - self.starts)[:, None, None].expand(-1, 1, logits.shape[-1])
        return logits.gather(1, last)[:, 0]

    def add(self, tokens: torch.Tensor) -> None:
        """Append one token, int64 [R], to each row."""
        self.tokens = torch.cat((self.tokens, tokens[:, None]), dim=1)

    def reorder(self, rows: torch.Tensor) -> None:
        """Put a copy of row ``rows[i]`` in the place of row i."""
        self.tokens, self.starts = self.tokens[rows], self.starts[rows]
        self.caches.reorder(rows)

    def any_replica(self, own: bool) -> bool:
        """Return whether any replica passes True; every rank calls it."""
        if self.model.mesh is None:
            return own
        flag = torch.tensor(float(own), device=self.tokens.device)
        return bool(sum_over_replicas(flag, self.model.mesh).item() > 0)


class _TargetSteps(_Steps):
    """The same for an encoder-decoder: the prompts are sources, and every target begins with one token."""

    def __init__(
        self, model: Transformer, prompts: Sequence[torch.Tensor], max_new_tokens: int, begin: int | None
    ) -> None:
        assert begin is not None
        super().__init__(model, [prompt.new_tensor([begin]) for prompt in prompts], max_new_tokens, None)
        self.lengths = torch.tensor([len(prompt) for prompt in prompts], device=self.tokens.device)
        most = int(max(len(prompt) for prompt in prompts))
        self.source = torch.stack([F.pad(prompt, (0, most - len(prompt))) for prompt in prompts])

    def logits(self) -> torch.Tensor:
        new = self.tokens[:, self.caches.used :] if self.use_cache else self.tokens
        caches = self.caches if self.use_cache else None
        return self.model.logits(self.source, lengths=self.lengths, target_tokens=new, caches=caches)[:, -1]

    def reorder(self, rows: torch.Tensor) -> None:
        super().reorder(rows)
        self.source, self.lengths = self.source[rows], self.lengths[rows]


def _rows(
    steps: _Steps,
    count: int,
    max_new_tokens: int,
    end: int | None,
    sampling: Sampling | None,
    seed: int,
    on_token: Callable[[int, int], None] | None,
    scored: bool,
) -> tuple[list[torch.Tensor], list[float]]:
    random = torch.Generator().manual_seed(seed)
    found: list[list[int]] = [[] for _ in range(count)]
    scores = [0.0] * count
    running = set(range(count))
    for _ in range(max_new_tokens):
        logits = steps.logits()
        chosen = logits.argmax(-1) if sampling is None else sampling.draw(logits, random)
        steps.add(chosen)
        if scored:
            taken = logits.double().log_softmax(-1).gather(-1, chosen[:, None]).squeeze(-1).tolist()
            for row in running:
                scores[row] += taken[row]
        for row, token in enumerate(chosen.tolist()):
            if row in running and token == end:
                running.discard(row)
            elif row in running:
                found[row].append(token)
                if on_token is not None:
                    on_token(row, token)
        if not steps.any_replica(bool(running)):
            break
    return [steps.tokens.new_tensor(tokens) for tokens in found], scores


def _beams(
    steps: _Steps, count: int, beams: int, max_new_tokens: int, end: int | None, penalty: float
) -> tuple[list[torch.Tensor], list[float]]:
    device = steps.tokens.device
    prefix = steps.tokens.shape[1]
    steps.reorder(torch.arange(count, device=device).repeat_interleave(beams))
    # All beams of a row begin alike: the first alone counts.
    scores = torch.full((count, beams), float("-inf"), dtype=torch.float64, device=device)
    scores[:, 0] = 0.0
    # Of each row: log-probability over length, its tokens, log-probability.
    done: list[list[tuple[float, torch.Tensor, float]]] = [[] for _ in range(count)]
    first_rows = torch.arange(count, device=device)[:, None] * beams
    for length in range(1, max_new_tokens + 1):
        # [B, beams * V]
        logits = steps.logits()
        total = (scores.view(-1, 1) + logits.double().log_softmax(-1)).view(count, -1)
        best, places = total.topk(min(2 * beams, total.shape[1]), dim=1)
        rows, tokens = places // logits.shape[-1], places % logits.shape[-1]
        is_end = tokens == end if end is not None else torch.zeros_like(tokens, dtype=torch.bool)
        # An end among the best `beams` is a whole row; the others go on, those that end last.
        for row, rank in is_end[:, :beams].nonzero().tolist():
            if math.isfinite(best[row, rank].item()):
                whole = steps.tokens[row * beams + int(rows[row, rank]), prefix:].clone()
                score = best[row, rank].item()
                done[row].append((score / length**penalty, whole, score))
        kept = is_end.to(torch.int8).argsort(dim=1, stable=True)[:, :beams]
        scores = best.gather(1, kept).masked_fill(is_end.gather(1, kept), float("-inf"))
        steps.reorder((first_rows + rows.gather(1, kept)).flatten())
        steps.add(tokens.gather(1, kept).flatten())
        for finished in done:
            finished.sort(key=lambda found: -found[0])
            del finished[beams:]
        # Log-probabilities only fall, so a beam's score now, divided by the most that its length may be, bounds it.
        reach = max_new_tokens if penalty > 0 else length
        open_rows = [
            len(finished) < beams or scores[row, 0].item() / reach**penalty > finished[-1][0]
            for row, finished in enumerate(done)
        ]
        if not steps.any_replica(any(open_rows)):
            break
    for row, finished in enumerate(done):
        # What has no end at the last length competes as it is.
        rest = steps.tokens[row * beams, prefix:]
        score = scores[row, 0].item()
        finished.append((score / rest.numel() ** penalty, rest.clone(), score))
    chosen = [max(finished, key=lambda found: found[0]) for finished in done]
    return [tokens for _, tokens, _ in chosen], [score for *_, score in chosen]
