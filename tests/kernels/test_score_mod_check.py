"""Layer: kernels, in Triton's interpreter. check_score_mod finds what is wrong with a mod; an error names its line."""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import triton
import triton.language as tl

import fusemesh
from fusemesh.kernels.attention.call import score_mods
from fusemesh.kernels.testing.table_mod import TABLE_MOD


@triton.jit
def square(b_s, i_b, i_h, i_q, i_k, aux, numbers):
    return b_s * b_s * tl.where(i_q >= i_k, 1.0, 2.0)


@triton.jit
def square_backward(b_ds, b_s, i_b, i_h, i_q, i_k, aux, numbers):
    return 2 * b_ds * b_s * tl.where(i_q >= i_k, 1.0, 2.0)


@triton.jit
def off_by_one_position(b_ds, b_s, i_b, i_h, i_q, i_k, aux, numbers):
    return 2 * b_ds * b_s * tl.where(i_q > i_k, 1.0, 2.0)


@triton.jit
def of_a_transposed_tile(b_s, i_b, i_h, i_q, i_k, aux, numbers):
    return b_s * b_s * tl.where(i_q >= i_k, 1.0, 2.0) + tl.where(i_q.shape[0] == 1, 0.01, 0.0)


@triton.jit
def hidden(b_s, i_b, i_h, i_q, i_k, aux, numbers):
    return tl.where(i_q >= i_k, b_s, float("-inf"))


@triton.jit
def hidden_backward(b_ds, b_s, i_b, i_h, i_q, i_k, aux, numbers):
    return tl.where(i_q >= i_k, b_ds, 0.0)


@triton.jit
def kept(b_s, i_b, i_h, i_q, i_k, aux, numbers):
    return b_s


@triton.jit
def kept_gradient(b_ds, b_s, i_b, i_h, i_q, i_k, aux, numbers):
    return b_ds


@triton.jit
def doubled_in_late_rows(b_ds, b_s, i_b, i_h, i_q, i_k, aux, numbers):
    return tl.where(i_q > 64, 2 * b_ds, b_ds)


@triton.jit
def doubled_in_late_keys(b_ds, b_s, i_b, i_h, i_q, i_k, aux, numbers):
    return tl.where(i_k - i_q > 64, 2 * b_ds, b_ds)


@triton.jit
def doubled_in_other_heads(b_ds, b_s, i_b, i_h, i_q, i_k, aux, numbers):
    return tl.where(i_h >= 2, 2 * b_ds, b_ds)


@triton.jit
def doubled_in_other_samples(b_ds, b_s, i_b, i_h, i_q, i_k, aux, numbers):
    return tl.where(i_b >= 2, 2 * b_ds, b_ds)


@triton.jit
def clamped(b_s, i_b, i_h, i_q, i_k, aux, numbers):
    return tl.minimum(b_s, 10.0)


@triton.jit
def steep(b_s, i_b, i_h, i_q, i_k, aux, numbers):
    return tl.exp(4 * b_s) + tl.sin(0.7 * (i_q - i_k))


@triton.jit
def steep_backward(b_ds, b_s, i_b, i_h, i_q, i_k, aux, numbers):
    return 4 * tl.exp(4 * b_s) * b_ds


@triton.jit
def part_of_a_number(numbers):
    return numbers[3]


@triton.jit
def broken(b_s, i_b, i_h, i_q, i_k, aux, numbers):
    return b_s + part_of_a_number(numbers)


def square_in_torch(s: Any, i_b: Any, i_h: Any, i_q: Any, i_k: Any) -> Any:
    return s * s * torch.where(i_q >= i_k, 1.0, 2.0)


def without_positions(s: Any, i_b: Any, i_h: Any, i_q: Any, i_k: Any) -> Any:
    return 1.5 * s * s


def detached(s: Any, i_b: Any, i_h: Any, i_q: Any, i_k: Any) -> Any:
    return s * s.detach() * torch.where(i_q >= i_k, 1.0, 2.0)


def hidden_in_torch(s: Any, i_b: Any, i_h: Any, i_q: Any, i_k: Any) -> Any:
    return torch.where(i_q >= i_k, s, float("-inf"))


def mixed(s: Any, i_b: Any, i_h: Any, i_q: Any, i_k: Any) -> Any:
    return s.softmax(-1)


def as_it_is(s: Any, i_b: Any, i_h: Any, i_q: Any, i_k: Any) -> Any:
    return s * 1.0


def clamped_in_torch(s: Any, i_b: Any, i_h: Any, i_q: Any, i_k: Any) -> Any:
    return s.clamp(max=10.0)


def steep_in_torch(s: Any, i_b: Any, i_h: Any, i_q: Any, i_k: Any) -> Any:
    return torch.exp(4 * s) + (0.7 * (i_q - i_k).to(s.dtype)).sin()


def unfinished(s: Any, i_b: Any, i_h: Any, i_q: Any, i_k: Any) -> Any:
    raise KeyError("weight")


def of_the_head(s: Any, i_b: Any, i_h: Any, i_q: Any, i_k: Any, slopes: Any) -> Any:
    return s * slopes[i_h]


@pytest.fixture
def registered(monkeypatch: pytest.MonkeyPatch) -> Callable[..., score_mods.ScoreMod]:
    """Register a mod for the length of a test."""
    monkeypatch.setattr(score_mods, "_MODS", dict(score_mods._MODS))
    return lambda *given: fusemesh.register_score_mod(fusemesh.ScoreMod("tried", *given))


@pytest.mark.interpreter
def test_right_mods_pass(registered: Callable[..., score_mods.ScoreMod]) -> None:
    fusemesh.check_score_mod(registered(square, square_backward, square_in_torch))
    table = TABLE_MOD(torch.randn(97, generator=torch.Generator().manual_seed(0)), weight=0.5)
    fusemesh.check_score_mod(table, shape=(1, 2, 5, 33), origin=fusemesh.Origin(q=50, k=3, head=2, batch=1))
    fusemesh.check_score_mod(score_mods.softcap(2.0), scores=torch.linspace(-20, 20, 64).reshape(1, 1, 8, 8))
    fusemesh.check_score_mod(score_mods.alibi(torch.tensor([0.5, 0.25]), torch.empty(2, 2, 1, 1)))


@pytest.mark.interpreter
def test_scores_that_a_mod_hides(registered: Callable[..., score_mods.ScoreMod]) -> None:
    fusemesh.check_score_mod(registered(hidden, hidden_backward, hidden_in_torch))


@pytest.mark.interpreter
def test_a_right_mod_may_leave_the_range_of_fp32(registered: Callable[..., score_mods.ScoreMod]) -> None:
    """exp(4 * 32) does not fit, and fp32 rounds the angle at distant positions."""
    fusemesh.check_score_mod(registered(steep, steep_backward, steep_in_torch))


def test_what_the_twin_raises_is_named(registered: Callable[..., score_mods.ScoreMod]) -> None:
    mod = registered(None, None, unfinished)
    with pytest.raises(ValueError, match="'tried': torch_forward raised KeyError") as raised:
        fusemesh.check_score_mod(mod)
    assert isinstance(raised.value.__cause__, KeyError)


@pytest.mark.interpreter
@pytest.mark.parametrize(
    ("given", "wrong", "right"),
    [
        ((square, off_by_one_position, square_in_torch), "backward: expected", ["forward:", "torch_forward"]),
        ((hidden, square_backward, square_in_torch), "forward: expected", ["backward:", "gradient by autograd"]),
        ((square, square_backward, detached), "torch_forward's gradient by autograd: expected", ["forward:"]),
        ((square, square_backward, without_positions), "so torch_forward may be the wrong one", ["autograd"]),
        ((of_a_transposed_tile, None, square_in_torch), "forward, tiles of keys by queries: expected", ["backward"]),
        ((None, None, mixed), "torch_forward's gradient by autograd: expected", ["forward:", "backward"]),
        ((kept, doubled_in_late_rows, as_it_is), "backward, at origin=Origin(q=5000, ", ["forward:", "torch_forward"]),
        ((kept, doubled_in_late_keys, as_it_is), "backward, at origin=Origin(q=130, ", ["forward:", "torch_forward"]),
        ((kept, doubled_in_other_heads, as_it_is), "backward, at origin=", ["forward:", "torch_forward"]),
        ((kept, doubled_in_other_samples, as_it_is), "backward, at origin=", ["forward:", "torch_forward"]),
        (
            (clamped, kept_gradient, clamped_in_torch),
            "backward, of scores up to 32: expected 0",
            ["forward:", "torch_forward"],
        ),
    ],
    ids=["backward", "forward", "autograd", "twin", "transposed", "mixed", "rows", "keys", "heads", "samples", "clamp"],
)
def test_what_is_wrong_is_named(
    given: tuple[Any, ...], wrong: str, right: list[str], registered: Callable[..., score_mods.ScoreMod]
) -> None:
    with pytest.raises(ValueError, match="score_mod 'tried'") as raised:
        fusemesh.check_score_mod(registered(*given))
    message = str(raised.value)
    assert wrong in message
    for part in right:
        assert f" {part}" not in message.replace("torch_forward may", ""), message


@pytest.mark.interpreter
def test_the_place_and_the_size_of_a_fault(registered: Callable[..., score_mods.ScoreMod]) -> None:
    """At the score 2 of query 1 and key 1 the derivative is 4; this backward has 8."""
    scores = torch.zeros(1, 1, 2, 3)
    scores[0, 0, 1, 1] = 2
    mod = registered(square, off_by_one_position, square_in_torch)
    with pytest.raises(ValueError, match="h 0, query 1, key 1") as raised:
        fusemesh.check_score_mod(mod, scores=scores)
    found = re.search(r"expected (\S+) at .*received (\S+), off by (\S+),", str(raised.value))
    assert found is not None
    expected, received, error = (float(x) for x in found.groups())
    assert received == pytest.approx(2 * expected, rel=1e-4)
    assert error == pytest.approx(abs(expected), rel=1e-2)
    assert "as the worst of 1 wrong ones of 6" in str(raised.value)


def test_arguments(registered: Callable[..., score_mods.ScoreMod]) -> None:
    mod = registered(None, None, of_the_head, 1)
    slopes = torch.ones(2, dtype=torch.float64)
    fusemesh.check_score_mod(mod(slopes))
    for call, text in (
        (lambda: fusemesh.check_score_mod("mod"), "mod: expected a registered mod"),
        (lambda: fusemesh.check_score_mod(mod), "expected 1 tensors"),
        (lambda: fusemesh.check_score_mod(mod(slopes), shape=(1, 3, 2, 2)), "pass the shape and origin for which"),
        (lambda: fusemesh.check_score_mod(mod(slopes), shape=(1, 3, 2)), r"shape: expected \(B, H, Sq, Sk\)"),
        (lambda: fusemesh.check_score_mod(mod(slopes), shape=None), r"shape: expected \(B, H, Sq, Sk\)"),
        (lambda: fusemesh.check_score_mod(mod(slopes), origin=3), "origin: expected an Origin of ints"),
        (lambda: fusemesh.check_score_mod(mod(slopes), scores=torch.ones(3)), "scores: expected a floating tensor"),
        (lambda: fusemesh.check_score_mod(mod(slopes), scores=torch.full((1, 1, 1, 1), math.inf)), "finite numbers"),
        *(
            (lambda x=x: fusemesh.check_score_mod(mod(slopes), tolerance=x), "tolerance: expected a finite number")
            for x in (math.nan, "x", None, -1)
        ),
    ):
        with pytest.raises(ValueError, match=text):
            call()


def test_without_interpreter_or_gpu_the_pair_is_not_passed_over() -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU, on which the pair runs")
    with pytest.raises(ValueError, match="set TRITON_INTERPRET=1 before Python starts"):
        fusemesh.check_score_mod(score_mods.softcap(2.0))


@pytest.mark.interpreter
def test_an_error_ends_with_the_kernels_own_line(registered: Callable[..., score_mods.ScoreMod]) -> None:
    mod = registered(broken, square_backward, square_in_torch)
    q = torch.randn(1, 1, 4, 16)
    with pytest.raises(Exception, match="IndexError: tuple index out of range") as raised:
        fusemesh.flash_attention(q, q, q, score_mod=mod(), backend="triton")
    number = inspect.getsourcelines(inspect.getmodule(test_arguments))[0].index("    return numbers[3]\n") + 1
    assert str(raised.value).endswith(f'{__file__}", line {number}, in part_of_a_number\n    return numbers[3]')
