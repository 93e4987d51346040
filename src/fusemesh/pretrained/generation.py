"""Continuations by transformers' own generate(), with the arguments of ours."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch.nn import functional as F
from transformers import GenerationConfig
from transformers.generation.streamers import BaseStreamer


class _Watch(BaseStreamer):
    """Tells of each new token of a single row."""

    def __init__(self, on_token: Callable[[int, int], None], ends: set[int]) -> None:
        self.on_token, self.ends, self.is_prompt, self.is_done = on_token, ends, True, False

    def put(self, value: torch.Tensor) -> None:
        if self.is_prompt:
            self.is_prompt = False
            return
        token = int(value.flatten()[0])
        self.is_done |= token in self.ends
        if not self.is_done:
            self.on_token(0, token)

    def end(self) -> None:
        self.is_done = True


@torch.no_grad()
def generate(
    model: Any,
    prompts: Sequence[torch.Tensor],
    *,
    max_new_tokens: int,
    begin: int | None = None,
    ends: Sequence[int] = (),
    sampling: Any = None,
    num_beams: int = 1,
    seed: int = 0,
    defaults: GenerationConfig | None = None,
    on_token: Callable[[int, int], None] | None = None,
    on_score: Callable[[int, float], None] | None = None,
) -> list[torch.Tensor]:
    """Return the tokens that a model adds to each prompt; see :meth:`fusemesh.models.base.ModelMaker.generate`.

    All ranks go on until every replica is done, as fully_shard's collectives need it. Random numbers come from torch's
    generator, seeded alike on every rank.

    Args:
        defaults: of the model's folder: what the arguments here do not say, such as tokens that are forced or never
            written, and penalties.

    Raises:
        ValueError: tokens are to be told of several rows at once.
    """
    if on_token is not None and len(prompts) > 1:
        raise ValueError(f"on_token: expected None with more than one prompt, received {len(prompts)} prompts")
    device = prompts[0].device
    pad = ends[0] if ends else 0
    options = copy.deepcopy(defaults) if defaults is not None else GenerationConfig()
    options.update(
        max_new_tokens=max_new_tokens,
        # It would say the same, of prompt and new tokens together.
        max_length=None,
        num_beams=num_beams,
        # One answer to each prompt.
        num_return_sequences=1,
        do_sample=sampling is not None,
        decoder_start_token_id=begin,
        eos_token_id=list(ends) or None,
        pad_token_id=pad if options.pad_token_id is None else options.pad_token_id,
        use_cache=True,
        return_dict_in_generate=True,
        output_logits=on_score is not None,
        output_scores=on_score is not None and num_beams > 1,
        **_drawn(sampling),
    )
    was_training = model.training
    model.eval()
    try:
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.manual_seed(seed)
            rows, mask = _padded(prompts, pad, left=begin is None)
            found = model.generate(
                rows,
                attention_mask=mask,
                generation_config=options,
                streamer=None if on_token is None else _Watch(on_token, set(ends)),
                synced_gpus=dist.is_initialized() and dist.get_world_size() > 1,
            )
    finally:
        model.train(was_training)
    start = 1 if begin is not None else rows.shape[1]
    added = [_up_to(row, set(ends)) for row in found.sequences[:, start:]]
    if on_score is not None:
        for row, score in enumerate(_scores(model, found, start, [len(x) for x in added], num_beams)):
            on_score(row, score)
    return added


def _padded(prompts: Sequence[torch.Tensor], pad: int, *, left: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Return prompts as rows [B, S], and int64 [B, S], 0 where a row is padded: on the left if it is to go on."""
    most = max(len(prompt) for prompt in prompts)

    def row(x: torch.Tensor, value: int) -> torch.Tensor:
        missing = most - len(x)
        return F.pad(x, (missing, 0) if left else (0, missing), value=value)

    rows = torch.stack([row(prompt, pad) for prompt in prompts])
    return rows, torch.stack([row(torch.ones_like(prompt), 0) for prompt in prompts])


def _drawn(sampling: Any) -> dict[str, Any]:
    """Return :class:`fusemesh.Sampling` in transformers' words, in which none of its own defaults is left."""
    if sampling is None:
        return {"temperature": None, "top_k": None, "top_p": None}
    return {"temperature": sampling.temperature, "top_k": sampling.top_k, "top_p": sampling.top_p}


def _up_to(row: torch.Tensor, ends: set[int]) -> torch.Tensor:
    """Return the tokens before the first that ends a row."""
    at = next((place for place, token in enumerate(row.tolist()) if token in ends), len(row))
    return row[:at]


def _scores(model: Any, found: Any, most: int, lengths: Sequence[int], num_beams: int) -> list[float]:
    """Return the log-probability of each row's new tokens, and of the one that ends it if it was reached."""
    added = found.sequences[:, most:]
    if num_beams > 1:
        steps = model.compute_transition_scores(found.sequences, found.scores, found.beam_indices).double()
    else:
        rows = [
            logits.double().log_softmax(-1).gather(-1, added[:, step, None]) for step, logits in enumerate(found.logits)
        ]
        steps = torch.cat(rows, dim=1)
    return [steps[row, : length + 1].sum().item() for row, length in enumerate(lengths)]
