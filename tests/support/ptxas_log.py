"""What ptxas says beside its result, for tests of compiled kernels; the ptxas and the options are those of Triton."""

from __future__ import annotations

import contextlib
import io

from triton import knobs

from fusemesh.kernels import aot, compat
from fusemesh.kernels.runtime.launch import Target


def ptxas_log(item: aot.Launch, target: Target) -> str:
    """Compile a launch anew, whatever caches hold, and return what ptxas wrote."""
    item.kernel.device_caches.clear()
    written = io.StringIO()
    with (
        compat.driver(aot.NamedTarget(target)),
        knobs.compilation.scope(),
        knobs.nvidia.scope(),
        contextlib.redirect_stdout(written),
    ):
        knobs.compilation.always_compile = True
        knobs.nvidia.dump_ptxas_log = True
        item.kernel.warmup(*item.args, grid=item.grid, **item.kwargs)
    assert "info    : Used" in written.getvalue(), "ptxas has said nothing"
    return written.getvalue()
