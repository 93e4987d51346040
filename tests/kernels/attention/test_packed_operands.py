"""Layer: kernels, ahead of time. Operands of wgmma that LLVM packs behind wgmma.fence, as ptxas orders them.

PTX wants every write of such a register before the fence. Up to Triton 3.7 LLVM, which sees no connection, moves the
packing of two halves behind it in some kernels; the emulator lets that through (opcodes/wgmma.py), because ptxas lets
the warpgroup arrive after the packing. Here that is read in the machine code.
"""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest
import torch

from fusemesh.kernels import aot, compat
from fusemesh.kernels.runtime.fences import VERSION
from fusemesh.kernels.runtime.launch import TARGETS
from fusemesh.kernels.runtime.launches import attention_launches

pytestmark = pytest.mark.aot


def packed_behind_the_fence(ptx: str) -> int:
    """Return how many registers of first operands a mov packs between wgmma.fence and the product."""
    found, packed = 0, set[str]()
    for line in ptx.splitlines():
        statement = line.split("//")[0].strip()
        if statement.startswith("wgmma.fence"):
            packed.clear()
        packs = re.match(r"mov\.b32\s+(%r\d+), \{", statement)
        if packs:
            packed.add(packs[1])
        operand = re.search(r"\}, \{([^}]*)\}", statement) if statement.startswith("wgmma.mma_async") else None
        if operand:
            found += sum(name.strip() in packed for name in operand[1].split(","))
    return found


def late_writes(sass: str) -> tuple[int, list[str]]:
    """Return the number of products with a first operand in registers, and writes of it after the arrival."""
    products, wrong = 0, []
    since: list[str] | None = None  # instructions since the warpgroup arrived
    for line in sass.splitlines():
        text = re.sub(r"/\*.*?\*/", "", line).strip()
        if text.startswith("WARPGROUP.ARRIVE"):
            since = []
        product = re.match(r"HGMMA\.64x\d+x16\.\S+ R\d+, R(\d+), gdesc", text)
        if product:
            products += 1
            assert since is not None, text
            operand = {f"R{int(product[1]) + n}" for n in range(4)}
            # Within a chain a later product's operand may be made while the products before it run.
            wrong += [x for x in since if re.match(r"(?:@!?U?P\w+ )?\S+ (R\d+),", x) and _written(x) & operand]
        if since is not None:
            since.append(text)
            if text.startswith("HGMMA"):
                since = []
    return products, wrong


def _written(instruction: str) -> set[str]:
    first = re.search(r" (R\d+),", instruction)
    return {first[1]} if first and not instruction.startswith("ST") else set()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_the_warpgroup_arrives_after_the_packing(dtype: torch.dtype, tmp_path: Path) -> None:
    from triton import knobs

    target = TARGETS["sm_90"]
    recorded = aot.record_launches(attention_launches(dtype, 64, softcap=3.0, dropout_p=0.2), target)
    (item,) = [x for x in recorded if x.kernel.__name__ == "attention_dkdv_kernel"]
    with compat.driver(aot.NamedTarget(target)):
        compiled = compat.compile_launch(item.kernel, item.grid, item.args, item.kwargs)
    is_packed = packed_behind_the_fence(compiled.asm["ptx"]) > 0
    assert is_packed == (VERSION < (3, 8)), "the versions in which there is something to look at are others"
    cubin = tmp_path / "kernel.cubin"
    cubin.write_bytes(compiled.asm["cubin"])
    sass = subprocess.run([knobs.nvidia.nvdisasm.path, "-c", str(cubin)], capture_output=True, text=True, check=True)
    products, wrong = late_writes(sass.stdout)
    assert products > 0 and wrong == []


def test_a_late_write_is_found() -> None:
    chain = "WARPGROUP.ARRIVE ;\n{}HGMMA.64x64x16.F32.BF16 R24, R96, gdesc[UR4], R24, gsb0 ;\n"
    assert late_writes(chain.format("PRMT R92, R1, 0x5410, R2 ;\n")) == (1, [])
    assert late_writes(chain.format("PRMT R98, R1, 0x5410, R2 ;\n")) == (1, ["PRMT R98, R1, 0x5410, R2 ;"])
