"""Layer: emulator. All that a launch may pass reaches a kernel as it would on a GPU; errors name arguments."""

from __future__ import annotations

from typing import Any

import pytest
import torch

triton = pytest.importorskip("triton")

import triton.language as tl  # noqa: E402
from triton.tools.tensor_descriptor import TensorDescriptor  # noqa: E402

import fusemesh  # noqa: E402
from fusemesh.kernels.emulator import Emulator  # noqa: E402
from fusemesh.kernels.emulator.hazard import Hazard, UnknownInstruction  # noqa: E402
from fusemesh.kernels.emulator.launch import launching  # noqa: E402
from fusemesh.kernels.emulator.launch.compiled import Compiled  # noqa: E402
from fusemesh.kernels.runtime.launch import TARGETS, Target, launch  # noqa: E402

pytestmark = pytest.mark.aot


@triton.jit
def scalars_kernel(
    p_ints,
    p_floats,
    a: tl.int8,
    b: tl.int16,
    c: tl.int32,
    d: tl.int64,
    e: tl.uint8,
    f: tl.uint64,
    g: tl.int1,
    x: tl.float16,
    y: tl.bfloat16,
    z: tl.float32,
    w: tl.float64,
):
    tl.store(p_ints, a.to(tl.int64))
    tl.store(p_ints + 1, b.to(tl.int64))
    tl.store(p_ints + 2, c.to(tl.int64))
    tl.store(p_ints + 3, d)
    tl.store(p_ints + 4, e.to(tl.int64))
    tl.store(p_ints + 5, f.to(tl.int64))
    tl.store(p_ints + 6, g.to(tl.int64))
    tl.store(p_floats, x.to(tl.float64))
    tl.store(p_floats + 1, y.to(tl.float64))
    tl.store(p_floats + 2, z.to(tl.float64))
    tl.store(p_floats + 3, w)


def test_scalars_of_every_width() -> None:
    ints, floats = torch.zeros(7, dtype=torch.int64), torch.zeros(4, dtype=torch.float64)
    given = (-3, -300, -70000, -(2**40), 200, 2**63 + 5, True)
    with fusemesh.emulate("sm_80"):
        scalars_kernel[(1,)](ints, floats, *given, 1 / 3, 1 / 3, 1 / 3, 1 / 3)
    assert ints.tolist() == [-3, -300, -70000, -(2**40), 200, 2**63 + 5 - 2**64, 1]
    third = torch.tensor(1 / 3, dtype=torch.float64)
    dtypes = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
    assert floats.tolist() == [third.to(dtype).double().item() for dtype in dtypes]


@triton.jit
def tuple_kernel(p_out, pair, nothing, flag: tl.constexpr, one, more=7, SIZE: tl.constexpr = 4):
    o = tl.arange(0, SIZE)
    value = tl.load(pair[0] + o) * pair[1][0] + one + more
    if nothing is not None:
        value += tl.load(nothing + o)
    if flag:
        value += 100
    if pair[1][1] is not None:
        value += pair[1][1]
    tl.store(p_out + o, value)


@pytest.mark.parametrize("target", ["sm_80", "sm_90"])
def test_tuples_none_constexprs_defaults_and_names(target: str) -> None:
    x, extra = torch.arange(4, dtype=torch.int32), torch.full((4,), 1000, dtype=torch.int32)
    out = torch.zeros(3, 4, dtype=torch.int32)
    with fusemesh.emulate(target):
        # A grid may ask for the bound arguments, and a 1 is compiled into the kernel.
        tuple_kernel[lambda bound: (bound["SIZE"] // 4,)](out[0], (x, (3, None)), None, False, 1)
        tuple_kernel[(1,)](out[1], (x, (3, 50)), extra, True, one=5, more=2)
        launch(tuple_kernel, (1,), out[2], (x, (1, None)), None, flag=True, one=1 << 20, SIZE=4)
    want = torch.stack([3 * x + 8, 3 * x + 1157, x + (1 << 20) + 107])
    assert torch.equal(out, want)


@triton.jit
def copy_kernel(p_x, p_out, rows, columns, s_x, s_out, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    o = tl.arange(0, BLOCK)
    x = tl.load(p_x + row * s_x + o, mask=o < columns, other=0.0)
    tl.store(p_out + row * s_out + o, x, mask=o < columns)


def copied(x: torch.Tensor, out: torch.Tensor, columns: int | None = None) -> None:
    copy_kernel[(x.shape[0],)](x, out, x.shape[0], columns or x.shape[1], x.stride(0), out.stride(0), BLOCK=16)


def test_strided_tensors_and_views_of_one_storage() -> None:
    store = torch.arange(60.0).reshape(5, 12)
    before = store.clone()
    with fusemesh.emulate("sm_90"):
        copied(store[1:4, 2:7], store[1:4, 7:12])  # in rows of one storage
    assert torch.equal(store[1:4, 7:12], before[1:4, 2:7])
    store[1:4, 7:12] = before[1:4, 7:12]
    assert torch.equal(store, before)


def test_tensors_without_elements_and_empty_grids() -> None:
    empty = torch.zeros(3, 0)
    out = torch.full((3, 4), 7.0)
    with fusemesh.emulate("sm_90") as run:
        copy_kernel[(3,)](empty, out, 3, 0, 0, 4, BLOCK=16)  # every lane is masked
        copied(torch.zeros(0, 4), out)
        launch(copy_kernel, (0,), empty, out, 3, 0, 0, 4, BLOCK=16)
    assert torch.equal(out, torch.full((3, 4), 7.0)) and len(run.counts) == 1


@pytest.mark.parametrize(("rows", "columns", "name"), [(4, 5, "p_x"), (3, 6, "p_x")])
def test_what_lies_beyond_a_tensor_is_named(rows: int, columns: int, name: str) -> None:
    x, out = torch.zeros(8, 5)[:3], torch.zeros(8, 8)
    with fusemesh.emulate("sm_90"), pytest.raises(Hazard, match=rf"address: .*{name}.*test_launching\.py:\d+") as error:
        copy_kernel[(rows,)](x, out, rows, columns, 5, 8, BLOCK=16)
    assert error.value.kind == "address"
    with fusemesh.emulate("sm_90") as run:  # and the next launch is none the worse
        copied(x, out)
    assert [each.ctas for each in run.counts] == [3]


@triton.jit
def descriptor_kernel(x, p_after, out, column, COLUMNS: tl.constexpr):
    row = tl.program_id(0) * 8
    out.store([row, 0], x.load([row, column]) + tl.load(p_after))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("target", ["sm_80", "sm_90"])
def test_tensor_descriptors_of_the_host(target: str, dtype: torch.dtype) -> None:
    x, out = torch.randn(20, 64).to(dtype), torch.full((20, 32), 9.0, dtype=dtype)
    descriptors = [TensorDescriptor.from_tensor(t, [8, 32]) for t in (x, out)]
    after = torch.tensor(3.0, dtype=dtype)
    with fusemesh.emulate(target):
        descriptor_kernel[(3,)](descriptors[0], after, descriptors[1], 16, COLUMNS=32)
    assert torch.equal(out, x[:, 16:48] + after)


def test_descriptors_made_in_a_kernel() -> None:
    x, out = torch.randn(24, 32), torch.zeros(24, 32)
    with fusemesh.emulate("sm_80"):
        made_descriptor_kernel[(3,)](x, out, 24, 32)
    assert torch.equal(out, 2 * x)
    with fusemesh.emulate("sm_90", keep=True) as run:
        made_descriptor_kernel[(3,)](out, x, 24, 32)
    assert torch.equal(x, 2 * out) and run.bound[0].scratch.numel() == 3 * run.bound[0].compiled.scratch_bytes > 0


@triton.jit
def made_descriptor_kernel(p_x, p_out, rows, columns):
    x = tl.make_tensor_descriptor(p_x, [rows, columns], [columns, 1], [8, 32])
    out = tl.make_tensor_descriptor(p_out, [rows, columns], [columns, 1], [8, 32])
    row = tl.program_id(0) * 8
    out.store([row, 0], x.load([row, 0]) * 2.0)


def in_scratch(read: str) -> str:
    """Return a kernel that writes its CTA's number to scratch memory and copies what it reads there."""
    return f""".entry scratch_kernel(.param .u64 p_0, .param .u64 p_1, .param .u64 p_2)
.reqntid 32
{{
.reg .pred %p<2>;
.reg .b32 %r<4>;
.reg .b64 %rd<8>;
mov.u32 %r0, %tid.x;
setp.ne.s32 %p0, %r0, 0;
@%p0 ret;
ld.param.b64 %rd0, [p_0];
ld.param.b64 %rd1, [p_1];
mov.u32 %r1, %ctaid.x;
mul.wide.u32 %rd2, %r1, 4;
mul.wide.u32 %rd3, %r1, 16;
add.s64 %rd4, %rd1, %rd3;
st.global.b32 [%rd4], %r1;
ld.global.b32 %r2, [%rd4 + {read}];
add.s64 %rd5, %rd0, %rd2;
st.global.b32 [%rd5], %r2;
ret;
}}
"""


def test_scratch_of_global_memory() -> None:
    out = torch.full((3,), -1, dtype=torch.int32)

    def run(read: str) -> None:
        compiled = Compiled("scratch_kernel", read, in_scratch(read), 0, {"p_out": "*i32"}, 16, 16, ())
        Emulator(TARGETS["sm_90"]).start(compiled, (3, 1, 1), (out,))

    run("0")
    assert out.tolist() == [0, 1, 2]
    with pytest.raises(Hazard, match="global scratch"):
        run("4")  # never written
    with pytest.raises(Hazard, match="address"):
        run("48")


def test_a_second_launch_parses_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    x, out = torch.randn(6, 8), torch.zeros(2, 6, 8)
    with fusemesh.emulate("sm_90") as run:
        copied(x, out[0])

        def refuse(*arguments: Any, **options: Any) -> None:
            raise AssertionError("parsed or compiled again")

        monkeypatch.setattr(launching, "parse", refuse)
        monkeypatch.setattr(launching, "Machine", refuse)
        copied(x, out[1])
    assert torch.equal(out[0], x) and torch.equal(out[1], x)
    assert run.counts[0].opcodes == run.counts[1].opcodes and run.counts[1].ctas == 6


def test_a_launch_can_be_run_again() -> None:
    x, out = torch.randn(6, 9), torch.zeros(6, 9)
    with fusemesh.emulate("sm_90", keep=True, ctas=2) as run:
        copied(x, out)
    assert torch.equal(out[:2], x[:2]) and not out[2:].any()
    run.bound[0].run(run.bound[0].machine(asynchrony="early"))
    assert torch.equal(out, x)


@triton.jit
def product_kernel(p_x, p_y, p_out, SIZE: tl.constexpr):
    o = tl.arange(0, SIZE)
    at = o[:, None] * SIZE + o[None, :]
    tl.store(p_out + at, tl.dot(tl.load(p_x + at), tl.load(p_y + at)))


@triton.jit
def speaking_kernel(p_x, p_out, SIZE: tl.constexpr):
    o = tl.arange(0, SIZE)
    x = tl.load(p_x + o)
    tl.device_assert(x > -100, "too small")
    tl.device_print("seen", x, o)
    tl.store(p_out + o, x)


def test_device_assert_is_a_trap_and_device_print_prints(capsys: pytest.CaptureFixture[str]) -> None:
    x, out = torch.arange(32) - 1.5, torch.zeros(32)
    with fusemesh.emulate("sm_90"):
        speaking_kernel[(1,)](x, out, SIZE=32, num_warps=1, debug=True)
    assert torch.equal(out, x)
    printed = capsys.readouterr().out
    assert "seen" in printed and "-1.5" in printed and "29.5" in printed
    x[7] = -1000
    with fusemesh.emulate("sm_90"), pytest.raises(Hazard, match=r"trap: .* in 1 threads, first in 7: too small"):
        speaking_kernel[(1,)](x, out, SIZE=32, num_warps=1, debug=True)


def test_clusters_are_refused_by_name() -> None:
    x, out = torch.zeros(64, 64, dtype=torch.float16), torch.zeros(64, 64)
    with (
        fusemesh.emulate("sm_90"),
        pytest.raises(ValueError, match=r"product_kernel: expected num_ctas=1 .* received 2"),
    ):
        product_kernel[(1,)](x, x, out, SIZE=64, num_ctas=2)


def test_tensor_memory_is_refused_by_name() -> None:
    x, out = torch.zeros(128, 128, dtype=torch.float16), torch.zeros(128, 128)
    with (
        fusemesh.emulate("sm_100"),
        pytest.raises(UnknownInstruction, match=r"product_kernel, PTX line \d+: .*tcgen05"),
    ):
        product_kernel[(1,)](x, x, out, SIZE=128)


def test_shared_memory_beyond_the_targets_is_triton_s_own_error() -> None:
    from triton.runtime.errors import OutOfResources

    x, out = torch.zeros(64, 64, dtype=torch.float16), torch.zeros(64, 64)
    with fusemesh.emulate(Target("cuda", 90, 1024)), pytest.raises(OutOfResources, match="shared memory"):
        product_kernel[(1,)](x, x, out, SIZE=64, num_warps=8)
    with fusemesh.emulate("sm_90"):
        product_kernel[(1,)](x, x, out, SIZE=64, num_warps=8)
