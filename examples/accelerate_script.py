"""A PyTorch script that was there before FuseMesh, and what changes in it: two lines, marked by `<--`.

The script trains a small nn.TransformerEncoder, with padding, to say which of two tokens a sequence holds more of. It
runs twice here, without FuseMesh and with it, and compares the losses, which must agree step by step.

    python examples/accelerate_script.py
"""

from __future__ import annotations

import contextlib

import torch
from torch import nn

import fusemesh  # <-- one
from fusemesh.kernels import backends

STEPS, BATCH, LENGTH, WIDTH, TOKENS = 60, 32, 24, 32, 8
TOLERANCE = 1e-3  # relative, between the losses of a step; rounding grows as training goes on


class Classifier(nn.Module):
    """Which of the tokens 1 and 2 is more frequent? Token 0 is padding."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(TOKENS, WIDTH, padding_idx=0)
        layer = nn.TransformerEncoderLayer(WIDTH, nhead=4, dim_feedforward=64, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, num_layers=2, enable_nested_tensor=False)
        self.head = nn.Linear(WIDTH, 2)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Return logits [B, 2] of tokens int64 [B, S]."""
        padding = tokens == 0
        h = self.encoder(self.embedding(tokens), src_key_padding_mask=padding)
        return self.head(h.masked_fill(padding.unsqueeze(-1), 0.0).sum(1) / (~padding).sum(1, keepdim=True))


def batch(generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Return sequences of random lengths, int64 [B, S], and their classes, int64 [B]."""
    tokens = torch.randint(1, TOKENS, (BATCH, LENGTH), generator=generator)
    lengths = torch.randint(4, LENGTH + 1, (BATCH, 1), generator=generator)
    tokens[torch.arange(LENGTH) >= lengths] = 0
    return tokens, ((tokens == 2).sum(1) > (tokens == 1).sum(1)).long()


def train() -> tuple[list[float], float]:
    """Train from the same seed every time; return the loss of each step, and the accuracy on new sequences."""
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(1)
    model = Classifier()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(STEPS):
        tokens, classes = batch(generator)
        loss = nn.functional.cross_entropy(model(tokens), classes)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    model.eval()
    with torch.no_grad():
        tokens, classes = batch(torch.Generator().manual_seed(2))
        accuracy = (model(tokens).argmax(-1) == classes).float().mean().item()
    return losses, accuracy


def main() -> None:
    results = {}
    for name, block in (("PyTorch", contextlib.nullcontext()), ("FuseMesh", fusemesh.accelerate())):
        backends.reset_call_counts()
        with block:  # <-- two: `with fusemesh.accelerate():` around what the script did
            results[name] = losses, accuracy = train()
        print(f"{name:<9} loss {losses[0]:.4f} ... {losses[-1]:.4f}, accuracy {accuracy:.2f}")
        for (op, backend), calls in backends.call_counts().items():
            print(f"          {op} ran on {backend} {calls} times")
    difference = max(abs(a - b) / b for a, b in zip(results["FuseMesh"][0], results["PyTorch"][0], strict=True))
    print(f"largest relative difference of a step's loss: {difference:.1e}")
    if difference > TOLERANCE:
        raise SystemExit("the losses disagree")


if __name__ == "__main__":
    main()
