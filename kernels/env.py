"""Every environment variable that FuseMesh reads, each read once, here.

=====================  ==========================================================================================
FUSEMESH_BACKEND       backend for calls that leave ``backend="auto"``: reference, torch, cpu, triton. Inherited by
                       spawned ranks. Unset: each call chooses.
FUSEMESH_CPU_ISA       instruction set that the CPU engine uses: avx512-bf16, avx512, avx2, neon, scalar. Unset: the
                       best that the processor has.
FUSEMESH_PROOF         off: compiled kernels are trusted; on (unset): each is compared with the reference before its
                       first result is used, and verdicts are kept; always: kept verdicts are not read.
FUSEMESH_CHECK         1: also check the contents of device tensors (costs a synchronisation).
FUSEMESH_CACHE         folder for what is kept between processes: verdicts on compiled kernels, measured preferences.
                       Unset: XDG_CACHE_HOME/fusemesh, else ~/.cache/fusemesh.
FUSEMESH_LOG           log level of the ``fusemesh`` logger: debug, info, warning, error. Default warning.
=====================  ==========================================================================================

``TRITON_INTERPRET`` is Triton's own: set to 1 before Triton is imported, kernels run in its interpreter on CPU.
"""

from __future__ import annotations

import logging
import os

BACKEND: str = os.environ.get("FUSEMESH_BACKEND", "auto")
CPU_ISA: str = os.environ.get("FUSEMESH_CPU_ISA", "")
CHECK: bool = os.environ.get("FUSEMESH_CHECK", "0") == "1"
PROOF: str = os.environ.get("FUSEMESH_PROOF", "on")
CACHE: str = os.environ.get("FUSEMESH_CACHE", "")
LOG: str = os.environ.get("FUSEMESH_LOG", "warning")
INTERPRET: bool = os.environ.get("TRITON_INTERPRET", "0") == "1"

logger = logging.getLogger("fusemesh")
if "FUSEMESH_LOG" in os.environ:
    logging.basicConfig(format="[%(name)s] %(message)s")
    logger.setLevel(LOG.upper())
