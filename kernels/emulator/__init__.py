"""Compiled Triton kernels on a CPU: their PTX, instruction by instruction, with what a GPU may do wrong as errors."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Literal

from .. import compat, env
from ..runtime.launch import TARGETS, Target, execute_on
from .hazard import Hazard as Hazard
from .launch.launching import Emulator as Emulator

Copies = Literal["late", "early", "random"]
COPIES: tuple[Copies, ...] = ("late", "early", "random")


@contextlib.contextmanager
def emulate(
    target: Target | str = "sm_90",
    *,
    seed: int | None = None,
    copies: Copies = "late",
    check: bool = True,
    counts: bool = False,
    ctas: int | None = None,
    keep: bool = False,
    prove: bool = False,
    resident: int = 2,
) -> Iterator[Emulator]:
    """Within the block, ``backend="triton"`` runs on CPU tensors, by the code that Triton compiles for a GPU.

        with fusemesh.emulate("sm_90") as run:
            out = fusemesh.flash_attention(q, k, v, causal=True, backend="triton")

    Every instruction of the PTX is executed by NumPy, all threads of a block at once; no GPU is needed, and none is
    used. What a GPU would do wrong without a word is an error that names the instruction, the kernel's line, the block
    and the warp: a missing barrier, wait or fence, an access outside a tensor, a register never written, a deadlock.

    Kernels of your own run, too, launched as ``kernel[grid](...)`` or by ``fusemesh.kernels.runtime.launch.launch``;
    not those of ``triton.autotune``, which are launched by their ``.fn``. It is slow, some 0.05 s for each block of a
    grid: use small shapes. See docs/interpreter.md.

    Args:
        target: the GPU, a name of ``fusemesh.kernels.runtime.launch.TARGETS`` from NVIDIA: ``"sm_80"``, ``"sm_90"``.
        seed: of the order in which warps and blocks run. None runs warps in step, and blocks in ascending order.
        copies: when what a kernel copies asynchronously is seen to land: as late as its waits allow, as early as they
            do, or at random by ``seed``. A kernel is right only if all give the same.
        check: look for hazards. Without, it takes a tenth less time.
        counts: count sectors of global memory and passes over the banks of shared memory, too (a third slower).
        ctas: run only so many blocks of each grid.
        keep: keep every launch in ``run.bound``, to be run again.
        prove: compare each kernel with the reference at its first use, as on a GPU (FUSEMESH_PROOF).
        resident: so many blocks run side by side where a kernel synchronises blocks. That all of them wait for one
            that has no place yet is a deadlock; a GPU has places for more, but promises no order.

    Yields:
        What runs the launches: ``run.counts`` says what each did, ``print(run.table())`` shows it.

    Raises:
        ValueError: the target is unknown or not NVIDIA's, triton is missing, or this process has Triton's interpreter
            switched on.

    Holds in this thread and in tasks started from it. Blocks may be nested; the innermost one runs what is launched.
    """
    chosen = _target(target)
    if copies not in COPIES:
        raise ValueError(f"copies: expected one of {COPIES}, received {copies!r}")
    emulator = Emulator(
        chosen,
        ctas=ctas,
        keep=keep,
        proves=prove,
        asynchrony=copies,
        seed=seed,
        check=check,
        stats=counts,
        resident=resident,
    )

    with execute_on(emulator), compat.driver(emulator.device, assembles=False):
        yield emulator


def _target(target: Target | str) -> Target:
    """Return the target; refuse what cannot be emulated, and processes that cannot compile."""
    names = tuple(name for name, known in TARGETS.items() if known.vendor == "cuda")
    chosen = TARGETS.get(target) if isinstance(target, str) else target
    if chosen is None or chosen.vendor != "cuda":
        raise ValueError(
            f"target: expected one of {names} or a Target of NVIDIA's, whose PTX is executed, received {target!r}"
        )
    if env.INTERPRET:
        raise ValueError(
            "TRITON_INTERPRET: expected it unset to emulate compiled kernels, received 1 (kernels are then Python "
            "functions, which nothing compiles); unset it before Python starts"
        )
    try:
        import triton  # noqa: F401
    except ImportError as error:
        raise ValueError(
            "triton: expected it installed to compile the kernels, it is missing; pip install triton (Linux only)"
        ) from error
    return chosen
