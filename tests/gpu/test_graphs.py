"""Layer: kernels on a real GPU. Calls captured in a CUDA graph, replayed with other contents in the same tensors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from fusemesh import Origin, flash_attention, flash_attention_decode, flash_attention_varlen

pytestmark = pytest.mark.gpu

DEVICE = "cuda"
B, H, Hkv, D = 2, 8, 2, 64
Run = Callable[[], list[torch.Tensor]]


def captured(run: Run) -> Run:
    """``run`` as a graph: calling it replays the launches of one run, on what the tensors hold by then."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run()  # kernels compile here: nothing may during the capture
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = run()

    def replay() -> list[torch.Tensor]:
        graph.replay()
        return outputs

    return replay


def normal(*shape: int) -> torch.Tensor:
    return torch.randn(shape, device=DEVICE).to(torch.bfloat16)


def check(run: Run, fill: Callable[[int], None], written: tuple[torch.Tensor, ...] = ()) -> None:
    """Replayed after each ``fill`` the graph gives the bits of the plain call, in its outputs and in ``written``."""
    fill(0)
    replay = captured(run)
    results = []
    for step in (1, 2, 3):
        fill(step)
        want = [x.clone() for x in (*run(), *written)]
        fill(step)
        got = [x.clone() for x in (*replay(), *written)]
        for mine, theirs in zip(got, want, strict=True):
            assert torch.equal(mine.nan_to_num(7.0), theirs.nan_to_num(7.0))
        results.append(got[0])
    assert not torch.equal(results[0], results[1]), "the contents make no difference, so nothing was shown"


@pytest.mark.parametrize("paged", [False, True], ids=["contiguous", "paged"])
def test_decode(paged: bool) -> None:
    """Other lengths, other pages, other tokens; the graph appends and attends to what is there."""
    slots, page = 4096, 64
    tables = [torch.randperm(B * slots // page).view(B, -1).to(torch.int32).to(DEVICE) for _ in range(4)]
    caches = [normal(B * slots // page, Hkv, page, D) if paged else normal(B, Hkv, slots, D) for _ in range(2)]
    first = [x.clone() for x in caches]
    q, k_new, v_new = normal(B, H, 1, D), normal(B, Hkv, 1, D), normal(B, Hkv, 1, D)
    lens, starts = (torch.zeros(B, dtype=torch.int32, device=DEVICE) for _ in range(2))
    table = tables[0].clone()
    more = {"cache_lens": lens, "cache_starts": starts, "k_new": k_new, "v_new": v_new}
    if paged:
        more["block_table"] = table

    def run() -> list[torch.Tensor]:
        out, lse = flash_attention_decode(q, *caches, **more, return_lse=True, backend="triton")
        return [out, lse]

    def fill(step: int) -> None:
        generator = torch.Generator(DEVICE).manual_seed(step)
        for cache, kept in zip(caches, first, strict=True):
            cache.copy_(kept)
        for x in (q, k_new, v_new):
            x.normal_(generator=generator)
        lens.copy_(torch.tensor([(0, 5), (4000, 17), (130, 4095), (63, 64)][step], dtype=torch.int32))
        starts.copy_(torch.tensor([(0, 0), (100, 0), (0, 4000), (5, 3)][step], dtype=torch.int32))
        table.copy_(tables[step])

    check(run, fill, tuple(caches))


def gradients(call: Callable[[], Any], leaves: list[torch.Tensor], incoming: list[torch.Tensor]) -> Run:
    def run() -> list[torch.Tensor]:
        outputs = call()
        return [*(x.detach() for x in outputs), *torch.autograd.grad(outputs, leaves, incoming)]

    return run


@pytest.mark.parametrize("everything", [False, True], ids=["plain", "everything"])
def test_forward_and_backward(everything: bool) -> None:
    """Other values, another mask, another seed and other origins."""
    S = 300
    q, k, v = (normal(B, heads, S, D).requires_grad_() for heads in (H, Hkv, Hkv))
    bias, sinks = normal(1, H, 1, S).requires_grad_(), normal(H).requires_grad_()
    mask = torch.ones(B, 1, S, S, dtype=torch.bool, device=DEVICE)
    seed = torch.zeros(1, dtype=torch.int64, device=DEVICE)
    at = [torch.zeros((), dtype=torch.int64, device=DEVICE) for _ in range(2)]
    do, dlse = normal(B, H, S, D), torch.zeros(B, H, S, device=DEVICE)
    more: dict[str, Any] = {"origin": Origin(q=at[0], k=at[1])}
    if everything:
        more |= {"bias": bias, "sinks": sinks, "mask": mask, "dropout_p": 0.2, "seed": seed, "softcap": 20.0}
    leaves = [q, k, v, *([bias, sinks] if everything else [])]

    def call() -> Any:
        return flash_attention(q, k, v, causal=True, return_lse=True, backend="triton", **more)

    def fill(step: int) -> None:
        generator = torch.Generator(DEVICE).manual_seed(step)
        with torch.no_grad():
            for x in (q, k, v, bias, sinks, do, dlse):
                x.normal_(generator=generator)
        mask.bernoulli_(0.3 + 0.2 * step, generator=generator)
        seed.fill_(step)
        for x, start in zip(at, [(0, 0), (3, 0), (0, 100), (200, 7)][step], strict=True):
            x.fill_(start)

    check(gradients(call, leaves, [do, dlse]), fill)


def test_packed_forward_and_backward() -> None:
    """Other lengths of the sequences, within the longest that was named."""
    total, longest = 600, 400
    q, k, v = (normal(total, heads, D).requires_grad_() for heads in (H, Hkv, Hkv))
    cu_q, cu_k = (torch.zeros(4, dtype=torch.int32, device=DEVICE) for _ in range(2))
    do, dlse = normal(total, H, D), torch.zeros(H, total, device=DEVICE)

    def call() -> Any:
        return flash_attention_varlen(
            q, k, v, cu_q, cu_k, longest, longest, causal=True, align="bottom_right", return_lse=True, backend="triton"
        )

    def fill(step: int) -> None:
        generator = torch.Generator(DEVICE).manual_seed(step)
        with torch.no_grad():
            for x in (q, k, v, do, dlse):
                x.normal_(generator=generator)
        cu_q.copy_(torch.tensor([(0, 0, 0, 0), (0, 400, 401, 600), (0, 0, 300, 590), (10, 20, 20, 30)][step]))
        cu_k.copy_(torch.tensor([(0, 0, 0, 0), (0, 390, 410, 600), (0, 7, 300, 400), (10, 200, 201, 600)][step]))

    check(gradients(call, [q, k, v], [do, dlse]), fill)
