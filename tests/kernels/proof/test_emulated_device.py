"""Proof at first use of compiled kernels, on an emulated GPU. Layer: kernels; compiled code, executed by NumPy.

Every row of the support matrix that backend triton's record allows: ``auto`` proves its kernels and takes them.
"""

from __future__ import annotations

import warnings
from typing import Any

import pytest

import fusemesh
from fusemesh.kernels import backends
from fusemesh.kernels.measure.cases import AttentionCase, Case, DecodeCase, LinearCase, PackedCase, VocabLossCase
from fusemesh.kernels.proof import store
from fusemesh.kernels.runtime import launch
from tests.support.interpreted_device import Spoil
from tests.support.planted_kernels import FAULTS

pytestmark = pytest.mark.usefixtures("nothing_is_known")

SMALL: dict[str, Any] = {"B": 1, "H": 2, "Hkv": 1, "Sq": 20, "Sk": 20, "D": 64, "Dv": 64}


def attention(dtype: str = "bf16", **features: Any) -> AttentionCase:
    """Return a small call."""
    return AttentionCase(dtype, **{**SMALL, **features})


STEP: dict[str, Any] = {"H": 4, "Hkv": 2, "D": 64, "Dv": 64, "capacity": 48, "lens": (40, 3)}
ROWS: dict[str, Case] = {
    "linear": LinearCase("bf16", 20, 32, 32, "gelu"),
    "causal": attention(causal=True),
    "fp16": attention("fp16"),
    "fp32": attention("fp32", causal=True),
    "grouped": attention(H=4, Hkv=2),
    "window": attention(window=(9, 3)),
    "mask": attention(mask="mn"),
    "bias": attention(bias="hmn"),
    "softcap": attention(softcap=5.0),
    "alibi": attention(alibi="h"),
    "score mod": attention(mod=True),
    "sinks, lse": attention(sinks=True, dlse=True),
    "dropout": attention(dropout=0.2),
    "origin": attention(origin=(40, 11, 3, 5), causal=True),
    "device origin": attention(device_origin=(40, 11, 3, 5), causal=True),
    "head dims": attention(D=40, Dv=72),
    "head dim 128": attention(D=128, Dv=128),
    "fp8": attention("fp8", descale="head"),
    "packed": PackedCase("bf16", lens_q=(20, 0, 9), lens_k=(20, 4, 9), D=64, Dv=64, causal=True, align="top_left"),
    "cache": DecodeCase("bf16", **STEP),
    "pages": DecodeCase("bf16", **STEP, page=16, added=1, causal=True),
    "latent": DecodeCase("bf16", **{**STEP, "Hkv": 1, "D": 96}, latent=True),
    "loss": VocabLossCase("bf16", 20, 32, 70, has_bias=True),
    "loss with a softcap": VocabLossCase("fp32", 20, 33, 70, softcap=3.0, scale=0.5),
    "gated": LinearCase("fp32", 20, 32, 32, "silu", gated=True),
}
QUICK = ("linear", "cache", "loss")


@pytest.mark.parametrize("row", [x if x in QUICK else pytest.param(x, marks=pytest.mark.slow) for x in ROWS])
def test_auto_takes_triton(row: str) -> None:
    case = ROWS[row]
    with fusemesh.emulate("sm_90", prove=True), warnings.catch_warnings():
        warnings.simplefilter("error")
        x = case.inputs("cpu")
        outputs = case.compute(x, "auto")
    case.check(outputs, case.expected(x))
    assert {name for _, name in backends.call_counts()} == {"triton"}
    verdicts = store.default().all()
    assert verdicts and all(verdict.passed for verdict in verdicts.values())
    assert all(verdict.details["device"] == "emulated sm_90" for verdict in verdicts.values())


class Spoiled:
    """An emulated GPU on which a kernel writes something wrong."""

    proves = True

    def __init__(self, emulator: Any, kernel: str, spoil: Spoil) -> None:
        self.emulator, self.kernel, self.spoil, self.target = emulator, kernel, spoil, emulator.target
        self.name = f"{emulator.name}, spoiled"

    def prepare(self, kernel: Any, grid: Any, args: Any, kwargs: Any) -> str:
        return str(self.emulator.prepare(kernel, grid, args, kwargs))

    def run(self, kernel: Any, grid: Any, args: Any, kwargs: Any) -> str:
        found = str(self.emulator.run(kernel, grid, args, kwargs))
        if kernel.__name__ == self.kernel:
            self.spoil(dict(zip(kernel.arg_names, args, strict=False)))
        return found


@pytest.mark.slow
@pytest.mark.parametrize("name", FAULTS)
def test_a_wrong_kernel_is_survived(name: str) -> None:
    kernel, case, spoil = FAULTS[name]
    x = case.inputs("cpu")
    with (
        fusemesh.emulate("sm_90", prove=True) as emulator,
        launch.execute_on(Spoiled(emulator, kernel, spoil)),
        pytest.warns(UserWarning, match="wrong results on emulated sm_90, spoiled") as told,
    ):
        outputs = case.compute(x, "auto")
    case.check(outputs, case.expected(x))
    assert any(kernel in str(warning.message) for warning in told)
    assert {backend for _, backend in backends.call_counts()} - {"triton"}
