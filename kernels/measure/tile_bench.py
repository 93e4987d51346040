"""One kernel with any tile, launched alone, checked against fp64 and timed: the core of tune.py.

The kernel's launcher runs with launches recorded; then the one in question is started again and again.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from ..runtime import launch
from . import timing
from .cases import AttentionCase, DecodeCase, LinearCase
from .cases.common import Tensors

# What each kernel computes, by the names that a case's check knows.
_RESULTS = {
    "dkdv": ("dk", "dv"),
    "dq": ("dq",),
    "dbias": ("dbias",),
    "split": ("out",),
    "dgrad": ("dx",),
    "wgrad": ("dw", "dbias", "dw_up"),
}

SKINNY_ROWS = 16  # of a linear layer in generation

Launch = tuple[Any, tuple[int, ...], tuple[Any, ...], dict[str, Any]]


@dataclass(frozen=True)
class TuneJob:
    """One kernel on one case: an entry of a table of tiles."""

    kernel: str
    case: AttentionCase | DecodeCase | LinearCase

    @property
    def op(self) -> str:
        """``attention``, ``decode`` or ``linear``."""
        return self.case.op

    @property
    def entry(self) -> str:
        """The entry of the kernel's table of tiles: the class of head dimension, or the linear layer's form."""
        if isinstance(self.case, LinearCase):
            return self.form + (" skinny" if self.case.rows <= SKINNY_ROWS else "")
        tiles = isinstance(self.case, AttentionCase) and self.case.bias
        return f"D{self.case.D}" + (" bias" if tiles else "")

    @property
    def form(self) -> str:
        """``plain``, ``sloped`` (with an activation) or ``gated``, of a linear layer."""
        assert isinstance(self.case, LinearCase)
        return "gated" if self.case.gated else "plain" if self.case.activation is None else "sloped"

    @property
    def is_forward(self) -> bool:
        """Return whether the kernel is part of a forward."""
        return self.kernel in ("forward", "split")

    @property
    def name(self) -> str:
        """For messages and tables."""
        return f"{self.op} {self.kernel} {self.entry}"


class TileBench:
    """The tensors of a job, its right answer, and the launch of its kernel with any tile."""

    def __init__(self, job: TuneJob, device: torch.device) -> None:
        self.job = job
        self.inputs = job.case.inputs(device)
        self.want = job.case.expected_at_ends(self.inputs, "forward" if job.is_forward else "backward")
        self.after: list[Launch] = []  # what must run before the results can be read
        self._saved: Any = None
        if not job.is_forward:
            self._saved, launches = self._record(lambda: self._forward(None))
            start(launches)

    def record(self, tile: Any) -> tuple[Tensors, list[Launch], Launch]:
        """Return (results, launches that must come before, the kernel's launch) with ``tile``; nothing has run yet.

        Raises:
            AssertionError: the launcher did not launch the kernel once.
        """
        call = self._forward if self.job.is_forward else self._backward
        results, launches = self._record(lambda: call(tile))
        wanted = f"{self.job.op}_{self.job.kernel}_kernel"
        names = [kernel.__name__ for kernel, *_ in launches]
        if names.count(wanted) != 1:
            raise AssertionError(f"expected one launch of {wanted}, recorded {names}")
        before = [each for each in launches if each[0].__name__ == "attention_delta_kernel"]
        self.after = [each for each in launches if each[0].__name__ == "decode_combine_kernel"]
        if self.job.is_forward:
            results = results[:1]
            names = ["y" if self.job.op == "linear" else "out"]
        else:
            names = ["dq", "dk", "dv", "dbias"] if self.job.op == "attention" else ["dx", "dw", "dbias", "dw_up"]
        kept = _RESULTS.get(self.job.kernel, tuple(names))
        named = {n: x for n, x in zip(names, results, strict=False) if n in kept and x is not None and x.numel()}
        return named, before, next(each for each in launches if each[0].__name__ == wanted)

    @staticmethod
    def _record(call: Callable[[], Any]) -> tuple[Any, list[Launch]]:
        launches: list[Launch] = []
        with launch.intercept(lambda *each: launches.append(each)), torch.no_grad():
            return call(), launches

    def _forward(self, tile: Any) -> Any:
        x, case = self.inputs, self.job.case
        if isinstance(case, AttentionCase):
            from ..attention.gpu import forward as triton_forward
            from ..attention.gpu import tiles

            with contextlib.nullcontext() if tile is None else tiles.force(tile):
                return triton_forward.forward(x["q"], x["k"], x["v"], case.call(x))
        if isinstance(case, DecodeCase):
            from ..attention.gpu import decode_tiles

            with decode_tiles.force(tile):
                return (case.run(x, "triton"),)
        from ..matmul import ops
        from ..matmul.gpu import linear as triton_matmul

        return triton_matmul.forward(
            x["x"],
            x["w"],
            x.get("bias"),
            x.get("w_up"),
            activation=case.activation,
            save_slope=case.activation is not None,
            save_slope_up=case.gated,
            slope_dtype=ops.slope_dtype(case.torch_dtype, case.activation, case.gated),
            tile=tile,
        )

    def _backward(self, tile: Any) -> Any:
        x, case = self.inputs, self.job.case
        if isinstance(case, AttentionCase):
            from ..attention.gpu import backward as triton_backward
            from ..attention.gpu import tiles

            out, lse = self._saved
            with tiles.force(tile):
                return triton_backward.backward(
                    x["do"],
                    x["q"],
                    x["k"],
                    x["v"],
                    out,
                    lse,
                    None,
                    case.call(x),
                    bias_grad=self.job.kernel == "dbias",
                )
        from ..matmul.gpu import linear as triton_matmul

        assert isinstance(case, LinearCase)
        _, slope, slope_up = self._saved
        wgrad = self.job.kernel == "wgrad"
        return triton_matmul.backward(
            x["dy"],
            x["x"],
            x["w"],
            x.get("w_up"),
            slope if slope.numel() else None,
            slope_up if slope_up.numel() else None,
            x_grad=not wgrad,
            w_grad=wgrad,
            bias_grad=wgrad,
            w_up_grad=wgrad and case.gated,
            dgrad_tile=None if wgrad else tile,
            wgrad_tile=tile if wgrad else None,
        )


def start(launches: list[Launch]) -> None:
    """Run recorded launches."""
    for kernel, grid, args, kwargs in launches:
        launch.launch(kernel, grid, *args, **kwargs)


def measure_tile(bench: TileBench, tile: Any, device: torch.device, times: dict[str, Any]) -> dict[str, Any]:
    """Return one candidate's row: its tile, ``check`` ("ok", or the fault), and its time where it is right."""
    row: dict[str, Any] = {"tile": dataclasses.asdict(tile), "check": "ok"}
    try:
        results, before, own = bench.record(tile)
        start([*before, own, *bench.after])
        bench.job.case.check(results, bench.want)
        row["seconds"] = timing.time_call(lambda: start([own]), device, **times).median
    except AssertionError as error:
        row["check"] = f"WRONG: {error}"
    except Exception as error:
        row["check"] = f"did not run: {type(error).__name__}: {error}"
    return row
