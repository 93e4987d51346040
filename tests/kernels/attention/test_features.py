"""Layer: one process, CPU, no Triton. Softcap, ALiBi, score mods, sinks and dropout on the reference; their rules."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch.nn import functional as F

import fusemesh
from fusemesh import Origin, ScoreMod, flash_attention, register_score_mod
from fusemesh.kernels.attention.call import score_mods
from fusemesh.kernels.attention.reference import philox

B, H, HKV, S, D = 2, 4, 2, 9, 8


def inputs(seq_q: int = S, seq_k: int = S, *, requires_grad: bool = False) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = ((B, H, seq_q, D), (B, HKV, seq_k, D), (B, HKV, seq_k, D))
    made = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
    return [x.requires_grad_(requires_grad) for x in made]


def by_hand(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, modify: Any, sinks: torch.Tensor | None = None) -> Any:
    """Scores by torch's own matmul, changed by ``modify``, and a softmax with the sink as one more column."""
    k, v = (x.repeat_interleave(H // HKV, 1) for x in (k, v))
    s = modify(q @ k.mT / math.sqrt(D))
    if sinks is not None:
        s = torch.cat([s, sinks[:, None, None].expand(*s.shape[:3], 1)], -1)
    p = s.softmax(-1)
    return p[..., : k.shape[2]] @ v


def test_softcap() -> None:
    q, k, v = inputs()
    close(flash_attention(q, k, v, softcap=0.7), by_hand(q, k, v, lambda s: 0.7 * torch.tanh(s / 0.7)))


@pytest.mark.parametrize("dims", ["h", "bh"])
def test_alibi(dims: str) -> None:
    q, k, v = inputs(5, 9)
    slopes = torch.rand((B, H) if dims == "bh" else (H,), dtype=torch.float64)
    distance = (torch.arange(5)[:, None] + 4 - torch.arange(9)).abs()
    want = by_hand(q, k, v, lambda s: s - slopes[..., None, None] * distance)
    close(flash_attention(q, k, v, alibi_slopes=slopes, align="bottom_right"), want)


def test_sinks_are_a_column_without_value_and_lse_leaves_them_out() -> None:
    q, k, v = inputs()
    sinks = torch.tensor([-1.0, 0.0, 3.0, 50.0], dtype=torch.float64)
    out, lse = flash_attention(q, k, v, sinks=sinks, return_lse=True)
    close(out, by_hand(q, k, v, lambda s: s, sinks))
    close(lse, flash_attention(q, k, v, return_lse=True)[1])


def test_gradients_of_all_at_once() -> None:
    q, k, v = (x[:1, :heads, :, :2].detach().requires_grad_() for x, heads in zip(inputs(2, 3), (2, 1, 1), strict=True))
    sinks = torch.randn(2, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(2, 2, 3, dtype=torch.float64, requires_grad=True)
    mod = register_score_mod(ScoreMod("square of the tests", None, None, lambda s, b, h, i, j: s + 0.1 * s * s))

    def call(q: Any, k: Any, v: Any, sinks: Any, bias: Any) -> Any:
        slopes = torch.tensor([0.1, 0.2])
        options = {"alibi_slopes": slopes, "softcap": 2.0, "score_mod": mod(), "dropout_p": 0.2, "seed": 3}
        return flash_attention(
            q, k, v, sinks=sinks, bias=bias, causal=True, align="bottom_right", return_lse=True, **options
        )

    assert torch.autograd.gradcheck(call, (q, k, v, sinks, bias))
    assert torch.autograd.gradgradcheck(call, (q, k, v, sinks, bias), atol=1e-4)
    # The formulas of the explicit backward against autograd.
    from fusemesh.kernels.attention.call.options import Call
    from fusemesh.kernels.attention.call.spec import AttentionSpec
    from fusemesh.kernels.attention.dense.ops import FIELDS

    # Without mods, whose gradient comes of autograd, which does not reach into an op.
    spec = AttentionSpec(0.3, None, 0, 1, 0, dropout_p=0.3)
    seed = torch.tensor([9])

    def op(q: Any, k: Any, v: Any, sinks: Any, bias: Any) -> Any:
        values = FIELDS.pack(Call(spec, bias=bias, sinks=sinks, seed=seed))
        return torch.ops.fusemesh.attention_forward(q, k, v, *values, "reference")

    assert torch.autograd.gradcheck(op, (q, k, v, sinks, bias[None]))
    assert torch.autograd.gradgradcheck(op, (q, k, v, sinks, bias[None]), atol=1e-4)


class TestScoreMod:
    def test_positions_are_those_in_the_whole(self) -> None:
        """A shard of queries, keys, heads and batches computes what the whole does there."""

        def torch_forward(s: torch.Tensor, i_b: Any, i_h: Any, i_q: Any, i_k: Any, table: Any, *, weight: float) -> Any:
            return s + weight * table[i_h, (i_q - i_k) % 5] * (1 + i_b)

        mod = register_score_mod(ScoreMod("shards of the tests", None, None, torch_forward, 1, 1))
        bound = mod(torch.randn(H, 5, dtype=torch.float64), weight=0.5)
        q, k, v = inputs()
        options: dict[str, Any] = {"causal": True, "score_mod": bound, "dropout_p": 0.25, "seed": 11}
        out, lse = flash_attention(q, k, v, return_lse=True, **options)
        rows, heads, batches = slice(4, 8), slice(2, 4), slice(1, 2)
        origin = Origin(q=4, head=2, batch=torch.tensor(1))
        part, part_lse = flash_attention(
            q[batches, heads, rows], k[batches, 1:2], v[batches, 1:2], origin=origin, return_lse=True, **options
        )
        close(part, out[batches, heads, rows])
        close(part_lse, lse[batches, heads, rows])

    def test_names_are_taken_once(self) -> None:
        mod = ScoreMod("twice of the tests", None, None, lambda s, b, h, i, j: s)
        assert register_score_mod(mod) is mod and register_score_mod(mod) is mod
        with pytest.raises(ValueError, match=r"name: expected a name that is free, received 'twice of the tests'"):
            register_score_mod(ScoreMod("twice of the tests", None, None, lambda s, b, h, i, j: 2 * s))
        with pytest.raises(ValueError, match=r"num_params: expected 0, .* received 1"):
            register_score_mod(ScoreMod("counts", None, None, lambda s, b, h, i, j: s, num_params=1))
        with pytest.raises(ValueError, match=r"mod: expected a fusemesh.ScoreMod, received function"):
            register_score_mod(lambda s: s)

    def test_calls(self) -> None:
        mod = ScoreMod("calls of the tests", None, None, lambda s, b, h, i, j, t, *, low, high: s, 1, 2)
        assert mod(torch.ones(2), high=2, low=1).params == (1.0, 2.0), "in torch_forward's order, whatever the call's"
        with pytest.raises(ValueError, match="expected 1 tensors"):
            mod(high=2, low=1)
        with pytest.raises(ValueError, match=r"expected the params \('low', 'high'\), received \('low',\)"):
            mod(torch.ones(2), low=1)
        with pytest.raises(ValueError, match=r"score_mod: expected one of .* received 'calls of the tests'"):
            flash_attention(*inputs(), score_mod=mod(torch.ones(2), high=2, low=1))

    def test_aux_tensors(self) -> None:
        plain = register_score_mod(
            ScoreMod("aux of the tests", None, None, lambda s, b, h, i, j, table: s + table[i], 1)
        )
        learnt = register_score_mod(
            ScoreMod("learnt of the tests", None, None, lambda s, b, h, i, j, t: s * t[j], 1, aux_grad=True)
        )
        table = torch.randn(S, dtype=torch.float64, requires_grad=True)
        with pytest.raises(ValueError, match="score_mod: expected aux tensors without gradient"):
            flash_attention(*inputs(), score_mod=plain(table))
        with pytest.raises(ValueError, match="score_mod: expected contiguous aux tensors"):
            flash_attention(*inputs(), score_mod=plain(torch.ones(2 * S)[::2]))
        q, k, v = inputs()
        out = flash_attention(q, k, v, score_mod=learnt(table))
        close(
            torch.autograd.grad(out.sum(), table)[0],
            torch.autograd.grad(by_hand(q, k, v, lambda s: s * table).sum(), table)[0],
        )


class TestDropout:
    def test_philox_is_the_published_one(self) -> None:
        """Known answers of the paper's own test vectors."""
        for counter, key, words in (
            ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
            ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
            (
                (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
                (0xA4093822, 0x299F31D0),
                (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
            ),
        ):
            seed = torch.tensor((key[1] << 32 | key[0]) - (2**64 if key[1] >= 2**31 else 0))
            found = philox.philox(seed, tuple(torch.tensor(word) for word in counter))
            assert tuple(int(word) for word in found) == words

    @pytest.mark.parametrize("p", [0.1, 0.5])
    def test_statistics(self, p: float) -> None:
        """The share that is kept, in all and by row, column, head and batch, within five standard deviations."""
        positions = [
            torch.arange(n).view([-1 if i == dim else 1 for i in range(4)]) for dim, n in enumerate((4, 8, 64, 96))
        ]
        kept = philox.keep(torch.tensor([5]), *positions, p).double()
        for dims in ((0, 1, 2, 3), (0, 1, 2), (0, 1, 3), (1, 2, 3), (0, 2, 3)):
            share = kept.mean(dims)
            deviation = math.sqrt(p * (1 - p) / (kept.numel() / share.numel()))
            assert (share - (1 - p)).abs().max() < 5 * deviation
        other = philox.keep(torch.tensor([6]), *positions, p).double()
        agreement = (kept == other).double().mean()
        assert abs(agreement - (p * p + (1 - p) ** 2)) < 0.01, "another seed, another mask"

    def test_zero_and_the_mean(self) -> None:
        q, k, v = inputs()
        close(flash_attention(q, k, v, dropout_p=0.0, seed=1), flash_attention(q, k, v))
        mean = torch.stack([flash_attention(q, k, v, dropout_p=0.5, seed=seed) for seed in range(3000)]).mean(0)
        torch.testing.assert_close(mean, flash_attention(q, k, v), rtol=0, atol=0.12)

    def test_seeds(self) -> None:
        q, k, v = inputs()

        def call(seed: Any) -> torch.Tensor:
            return flash_attention(q, k, v, dropout_p=0.5, seed=seed)

        assert torch.equal(call(7), call(torch.tensor([7]))) and not torch.equal(call(7), call(8))
        torch.manual_seed(0)
        drawn = call(None)
        assert not torch.equal(drawn, call(None))
        torch.manual_seed(0)
        assert torch.equal(drawn, call(None)), "torch's generator decides"

    def test_forward_and_backward_need_the_same_seed(self) -> None:
        q, k, v = inputs()
        with pytest.raises(ValueError, match="seed: expected an int or an int64 tensor, because dropout_p is given"):
            fusemesh.attention_forward(q, k, v, dropout_p=0.5)
        out, lse = fusemesh.attention_forward(q, k, v, dropout_p=0.5, seed=4)
        with pytest.raises(ValueError, match="seed: expected"):
            fusemesh.attention_backward(out, q, k, v, out, lse, dropout_p=0.5)
        leaves = [x.requires_grad_() for x in (q, k, v)]
        want = torch.autograd.grad(flash_attention(*leaves, dropout_p=0.5, seed=4), leaves, torch.ones_like(out))
        got = fusemesh.attention_backward(torch.ones_like(out), q, k, v, out, lse, dropout_p=0.5, seed=4)
        for mine, theirs in zip(got[:3], want, strict=True):
            close(mine, theirs)


@pytest.mark.parametrize("backend", ["torch"])
@pytest.mark.parametrize(
    "options",
    [{"softcap": 2.0}, {"sinks": torch.zeros(H)}, {"dropout_p": 0.5, "seed": 1}],
    ids=["softcap", "sinks", "dropout"],
)
def test_backends_that_have_none_of_it_say_so(backend: str, options: dict[str, Any]) -> None:
    q, k, v = (F.pad(x.float(), (0, 8)) for x in inputs())
    with pytest.raises(ValueError, match=r"softcap|score_mod|sinks|dropout"):
        flash_attention(q, k, v, backend=backend, **options)
    flash_attention(q, k, v, **options)


def test_built_in_mods_are_mods_like_any_other() -> None:
    assert score_mods.get("softcap") is score_mods.SOFTCAP and score_mods.get("alibi") is score_mods.ALIBI


def close(found: Any, want: torch.Tensor) -> None:
    torch.testing.assert_close(found, want, rtol=1e-12, atol=1e-12)
