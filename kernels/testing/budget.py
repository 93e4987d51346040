"""The error budget: how far a result may be from the truth, measured on the same inputs and never a fixed tolerance.

For the largest and for the mean absolute error against an fp64 reference

    error  <=  ratio * (error of eager PyTorch in the tested dtype)  +  floor

- ratio: bf16 and fp16 2 for the largest error and 1 for the mean; fp32 3 and 2 (an honest flash backward measures 1.1
  to 1.6 of eager's error).
- floor: 2 * max|(r + 0.3 - 0.3) - r|, with r the reference rounded to, and the sum done in, the tested dtype: about the
  rounding of numbers of r's size (the idea is FlashAttention-3's test suite); in fp32 at least eps * max|r|.
- for gradients the floor grows by 8 * eps(fp32) times the largest element of the same gradient computed with the
  absolute values of all factors: some gradients are zero by cancellation (one key), and there eager errs 0.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

# dtype -> (ratio of the largest error, ratio of the mean error)
RATIOS: dict[torch.dtype, tuple[float, float]] = {
    torch.float16: (2.0, 1.0),
    torch.bfloat16: (2.0, 1.0),
    torch.float32: (3.0, 2.0),
}
CANCELLATION = 8 * torch.finfo(torch.float32).eps


@dataclass(frozen=True)
class Budget:
    """The measured error of one tensor, and the allowed one. ``passed`` says whether it is within."""

    name: str
    dtype: torch.dtype
    actual_max: float
    actual_mean: float
    eager_max: float
    eager_mean: float
    ratio_max: float
    ratio_mean: float
    floor: float
    worst: tuple[int, ...]  # index of the largest error
    worst_actual: float
    worst_exact: float

    @property
    def allowed_max(self) -> float:
        return self.ratio_max * self.eager_max + self.floor

    @property
    def allowed_mean(self) -> float:
        return self.ratio_mean * self.eager_mean + self.floor

    @property
    def passed(self) -> bool:
        return self.actual_max <= self.allowed_max and self.actual_mean <= self.allowed_mean

    @property
    def share(self) -> float:
        """The error as a share of the allowed one, the larger of both; above 1 outside the budget."""
        pairs = ((self.actual_max, self.allowed_max), (self.actual_mean, self.allowed_mean))
        return max(actual / allowed if allowed else math.inf if actual else 0.0 for actual, allowed in pairs)

    def __str__(self) -> str:
        return (
            f"{self.name} ({str(self.dtype).removeprefix('torch.')}): "
            f"max error {self.actual_max:.3e}, allowed {self.allowed_max:.3e} = {self.ratio_max:g} * eager's "
            f"{self.eager_max:.3e} + floor {self.floor:.3e}; "
            f"mean error {self.actual_mean:.3e}, allowed {self.allowed_mean:.3e} = {self.ratio_mean:g} * eager's "
            f"{self.eager_mean:.3e} + floor; "
            f"worst at {self.worst}: {self.worst_actual:.9g}, exact {self.worst_exact:.9g}"
        )


def floor(exact: torch.Tensor, dtype: torch.dtype, absolute: torch.Tensor | None = None) -> float:
    """The part of the budget that does not depend on eager's error.

    Args:
        exact: the fp64 reference; entries that are not finite are left out.
        dtype: the tested dtype.
        absolute: for a gradient, the same gradient computed with the absolute values of all factors.
    """
    rounded = exact[exact.isfinite()].to(dtype)
    value = 0.0
    if rounded.numel():
        value = 2 * ((rounded + 0.3 - 0.3) - rounded).double().abs().max().item()
        if dtype == torch.float32:
            # That is 0 where r and r + 0.3 lie between the same powers of two, and eager is right to the last bit by
            # luck where a tensor has few elements. Two roundings of the largest one:
            value = max(value, torch.finfo(dtype).eps * rounded.abs().max().item())
    if absolute is not None and absolute.numel():
        value += CANCELLATION * absolute.double().abs().max().item()
    return value


def measure(
    name: str,
    actual: torch.Tensor,
    exact: torch.Tensor,
    eager: torch.Tensor,
    *,
    dtype: torch.dtype | None = None,
    absolute: torch.Tensor | None = None,
    ratio: tuple[float, float] | None = None,
) -> Budget:
    """Measure ``actual`` against its budget; see :func:`check` for the arguments.

    Raises:
        AssertionError: shapes or dtype differ, ``actual`` is NaN somewhere, or infinite where ``exact`` is not (or the
            other way round). None of these has a size that a budget could allow.
        ValueError: the comparison itself means nothing: ``exact`` is not fp64 or holds NaN, ``eager`` is not finite
            where ``exact`` is (its error would allow everything), or the dtype has no ratios.
    """
    dtype = actual.dtype if dtype is None else dtype
    if dtype not in RATIOS:
        raise ValueError(f"dtype: expected one of {tuple(RATIOS)}, received {dtype}; compare fp64 by its own tolerance")
    if exact.dtype != torch.float64:
        raise ValueError(f"exact: expected torch.float64, received {exact.dtype}; compute the reference in fp64")
    for label, other in (("actual", actual), ("eager", eager)):
        if other.shape != exact.shape:
            raise AssertionError(f"{name}: {label} has shape {tuple(other.shape)}, exact has {tuple(exact.shape)}")
    if actual.dtype != dtype:
        raise AssertionError(f"{name}: actual is {actual.dtype}, the tested dtype is {dtype}")
    actual64, eager64 = actual.detach().double(), eager.detach().double()
    exact = exact.detach()
    finite = exact.isfinite()
    if exact.isnan().any():
        raise ValueError(f"exact: expected no NaN, received {int(exact.isnan().sum())} in {name}")
    if not eager64[finite].isfinite().all():
        raise ValueError(f"eager: expected finite values where exact is finite, received others in {name}")
    # An infinite reference value (the LSE of a row without keys) is met exactly or not at all.
    wrong = torch.where(finite, ~actual64.isfinite(), actual64 != exact)
    if wrong.any():
        index = tuple(int(i) for i in wrong.nonzero()[0])
        raise AssertionError(
            f"{name}: {int(wrong.sum())} of {wrong.numel()} entries are NaN or infinite where exact is not, or the "
            f"other way round; the first at {index}: {actual64[index].item()}, exact {exact[index].item()}"
        )
    error = torch.where(finite, (actual64 - exact).abs(), 0.0)
    eager_error = torch.where(finite, (eager64 - exact).abs(), 0.0)
    ratio_max, ratio_mean = RATIOS[dtype] if ratio is None else ratio
    count = max(int(finite.sum()), 1)
    worst: tuple[int, ...] = ()
    worst_actual = worst_exact = math.nan
    if error.numel():
        flat = int(error.argmax())
        worst = tuple(int(i) for i in torch.unravel_index(torch.tensor(flat), error.shape))
        worst_actual, worst_exact = actual64[worst].item(), exact[worst].item()
    return Budget(
        name=name,
        dtype=dtype,
        actual_max=error.max().item() if error.numel() else 0.0,
        actual_mean=error.sum().item() / count,
        eager_max=eager_error.max().item() if error.numel() else 0.0,
        eager_mean=eager_error.sum().item() / count,
        ratio_max=ratio_max,
        ratio_mean=ratio_mean,
        floor=floor(exact, dtype, absolute),
        worst=worst,
        worst_actual=worst_actual,
        worst_exact=worst_exact,
    )


def check(
    name: str,
    actual: torch.Tensor,
    exact: torch.Tensor,
    eager: torch.Tensor,
    *,
    dtype: torch.dtype | None = None,
    absolute: torch.Tensor | None = None,
    ratio: tuple[float, float] | None = None,
) -> Budget:
    """Assert that ``actual`` is within the budget; return what was measured.

    Args:
        name: what is compared, for the message.
        actual: the tested result, in the tested dtype.
        exact: the fp64 reference of the same inputs, same shape.
        eager: the plain PyTorch formula of the same inputs in the tested dtype (autograd for gradients), same shape.
        dtype: the tested dtype; by default that of ``actual``, and ``actual`` must have it.
        absolute: for a gradient, the same gradient computed with the absolute values of all factors.
        ratio: (largest, mean) in place of :data:`RATIOS`, where a reason is written beside the call.

    Raises:
        AssertionError: outside the budget; the message holds the numbers and the worst index.
        ValueError: see :func:`measure`.
    """
    budget = measure(name, actual, exact, eager, dtype=dtype, absolute=absolute, ratio=ratio)
    if not budget.passed:
        raise AssertionError(f"outside the error budget: {budget}")
    return budget
