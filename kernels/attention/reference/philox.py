"""Dropout's random bits in plain PyTorch: integers only, so that every backend drops the same elements.

Philox 4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011). The counter of an element is
(i_k >> 2, i_q, head, batch), positions in the whole as signed 32-bit words (they wrap around); the key is the seed's
(low, high) word; word i_k & 3 of the result decides: an element is kept iff that word, unsigned, is at least
floor(p * 2^32).
"""

from __future__ import annotations

import torch

from ..call.spec import dropout_threshold

_MASK = 0xFFFFFFFF
_ROUND_A, _ROUND_B = 0xD2511F53, 0xCD9E8D57
_KEY_A, _KEY_B = 0x9E3779B9, 0xBB67AE85


def _multiply(a: int, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """High and low word of the product of two unsigned 32-bit words, kept in int64."""
    # In halves of 16 bits, because the whole product does not fit a signed 64-bit integer.
    low, high = a * (b & 0xFFFF), a * (b >> 16)
    middle = (low >> 16) + (high & 0xFFFFFFFF)
    return (high >> 32 << 16) + (middle >> 16) & _MASK, (middle << 16 | low & 0xFFFF) & _MASK


def philox(seed: torch.Tensor | int, counter: tuple[torch.Tensor, ...], rounds: int = 10) -> tuple[torch.Tensor, ...]:
    """Four random words for each counter.

    Args:
        seed: an int of 64 bits, or int64 with one element.
        counter: four int64 tensors that broadcast; their low 32 bits count.

    Returns:
        Four int64 tensors in [0, 2^32).
    """
    key_a, key_b = seed & _MASK, seed >> 32 & _MASK
    a, b, c, d = (x & _MASK for x in counter)
    for _ in range(rounds):
        high_a, low_a = _multiply(_ROUND_A, a)
        high_c, low_c = _multiply(_ROUND_B, c)
        a, b, c, d = high_c ^ b ^ key_a, low_c, high_a ^ d ^ key_b, low_a
        key_a, key_b = key_a + _KEY_A & _MASK, key_b + _KEY_B & _MASK
    return a, b, c, d


def keep(
    seed: torch.Tensor, i_b: torch.Tensor, i_h: torch.Tensor, i_q: torch.Tensor, i_k: torch.Tensor, p: float
) -> torch.Tensor:
    """Return the elements that dropout keeps: bool, the shape to which the int64 positions broadcast."""
    i_k = (i_k + 2**31) % 2**32 - 2**31
    words = philox(seed.reshape(()), (i_k >> 2, i_q, i_h, i_b))
    lane = (i_k & 3).expand(words[0].shape)
    word = torch.where(lane < 2, torch.where(lane == 0, words[0], words[1]), torch.where(lane == 2, words[2], words[3]))
    return word >= dropout_threshold(p)
