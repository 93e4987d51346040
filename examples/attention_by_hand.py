"""Attention by hand: softmax(Q K^T / sqrt(d_k)) V for five words, step by step in numpy, then by flash_attention.

Q, K and V are all the same 5 x 5 matrix, 0.1, 0.2, ... 2.5 row by row: one row for each word.

    python examples/attention_by_hand.py
"""

from __future__ import annotations

import numpy as np
import torch

from fusemesh import flash_attention

WORDS = ("Attention", "is", "all", "you", "need")


def matrix() -> np.ndarray:
    """0.1, 0.2, ... 2.5 row by row, [5, 5]."""
    return np.arange(1, 26, dtype=np.float64).reshape(5, 5) / 10


def steps(q: np.ndarray, k: np.ndarray, v: np.ndarray) -> dict[str, np.ndarray]:
    """Every intermediate of attention under the formula it comes from, in order; the last one is the result.

    Args:
        q: [Sq, D], k: [Sk, D], v: [Sk, Dv].
    """
    products = q @ k.T
    scores = products / np.sqrt(k.shape[1])
    # The largest score of each row is subtracted first: the quotient stays what it is, and exp cannot overflow.
    exponentials = np.exp(scores - scores.max(axis=1, keepdims=True))
    weights = exponentials / exponentials.sum(axis=1, keepdims=True)
    return {
        "Q K^T": products,
        "scores = Q K^T / sqrt(d_k)": scores,
        "exp(scores - largest of the row)": exponentials,
        "weights = softmax(scores), each row sums to 1": weights,
        "output = weights V": weights @ v,
    }


def fused(q: np.ndarray, k: np.ndarray, v: np.ndarray) -> np.ndarray:
    """The same by one call, [Sq, Dv]. flash_attention takes [B, H, S, D]: here one batch and one head."""
    out = flash_attention(*(torch.from_numpy(x)[None, None] for x in (q, k, v)))
    return out[0, 0].numpy()


def main() -> None:
    x = matrix()
    print(f"Q = K = V, one row for each of {', '.join(WORDS)}:")
    print(x, end="\n\n")
    by_hand = steps(x, x, x)
    with np.printoptions(precision=6, suppress=True):
        for formula, value in by_hand.items():
            print(f"{formula}:")
            print(value, end="\n\n")
        print("flash_attention(Q, K, V):")
        out = fused(x, x, x)
        print(out, end="\n\n")
    difference = np.abs(out - by_hand["output = weights V"]).max()
    print(f"largest difference: {difference:.1e}")
    if difference > 1e-14:
        raise SystemExit("flash_attention and numpy disagree")


if __name__ == "__main__":
    main()
