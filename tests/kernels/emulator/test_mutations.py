"""Faults planted in compiled kernels are noticed: a pinned choice of every kind that portable kernels have."""

from __future__ import annotations

import functools
import random
import struct
from collections import defaultdict

import numpy as np
import pytest

from bench.mutations import proofs, reasons
from bench.mutations.__main__ import subjects, survivor, table
from bench.mutations.calls import FAMILIES, attention
from fusemesh.kernels.emulator.machine import Machine
from fusemesh.kernels.emulator.mutants import Subject, record
from fusemesh.kernels.emulator.mutations import KINDS, Mutation, mutated, mutations
from fusemesh.kernels.emulator.tensor_maps import TensorMap
from tests.support.emulated_ptx import aligned, run

pytestmark = [pytest.mark.aot]

COPY = "cp.async.ca.shared.global"
LOAD = "ldmatrix.sync.aligned.m8n8"
EXPECT = "mbarrier.arrive.expect_tx.shared.b64"
BULK = "cp.async.bulk.tensor.2d.shared::cta.global.mbarrier"
TRY_WAIT = "mbarrier.try_wait.parity.shared.b64"
# A statement of each kind, and what stands in its place.
CHANGES = [
    ("barrier deleted", "bar.sync 0", [""]),
    ("barrier deleted", "bar.arrive 1, 64", []),
    ("wait deleted", "cp.async.wait_group 2", [""]),
    ("wait deleted", "mbarrier.try_wait.parity.shared.b64 complete, [%r1], %r2", ["mov.pred complete, -1"]),
    ("wait count + 1", "wgmma.wait_group.sync.aligned 0", ["wgmma.wait_group.sync.aligned 1"]),
    ("fence deleted", "fence.proxy.async.shared::cta", [""]),
    ("commit deleted", "cp.async.commit_group", [""]),
    ("copy deleted", "cp.async.cg.shared.global [ %r1 + 0 ], [ %rd2 + 0 ], 0x10, %r3", [""]),
    ("swizzle constant", "xor.b32 %r1, %r2, 32", ["xor.b32 %r1, %r2, 48"]),
    ("swizzle constant", "and.b32 %r1, %r2, 112", ["and.b32 %r1, %r2, 96"]),
    ("swizzle constant", "and.b32 %r1, %r2, 31", []),
    ("shuffle lane", "shfl.sync.bfly.b32 %r1, %r2, 16, 31, -1", ["shfl.sync.bfly.b32 %r1, %r2, 19, 31, -1"]),
    ("predicate flipped", "@%p1 bra $L__BB0_1", ["@!%p1 bra $L__BB0_1"]),
    ("predicate flipped", "@!%p1 st.global.b32 [%rd1], %r1", ["@%p1 st.global.b32 [%rd1], %r1"]),
    ("guard dropped", "@%p1 st.global.b32 [%rd1], %r1", ["st.global.b32 [%rd1], %r1"]),
    ("guard dropped", f"{COPY} [%r1], [%rd1], 0x8, %r2", [f"{COPY} [%r1], [%rd1], 0x8"]),
    ("guard dropped", "@%p1 bra $L__BB0_1", []),
    ("bound", "setp.lt.s32 %p1, %r1, %r2", ["setp.le.s32 %p1, %r1, %r2"]),
    ("bound", "setp.ge.u64 %p1, %rd1, %rd2", ["setp.gt.u64 %p1, %rd1, %rd2"]),
    ("bound", "setp.lt.f32 %p1, %r1, %r2", []),
    ("select swapped", "selp.f32 %r1, %r2, 0f00000000, %p1", ["selp.f32 %r1, 0f00000000, %r2, %p1"]),
    (
        "descriptor bit",
        "or.b64 %rd1, %rd2, 4611686293305294848",
        ["or.b64 %rd1, %rd2, 9223372311732682752", "or.b64 %rd1, %rd2, 4611686018427387904"],
    ),
    ("matrix transposed", f"{LOAD}.x4.shared.b16 {{%r1}}, [%r2]", [f"{LOAD}.x4.trans.shared.b16 {{%r1}}, [%r2]"]),
    ("matrix transposed", f"{LOAD}.x4.trans.shared.b16 {{%r1}}, [%r2]", [f"{LOAD}.x4.shared.b16 {{%r1}}, [%r2]"]),
    ("shared offset + 16", "ld.shared.b32 %r1, [%r2]", ["ld.shared.b32 %r1, [%r2+16]"]),
    ("shared offset + 16", "st.shared.b32 [%r2+8], %r1", ["st.shared.b32 [%r2+24], %r1"]),
    ("expected bytes / 2", f"@%p1 {EXPECT} _, [%r1], 8192", [f"@%p1 {EXPECT} _, [%r1], 4096"]),
    ("coordinates swapped", f"{BULK} [%r1], [%rd1, {{%r2, %r3}}]", [f"{BULK} [%r1], [%rd1, {{%r3, %r2}}]"]),
    ("parity flipped", f"{TRY_WAIT} %p1, [%r1], 0", [f"{TRY_WAIT} %p1, [%r1], 1"]),
    ("parity flipped", f"{TRY_WAIT} %p1, [%r1], %r2", []),
    ("mbarrier count + 1", "@%p1 mbarrier.init.shared.b64 [%r1], 1", ["@%p1 mbarrier.init.shared.b64 [%r1], 2"]),
    ("arrival deleted", "@%p1 mbarrier.arrive.shared::cta.b64 _, [%r1], 4", [""]),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "statement", "changed"), CHANGES, ids=[f"{k}: {s[:30]}" for k, s, _ in CHANGES])
def test_each_kind_changes_its_statements_and_no_others(kind: str, statement: str, changed: list[str]) -> None:
    assert KINDS[kind](statement) == changed


def test_every_kind_has_a_statement() -> None:
    assert {kind for kind, _, _ in CHANGES} == set(KINDS)


@functools.cache
def pinned(target: str) -> list[Subject]:
    """Return the kernels of causal attention with a few of their calls: several tiles, both edges, two rounds ahead."""
    calls = attention(True)
    chosen = [calls[i] for i in (0, 1, 7, 13, 20)]
    return record(target, chosen, lambda name: name != "attention_delta_kernel")


def choice(subject: Subject, each: int) -> list[Mutation]:
    """Return some mutations of each kind, the same ones at every run: of those that do something in the few calls."""
    every = mutations(subject.machine)
    reached = subject.reached(every)
    places: dict[str, list[Mutation]] = defaultdict(list)
    for m in every:
        if reached.get(m, True) and not (m.kind == "fence deleted" and proofs.proof(subject.machine, m)):
            places[m.kind].append(m)
    pick = random.Random(7)
    return [m for all_ in places.values() for m in pick.sample(all_, min(each, len(all_)))]


@pytest.mark.parametrize("target", ["sm_80", "sm_90"])
def test_a_fault_of_each_kind_is_noticed(target: str) -> None:
    noticed, kinds = set(), set()
    for subject in pinned(target):
        assert len(subject.cases) == 5, subject.name
        kinds |= {m.kind for m in mutations(subject.machine)}
        for m in choice(subject, 3 if subject.name == "attention_forward_kernel" else 1):
            outcome = subject.outcome(m)
            if outcome.caught_by is None:
                found = survivor(subject, "causal", outcome, proof=proofs.proof(subject.machine, m))
                assert found["reason"], f"{subject.name} {target}: nothing notices {m}"
            else:
                noticed.add(m.kind)
    assert noticed == kinds
    assert len(noticed) >= 12


# Thread 0 loads five boxes of 8 x 32 words, two ahead; warp 1 adds up a column each; thread 0 stores the sums.
PIPELINE = (
    """mov.b32 %r0, global_smem;
setp.eq.u32 %p0, %tid, 0;
@%p0 mbarrier.init.shared.b64 [%r0 + 2048], 1;
@%p0 mbarrier.init.shared.b64 [%r0 + 2056], 1;
@%p0 mbarrier.init.shared.b64 [%r0 + 2064], 32;
@%p0 mbarrier.init.shared.b64 [%r0 + 2072], 32;
@%p0 mbarrier.init.shared.b64 [%r0 + 2080], 32;
fence.proxy.async.shared::cta;
bar.sync 0;
mov.b32 %r10, 0;
mov.b32 %r20, 0;
mov.b32 %r21, 8;
sub.s32 %r22, %tid, 32;
shl.b32 %r22, %r22, 2;
setp.ge.u32 %p2, %tid, 32;
@%p2 bra CONSUMER;
@!%p0 bra DONE;
PRODUCER:
and.b32 %r11, %r10, 1;
shr.u32 %r12, %r10, 1;
and.b32 %r12, %r12, 1;
mad.lo.s32 %r13, %r11, 1024, %r0;
mad.lo.s32 %r14, %r11, 8, %r0;
sub.s32 %r15, 1, %r12;
EMPTY:
mbarrier.try_wait.parity.shared.b64 %p1, [%r14 + 2064], %r15;
@!%p1 bra EMPTY;
mbarrier.arrive.expect_tx.shared.b64 _, [%r14 + 2048], 1024;
shl.b32 %r16, %r10, 3;
cp.async.bulk.tensor.2d.shared::cta.global.mbarrier::complete_tx::bytes [%r13], [%a0, {%r21, %r16}], [%r14 + 2048];
add.s32 %r10, %r10, 1;
setp.lt.s32 %p3, %r10, 5;
@%p3 bra PRODUCER;
SUMS:
mbarrier.try_wait.parity.shared.b64 %p1, [%r0 + 2080], 0;
@!%p1 bra SUMS;
cp.async.bulk.global.shared::cta.bulk_group [%a1], [%r0 + 3072], 128;
cp.async.bulk.commit_group;
cp.async.bulk.wait_group 0;
bra DONE;
CONSUMER:
and.b32 %r11, %r10, 1;
shr.u32 %r12, %r10, 1;
and.b32 %r12, %r12, 1;
mad.lo.s32 %r13, %r11, 1024, %r0;
mad.lo.s32 %r14, %r11, 8, %r0;
FULL:
mbarrier.try_wait.parity.shared.b64 %p1, [%r14 + 2048], %r12;
@!%p1 bra FULL;
and.b32 %r17, %r22, 112;
and.b32 %r18, %r22, 12;
"""
    + "".join(
        f"""xor.b32 %r19, %r17, {row << 4};
add.s32 %r19, %r19, %r18;
add.s32 %r19, %r19, %r13;
ld.shared.b32 %r30, [%r19 + {128 * row}];
add.s32 %r20, %r20, %r30;
"""
        for row in range(8)
    )
    + """mbarrier.arrive.shared.b64 _, [%r14 + 2064];
add.s32 %r10, %r10, 1;
setp.lt.s32 %p3, %r10, 5;
@%p3 bra CONSUMER;
add.s32 %r19, %r22, %r0;
st.shared.b32 [%r19 + 3072], %r20;
fence.proxy.async.shared::cta;
mbarrier.arrive.shared.b64 _, [%r0 + 2080];
DONE:
"""
)


class Pipeline:
    """A launch of PIPELINE, as a case of a Subject."""

    label, steps = "pipeline", 1000

    def __init__(self) -> None:
        self.data, self.out = aligned((48, 64), np.uint32), aligned((32,), np.uint32)
        self.data[:] = np.random.default_rng(0).integers(0, 1 << 20, (48, 64))
        box = TensorMap("u32", self.data.ctypes.data, (64, 48), (256,), (32, 8), 128)
        self.machine = run(PIPELINE, box, self.out, threads=64, shared=3200, memory=(self.data,))
        self.params = {"k_param_0": box.pack(), "k_param_1": struct.pack("<Q", self.out.ctypes.data)}

    def run(self, machine: Machine) -> None:
        self.out[:] = 0
        machine.memory.next_launch()
        machine.run(self.params, (0, 0, 0), (1, 1, 1))

    def is_right(self) -> bool:
        return bool((self.out == self.data[:40, 8:40].sum(0, dtype=np.uint32)).all())


def test_faults_of_bulk_copies_and_mbarriers_are_noticed() -> None:
    case = Pipeline()
    assert case.is_right()
    subject = Subject("pipeline", "sm_90", PIPELINE, case.machine, [case])
    assert subject.outcome().caught_by is None
    kinds = set()
    for m in mutations(case.machine):
        kinds.add(m.kind)
        assert subject.outcome(m).caught_by is not None, m
    bulk = {"expected bytes / 2", "coordinates swapped", "parity flipped", "mbarrier count + 1", "arrival deleted"}
    assert bulk | {"wait deleted", "fence deleted", "commit deleted", "copy deleted", "swizzle constant"} <= kinds


def test_without_checks_a_missing_barrier_goes_unnoticed() -> None:
    """The checks notice it: neither the result nor another part of the machine does."""
    (subject,) = (s for s in pinned("sm_80") if s.name == "attention_forward_kernel")
    places = [m for m in mutations(subject.machine) if m.kind == "barrier deleted"]
    first = next(m for m in places if subject.outcome(m).caught_by == "race")
    shared = subject.machine.shared
    shared.check = False
    try:
        assert subject.outcome(first).caught_by is None
    finally:
        shared.check = True


def test_a_change_is_undone() -> None:
    (subject,) = (s for s in pinned("sm_90") if s.name == "attention_forward_kernel")
    machine = subject.machine
    blocks, codes = list(machine.kernel.blocks), list(machine.blocks)
    for m in mutations(machine)[::97]:
        with mutated(machine, m):
            assert machine.kernel.blocks != blocks
            assert machine.blocks != codes
        assert machine.kernel.blocks == blocks
        assert machine.blocks == codes


@pytest.mark.slow
@pytest.mark.parametrize("target", ["sm_80", "sm_90"])
@pytest.mark.parametrize("family", list(FAMILIES))
def test_what_nothing_notices_has_a_reason(family: str, target: str) -> None:
    for subject in subjects(family, target):
        _, survivors = table(subject, family, ".", 1 << 30)
        assert not [s for s in survivors if not s["reason"]]


def test_a_reason_is_for_the_survivors_that_it_names() -> None:
    survived = {"kind": "barrier deleted", "kernel": "attention_forward_kernel", "code": "", "evidence": "", "text": ""}
    assert reasons.reason(survived)
    assert not reasons.reason({**survived, "kind": "wait deleted"})
