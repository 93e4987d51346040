"""A warp-specialised kernel with TMA, mbarriers and wgmma: right, and wrong wherever its protocol is broken."""

import re
from collections import Counter

import pytest
import torch

from fusemesh.kernels.emulator.hazard import Hazard

pytest.importorskip("triton.experimental.gluon.language.nvidia.hopper")
from tests.support.emulator import gluon_forward

pytestmark = pytest.mark.aot

# Each takes a statement, and returns what stands in its place, or None where it does not apply.
MUTATIONS = {
    "no arrival": lambda s: "" if "mbarrier.arrive.shared" in s else None,
    "no arrive.expect_tx": lambda s: "" if "arrive.expect_tx" in s else None,
    "half of the bytes": lambda s: re.sub(r"(expect_tx.*, )(\d+);", lambda m: f"{m[1]}{int(m[2]) // 2};", s),
    "no wait": lambda s: "mov.pred complete, -1;" if "mbarrier.try_wait" in s else None,
    "one arrival more": lambda s: re.sub(r"(mbarrier\.init.*, )(\d+);", lambda m: f"{m[1]}{int(m[2]) + 1};", s),
    "no load": lambda s: "" if "cp.async.bulk.tensor.2d.shared" in s else None,
    "no store": lambda s: "" if "cp.async.bulk.tensor.2d.global" in s else None,
    "no wait for the store": lambda s: "" if s.startswith("cp.async.bulk.wait_group") else None,
    "coordinates swapped": lambda s: re.sub(r"\{(%r\d+), (%r\d+)\}\]", r"{\2, \1}]", s) if "bulk.tensor" in s else None,
    "no wgmma.wait_group": lambda s: "" if s.startswith("wgmma.wait_group") else None,
    "a wait for one group less": lambda s: re.sub(
        r"^(wgmma\.wait_group\S*\s+)(\d+);", lambda m: f"{m[1]}{int(m[2]) + 1};", s
    ),
    "no wgmma.fence": lambda s: "" if s.startswith("wgmma.fence") else None,
    "no commit": lambda s: "" if s.startswith("wgmma.commit_group") else None,
    "no fence.proxy": lambda s: "" if s.startswith("fence.proxy") else None,
}


@pytest.mark.parametrize(
    "options",
    [{}, {"asynchrony": "early"}, {"asynchrony": "random", "seed": 1}, {"asynchrony": "random", "seed": 2}],
)
def test_it_computes_attention_at_the_accuracy_of_bf16(options):
    running = gluon_forward.Run(384, 2)
    out, _ = running(**options)
    assert float((running.head(out) - running.want).norm() / running.want.norm()) < 3e-3


def sites(text: str, ran: set[int]) -> list[tuple[str, int, str]]:
    """(mutation, line, statement in its place) of every statement that ran."""
    found = []
    for n, line in enumerate(text.split("\n"), 1):
        statement = line.split("//")[0].strip()
        if n in ran and statement.endswith(";"):
            for name, change in MUTATIONS.items():
                new = change(statement)
                if new is not None and new != statement:
                    found.append((name, n, new))
    return found


@pytest.mark.parametrize("most", [3, pytest.param(1000, marks=pytest.mark.slow)])
def test_every_fault_of_its_protocol_is_caught(most):
    # The first CTA has the most tiles of keys, so that every stage is used again.
    running = gluon_forward.Run(384, 1)
    text = running.bound.compiled.text
    right, machine = running(ctas=1)
    ran = [block for n, block in zip(machine.ran, machine.kernel.blocks, strict=True) if n]
    tried, survivors = Counter(), []
    for name, line, new in sites(text, {x.line for block in ran for x in [*block.body, block.end] if x is not None}):
        if tried[name] == most:
            continue
        tried[name] += 1
        lines = text.split("\n")
        lines[line - 1] = new
        try:
            out, _ = running("\n".join(lines), 1, most_steps=200_000)
        except Hazard:
            continue
        # Rows that other CTAs would compute are NaN in both.
        if torch.equal(out.isnan(), right.isnan()) and torch.equal(out.nan_to_num(), right.nan_to_num()):
            survivors.append((name, line))
    assert set(tried) == set(MUTATIONS), tried
    assert survivors == [], tried
