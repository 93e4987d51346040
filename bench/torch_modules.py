"""What fusemesh.accelerate() costs or gains: torch.nn's modules with and without it, side by side.

    python bench/torch_modules.py [--device cuda] [--dtype bfloat16] [--length 512] [--rounds 20]

Each row is the median of interleaved rounds: a step of training, or a forward in inference (PyTorch's fused path).
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import time
from collections.abc import Callable

import torch
from torch import nn

import fusemesh
from fusemesh.integrations.pytorch.routes import reset_routes, routes


def cases(options: argparse.Namespace) -> dict[str, Callable[[], object]]:
    """Return the modules to time, by name."""
    to = {"device": options.device, "dtype": getattr(torch, options.dtype)}
    width, heads, length = options.width, options.width // 64, options.length
    layer = nn.TransformerEncoderLayer(width, heads, 4 * width, 0.0, batch_first=True, **to)
    encoder = nn.TransformerEncoder(layer, 2)
    decoder = nn.TransformerDecoder(nn.TransformerDecoderLayer(width, heads, 4 * width, 0.0, batch_first=True, **to), 2)
    attention = nn.MultiheadAttention(width, heads, batch_first=True, **to)
    x = torch.randn(options.batch, length, width, **to)
    mask = nn.Transformer.generate_square_subsequent_mask(length, **to)
    lengths = torch.linspace(length // 4, length, options.batch, device=options.device).long()
    padding = torch.arange(length, device=options.device) >= lengths[:, None]

    def training(module: nn.Module, run: Callable[[], torch.Tensor]) -> Callable[[], object]:
        def step() -> None:
            module.train()
            module.zero_grad()
            run().float().square().mean().backward()

        return step

    def inference(module: nn.Module, run: Callable[[], object]) -> Callable[[], object]:
        def forward() -> None:
            module.eval()
            with torch.no_grad():
                run()

        return forward

    return {
        "encoder, training": training(encoder, lambda: encoder(x)),
        "encoder, training, causal": training(encoder, lambda: encoder(x, mask=mask, is_causal=True)),
        "encoder, training, padded": training(encoder, lambda: encoder(x, src_key_padding_mask=padding)),
        "encoder, inference": inference(encoder, lambda: encoder(x)),
        "encoder, inference, causal": inference(encoder, lambda: encoder(x, mask=mask, is_causal=True)),
        "encoder, inference, padded": inference(encoder, lambda: encoder(x, src_key_padding_mask=padding)),
        "decoder, training": training(decoder, lambda: decoder(x, x, tgt_mask=mask, tgt_is_causal=True)),
        "decoder, inference": inference(decoder, lambda: decoder(x, x, tgt_mask=mask, tgt_is_causal=True)),
        "attention with weights": training(attention, lambda: attention(x, x, x)[0]),
    }


def milliseconds(run: Callable[[], object], device: str) -> float:
    start = time.perf_counter()
    run()
    if device == "cuda":
        torch.cuda.synchronize()
    return 1e3 * (time.perf_counter() - start)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--backend", default="auto")
    for name, value in (("batch", 4), ("length", 256), ("width", 256), ("rounds", 15)):
        parser.add_argument(f"--{name}", type=int, default=value)
    options = parser.parse_args()
    print(f"{'ms, median':<30}{'PyTorch':>10}{'fusemesh':>10}{'ratio':>8}  where")
    for name, run in cases(options).items():
        times: dict[bool, list[float]] = {False: [], True: []}
        reset_routes()
        for round_ in range(options.rounds + 2):
            for ours in (False, True):
                with fusemesh.accelerate(options.backend) if ours else contextlib.nullcontext():
                    taken = milliseconds(run, options.device)
                if round_ >= 2:
                    times[ours].append(taken)
        theirs, mine = (statistics.median(times[ours]) for ours in (False, True))
        where = ", ".join(sorted({route.backend or f"PyTorch ({route.reason})" for route in routes()}))
        print(f"{name:<30}{theirs:>10.2f}{mine:>10.2f}{mine / theirs:>8.2f}  {where}")


if __name__ == "__main__":
    main()
