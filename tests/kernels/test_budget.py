"""Layer: one process, CPU, no Triton. The error budget and the poison: they pass what is right and fail what is not."""

from __future__ import annotations

import re

import pytest
import torch

from fusemesh.kernels.attention.call.options import Call
from fusemesh.kernels.attention.call.spec import AttentionSpec
from fusemesh.kernels.attention.reference import dense as reference
from fusemesh.kernels.testing import attention as attention_budget
from fusemesh.kernels.testing import budget, poison

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
KEYS = ("out", "lse", "dq", "dk", "dv", "dbias", "dsinks")


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def matmul_case(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Exact and eager values of a matmul in ``dtype``, and the unit in the last place of its largest element."""
    generator = torch.Generator().manual_seed(1)
    a, b = (torch.randn(33, 65, generator=generator).to(dtype) for _ in range(2))
    exact = a.double() @ b.double().T
    return exact, a @ b.T, exact.abs().max() * torch.finfo(dtype).eps


def test_the_share_is_above_one_outside_the_budget_alone() -> None:
    exact, eager, ulp = matmul_case(torch.float32)
    for error in (0.0, 0.5, 1.0, 4.0):
        for where in (slice(None), slice(0, 1)):  # the mean, and the largest alone
            actual = exact.clone()
            actual[where] += error * ulp
            measured = budget.measure("y", actual.float(), exact, eager)
            assert (measured.share <= 1) == measured.passed, measured
    assert budget.measure("y", torch.zeros(3), torch.zeros(3).double(), torch.zeros(3)).share == 0


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_eager_and_the_rounded_truth_pass(dtype: torch.dtype) -> None:
    exact, eager, _ = matmul_case(dtype)
    assert budget.check("y", eager, exact, eager).passed
    assert budget.check("y", exact.to(dtype), exact, eager).passed


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_one_wrong_element_fails_by_the_largest_error(dtype: torch.dtype) -> None:
    exact, eager, ulp = matmul_case(dtype)
    planted = eager.clone()
    planted[7, 11] += (16 * ulp).to(dtype)
    with pytest.raises(AssertionError, match=r"outside the error budget: y .*worst at \(7, 11\)"):
        budget.check("y", planted, exact, eager)
    measured = budget.measure("y", planted, exact, eager)
    assert measured.actual_max > measured.allowed_max and measured.actual_mean <= measured.allowed_mean


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_bias_in_every_element_fails_by_the_mean(dtype: torch.dtype) -> None:
    """Errors that are small everywhere and always: the mean finds what the largest error would let through."""
    generator = torch.Generator().manual_seed(2)
    exact = 1 + torch.rand(64, 64, generator=generator, dtype=torch.float64)
    eager = exact.to(dtype).clone()
    eager[0, 0] += 64 * torch.finfo(dtype).eps
    planted = exact.to(dtype) + 16 * torch.finfo(dtype).eps
    measured = budget.measure("y", planted, exact, eager)
    assert measured.actual_max <= measured.allowed_max and measured.actual_mean > measured.allowed_mean
    with pytest.raises(AssertionError, match="outside the error budget"):
        budget.check("y", planted, exact, eager)


def test_the_numbers_are_those_of_the_definition() -> None:
    exact = torch.tensor([1.0, 2.0, -4.0], dtype=torch.float64)
    eager = torch.tensor([1.0, 2.5, -4.0])
    actual = torch.tensor([1.25, 2.0, -4.0])
    measured = budget.measure("y", actual, exact, eager)
    rounded = exact.float()
    floor = 2 * ((rounded + 0.3 - 0.3) - rounded).abs().max().item()
    assert floor > 0
    # In fp32 it is two roundings of the largest element if that is more.
    floor = max(floor, 4.0 * torch.finfo(torch.float32).eps)
    assert measured.floor == floor
    assert (measured.actual_max, measured.eager_max) == (0.25, 0.5)
    assert (measured.actual_mean, measured.eager_mean) == (0.25 / 3, 0.5 / 3)
    assert measured.allowed_max == 3 * 0.5 + floor and measured.allowed_mean == 2 * (0.5 / 3) + floor
    assert (measured.worst, measured.worst_actual, measured.worst_exact) == ((0,), 1.25, 1.0)
    absolute = torch.tensor([1.0, 10.0, 4.0], dtype=torch.float64)
    with_absolute = budget.measure("y", actual, exact, eager, absolute=absolute)
    assert with_absolute.floor == floor + 8 * torch.finfo(torch.float32).eps * 10.0
    for half in (torch.float16, torch.bfloat16):
        measured = budget.measure("y", actual.to(half), exact, eager.to(half))
        assert (measured.ratio_max, measured.ratio_mean) == (2.0, 1.0)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_never_passes(value: float) -> None:
    exact, eager, _ = matmul_case(torch.float32)
    planted = eager.clone()
    planted[3, 4] = value
    with pytest.raises(AssertionError, match=r"1 of 1089 entries.*first at \(3, 4\)"):
        budget.check("y", planted, exact, eager)


def test_infinities_are_met_exactly_or_not_at_all() -> None:
    exact = torch.tensor([1.0, -torch.inf], dtype=torch.float64)
    right = torch.tensor([1.0, -torch.inf])
    assert budget.check("lse", right, exact, right).passed
    for wrong in (-1e30, torch.inf):
        with pytest.raises(AssertionError, match=r"1 of 2 entries.*first at \(1,\)"):
            budget.check("lse", torch.tensor([1.0, wrong]), exact, right)


def test_comparisons_that_mean_nothing_are_refused() -> None:
    exact, eager, _ = matmul_case(torch.float32)
    with pytest.raises(AssertionError, match=r"actual has shape \(32, 33\), exact has \(33, 33\)"):
        budget.check("y", eager[1:], exact, eager)
    with pytest.raises(AssertionError, match=re.escape("actual is torch.float32, the tested dtype is torch.bfloat16")):
        budget.check("y", eager, exact, eager, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match=r"exact: expected torch\.float64"):
        budget.check("y", eager, exact.float(), eager)
    with pytest.raises(ValueError, match="dtype: expected one of"):
        budget.check("y", eager.double(), exact, eager)
    with pytest.raises(ValueError, match="eager: expected finite values"):
        budget.check("y", eager, exact, eager / 0)
    with pytest.raises(ValueError, match="exact: expected no NaN"):
        budget.check("y", eager, exact * float("nan"), eager)


def attention_case(dtype: torch.dtype) -> tuple[dict[str, torch.Tensor], attention_budget.Expected]:
    """What the reference computes in ``dtype`` with every feature on, and what is expected of it."""
    generator = torch.Generator().manual_seed(3)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    q, k, v = normal(2, 4, 17, 16).to(dtype), normal(2, 2, 23, 16).to(dtype), normal(2, 2, 23, 8).to(dtype)
    mask = torch.rand(2, 1, 17, 23, generator=generator) > 0.3
    mask[:, :, 5] = False
    bias = normal(1, 4, 17, 23).to(dtype)
    do, dlse = normal(2, 4, 17, 8).to(dtype), normal(2, 4, 17)
    options: dict = {"mask": mask, "bias": bias, "origin": None, "spec": AttentionSpec(0.25, 9, 0, 6, 0)}
    options["sinks"] = normal(4).to(dtype)
    out, lse = reference.forward(q, k, v, Call(**options))
    gradients = reference.backward(do, q, k, v, out, lse, dlse, Call(**options), bias_grad=True)
    want = attention_budget.expected(q, k, v, Call(**options), do=do, dlse=dlse)
    return dict(zip(KEYS, (out, lse, *gradients[:5]), strict=True)), want  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_attention_in_its_dtype_passes(dtype: torch.dtype) -> None:
    actual, want = attention_case(dtype)
    budgets = attention_budget.check(actual, want)
    assert [entry.name for entry in budgets] == list(KEYS)
    assert [entry.dtype for entry in budgets] == [dtype, torch.float32, *[dtype] * 5]
    # The measuring stick is not zero: eager errs in every tensor, the exact one in none.
    assert all(entry.eager_max > 0 for entry in budgets)
    # Eager is an independent formula that agrees with the exact one up to the dtype's rounding.
    for entry in budgets:
        assert (
            entry.eager_max < 64 * torch.finfo(entry.dtype).eps * want.exact[entry.name].nan_to_num(0, 0, 0).abs().max()
        )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", KEYS)
def test_attention_with_a_planted_error_fails(dtype: torch.dtype, name: str) -> None:
    """One percent too much in a single tensor: far below any tolerance of 1e-2 on numbers of size 1."""
    actual, want = attention_case(dtype)
    actual[name] = (actual[name] * (1.01 if dtype == torch.float32 or name == "lse" else 1.05)).to(actual[name].dtype)
    with pytest.raises(AssertionError) as caught:
        attention_budget.check(actual, want)
    assert [line.split()[4] for line in str(caught.value).splitlines()] == [name]


def test_absolute_gradients_are_sums_of_absolute_values() -> None:
    """Every factor of the gradients' formulas by its absolute value, in loops, with a gradient of the lse."""
    q, k, v, do = (torch.randn(1, 1, 3, 2, dtype=torch.float64) for _ in range(4))
    dlse = torch.randn(1, 1, 3, dtype=torch.float64)
    bias = torch.randn(1, 1, 1, 3, dtype=torch.float64)
    want = attention_budget.expected(q, k, v, Call(AttentionSpec(-0.5), bias=bias), do=do, dlse=dlse)
    p = torch.softmax(-0.5 * q[0, 0] @ k[0, 0].T + bias[0, 0], -1)
    dq, dk, dv, dbias = (torch.zeros(3, 2), torch.zeros(3, 2), torch.zeros(3, 2), torch.zeros(3))
    for i in range(3):
        rows = [(do[0, 0, i].abs() * v[0, 0, j].abs()).sum() for j in range(3)]
        delta = sum(p[i, j] * rows[j] for j in range(3)) + dlse[0, 0, i].abs()
        for j in range(3):
            ds = p[i, j] * (rows[j] + delta)
            dq[i] += 0.5 * ds * k[0, 0, j].abs()
            dk[j] += 0.5 * ds * q[0, 0, i].abs()
            dv[j] += p[i, j] * do[0, 0, i].abs()
            dbias[j] += ds
    for name, value in (("dq", dq), ("dk", dk), ("dv", dv), ("dbias", dbias[None])):
        torch.testing.assert_close(want.absolute[name][0, 0], value.double(), rtol=1e-6, atol=0)
        assert (want.absolute[name] >= want.exact[name].abs()).all()


def test_attention_without_a_gradient_that_was_expected_fails() -> None:
    actual, want = attention_case(torch.float32)
    with pytest.raises(AssertionError, match="dbias: expected a tensor, received None"):
        attention_budget.check({**actual, "dbias": None}, want)  # type: ignore[dict-item]
    with pytest.raises(ValueError, match="received 'dx'"):
        attention_budget.check({"dx": actual["dq"]}, want)


def test_gradients_that_vanish_by_cancellation_have_a_floor() -> None:
    """With one key the softmax is constant: dq = dk = 0, eager errs 0, and an honest kernel errs a little."""
    q, k, v, do = (torch.randn(1, 1, 1, 64) for _ in range(4))
    want = attention_budget.expected(q, k, v, Call(AttentionSpec(0.125)), do=do)
    assert want.exact["dq"].abs().max() < 1e-14 and (want.eager["dq"] == 0).all()
    assert want.absolute["dq"].max() > 1
    honest = torch.full_like(q, 4 * torch.finfo(torch.float32).eps * want.absolute["dq"].max().item())
    attention_budget.check({"dq": honest}, want)
    with pytest.raises(AssertionError, match="dq"):
        attention_budget.check({"dq": 3 * honest}, want)


@torch.library.custom_op("fusemesh_test::forgets_to_write", mutates_args=())
def forgets_to_write(x: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(x)


def test_poison_reaches_every_way_of_asking_for_memory() -> None:
    x = torch.ones(4, 5)
    before = torch.are_deterministic_algorithms_enabled()
    with poison.poisoned_empty():
        fresh = [torch.empty(7), torch.empty_like(x), x.new_empty(3), torch.empty_strided((2, 2), (5, 1))]
        fresh += [x.new_empty_strided((2, 2), (2, 1)), torch.empty(3, dtype=torch.bfloat16), forgets_to_write(x)]
        number, flag = torch.empty(3, dtype=torch.int64), torch.empty(3, dtype=torch.bool)
    assert all(tensor.isnan().all() for tensor in fresh)
    assert (number == torch.iinfo(torch.int64).max).all() and flag.all()
    assert torch.are_deterministic_algorithms_enabled() == before


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.bool], ids=str)
def test_surrounded_tensors_keep_their_values_and_notice_writes_outside(dtype: torch.dtype) -> None:
    x = (torch.arange(24).reshape(2, 3, 4) % 2).to(dtype)
    inside = poison.surround(x, margin=(0, 1, 2))
    assert torch.equal(inside.view, x) and inside.view.stride() == (5 * 8, 8, 1)
    inside.view.fill_(0)
    inside.assert_intact()
    inside.buffer[1, 4, 7] = 0
    with pytest.raises(AssertionError, match="x: 1 elements outside the view were written"):
        inside.assert_intact("x")
    with pytest.raises(ValueError, match="margin: expected one number or 3"):
        poison.surround(x, margin=(1, 2))
