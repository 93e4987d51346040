"""Layer: kernels, on one process. The C++ engine's ABI: its layout, how it grows, what it refuses, whose threads it
uses, and what is said where it is missing."""

from __future__ import annotations

import ctypes
import hashlib
import math
import os
import re
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest

from fusemesh.kernels import engine
from tests.support.engine_required import require_engine

require_engine()

CSRC = engine.library_path().parent


def inputs(
    batch: int, heads: int, kv_heads: int, sq: int, sk: int, dim: int, dim_v: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    draw = np.random.default_rng(0)
    shapes = ((batch, heads, sq, dim), (batch, kv_heads, sk, dim), (batch, kv_heads, sk, dim_v))
    q, k, v = (draw.standard_normal(shape, dtype=np.float32) for shape in shapes)
    return q, k, v


def python(code: str, **environment: str) -> str:
    """Run ``code`` in a fresh Python; return what it prints."""
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, env={**os.environ, **environment}
    )
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


THREADS = """
import os, signal, sys
{first}
import numpy as np
from fusemesh.kernels import engine
x = np.random.default_rng(0).standard_normal((1, 8, 256, 32), dtype=np.float32)
before = len(os.listdir("/proc/self/task"))
for _ in range(3):
    y = engine.attention(x, x, x, threads=2)[0]
print(engine.thread_runtime(), len(os.listdir("/proc/self/task")) - before, "torch" in sys.modules, sep="|", end="|")
sys.stdout.flush()
if os.fork() == 0:
    signal.alarm(60)  # libgomp would wait for its lost threads for ever
    same = np.array_equal(engine.attention(x, x, x, threads=2)[0], y)
    print(same, engine.thread_runtime(), sep="|", flush=True)
    os._exit(0)
assert os.wait()[1] == 0
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc and finds OpenMP libraries by Linux's loader")
def test_borrows_the_threads_of_torch() -> None:
    """Beside torch the engine uses torch's OpenMP threads: after torch has made its own, the process gains none.

    A forked child has none of them, and starts its own.
    """
    first = "import torch; torch.set_num_threads(2); torch.ones(2000, 2000).exp().sum()"
    runtime, gained, has_torch, *in_child = python(THREADS.format(first=first), OMP_NUM_THREADS="2").split("|")
    assert "torch" in runtime
    assert "omp" in Path(runtime).name
    assert (gained, has_torch) == ("0", "True")
    assert in_child == ["True", "std::thread"]


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_without_torch_threads_end_with_the_call() -> None:
    found = python(THREADS.format(first="sys.modules['torch'] = None")).split("|")
    assert found == ["std::thread", "0", "True", "True", "std::thread"]  # third: the entry None that blocks torch


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="processes are forked on Linux")
def test_forked_workers_of_torch() -> None:
    """The engine is first called in a child, of a process in which torch alone had threads: DataLoader and Pool."""
    code = """
    import multiprocessing, signal, sys
    import torch
    from fusemesh import flash_attention
    torch.set_num_threads(2)
    torch.ones(2000, 2000).exp().sum()
    q = torch.ones(1, 8, 256, 32)

    class Samples(torch.utils.data.Dataset):
        def __len__(self):
            return 4

        def __getitem__(self, index):
            signal.alarm(60)
            torch.set_num_threads(2)
            return float(flash_attention(q, q, q, backend="cpu")[0, 0, 0, 0])

    print(list(torch.utils.data.DataLoader(Samples(), batch_size=2, num_workers=2, multiprocessing_context="fork")))
    with multiprocessing.get_context("fork").Pool(2) as pool:
        print(pool.map_async(Samples().__getitem__, range(4)).get(60))
    """
    assert python(textwrap.dedent(code), OMP_NUM_THREADS="2").count("1.0") == 4


def full_call() -> tuple[engine.Attention, list[np.ndarray]]:
    """A legal call and the arrays behind it."""
    arrays = [np.ones((1, 2, 4, 8), np.float32) for _ in range(4)]
    q, k, v, out = (engine.view(x.ctypes.data, (64, 32, 8, 1), "float32") for x in arrays)
    call = engine.Attention(batch=1, heads=2, kv_heads=2, seq_q=4, seq_k=4, dim=8, dim_v=8, q=q, k=k, v=v, out=out)
    call.scale, call.window_left, call.window_right = 1.0, -1, -1
    return call, arrays


def some_tensor(dtype: str = "float32") -> engine.Tensor:
    return engine.view(64, (0, 0, 0, 0), dtype)


@pytest.mark.parametrize(
    ("field", "value", "expected"),
    [
        ("abi_version", 2, "abi_version: this engine speaks 1, received 2"),
        ("struct_size", 8, "struct_size: expected at least"),
        ("batch", -1, "batch: expected at least 0, received -1"),
        ("seq_k", -7, "seq_k: expected at least 0, received -7"),
        ("heads", 3, "heads: expected a multiple of kv_heads = 2, received 3"),
        ("seq_q", 2**62, "sizes: expected"),
        ("dim", 2**40, "sizes: expected"),
        ("q", engine.Tensor(), "q: expected a tensor, received NULL"),
        ("out", engine.Tensor(), "out: expected a tensor, received NULL"),
        ("k", some_tensor("bfloat16"), "k: this engine expected dtype f32, received bf16"),
        ("v", engine.Tensor(data=64, dtype=99), "v: this engine expected dtype f32, received unknown (99)"),
        ("mask", some_tensor("float32"), "mask: this engine expected dtype u8, received f32"),
        ("bias", some_tensor("float16"), "bias: this engine expected dtype f32, received f16"),
        ("window_left", -2, "window: expected sides of at least 0, or -1 for open, received (-2, -1)"),
        ("origin_k", 2**62, "origin_k: expected a position within"),
        ("align", 2, "align: expected 0 (origin) or 1 (bottom right), received 2"),
        ("threads", -1, "threads: expected at least 0, received -1"),
        ("flags", 1, "flags: this engine defines none"),
        ("reserved", 1, "flags: this engine defines none"),
        ("alibi_slopes", some_tensor("float16"), "alibi_slopes: this engine expected dtype f32, received f16"),
        ("sinks", some_tensor("int32"), "sinks: this engine expected dtype f32, received i32"),
        (
            "cu_seqlens_q",
            some_tensor("int32"),
            "cu_seqlens: expected both of them or none, received cu_seqlens_q alone",
        ),
        ("softcap", -1.0, "softcap: expected 0, or a number that fp32 holds above 0, received -1"),
        ("dropout_p", 1.0, "dropout_p: expected at least 0 and below 1, received 1"),
        ("q", some_tensor("int64"), "q: this engine expected dtype f32, bf16 or f16, received i64"),
    ],
)
def test_abi_refuses(field: str, value: object, expected: str) -> None:
    call, arrays = full_call()
    setattr(call, field, value)
    with pytest.raises(ValueError, match=r"^CPU engine: ") as error:
        engine.forward(call)
    assert expected in str(error.value)
    assert (arrays[3] == 1).all(), "a refused call writes nothing"


def test_abi_grows_by_appending() -> None:
    """A caller with a longer struct is understood as long as what this engine does not know is zero."""

    class Longer(ctypes.Structure):
        _fields_ = [("call", engine.Attention), ("unknown", ctypes.c_int64 * 2)]

    call, arrays = full_call()
    call.struct_size = ctypes.sizeof(Longer)
    library = engine._library()
    longer = Longer(call, (0, 0))
    assert library.fm_attention_forward(ctypes.cast(ctypes.byref(longer), ctypes.POINTER(engine.Attention))) == 0
    assert np.allclose(arrays[3], 1)
    longer = Longer(call, (0, 1))
    assert library.fm_attention_forward(ctypes.cast(ctypes.byref(longer), ctypes.POINTER(engine.Attention))) == 2
    assert b"sets an option that this engine" in library.fm_last_error()
    assert library.fm_attention_forward(None) == 1


def test_bottom_right_alignment_in_the_abi() -> None:
    q, k, v = inputs(1, 2, 2, 3, 7, 8, 8)
    expected, _ = engine.attention(q, k, v, window=(None, 0), origin=(4, 0))
    out = np.empty_like(q)
    call, _arrays = full_call()
    call.seq_q, call.seq_k, call.align, call.window_right, call.scale = 3, 7, 1, 0, 1 / math.sqrt(8)
    call.q, call.out = (engine.view(x.ctypes.data, (48, 24, 8, 1), "float32") for x in (q, out))
    call.k, call.v = (engine.view(x.ctypes.data, (112, 56, 8, 1), "float32") for x in (k, v))
    engine.forward(call)
    assert np.array_equal(out, expected)


LAYOUT = """
#include <stddef.h>
#include <stdio.h>
#include "abi/fusemesh.h"
int main(void) {{
{prints}
  printf("%zu %zu %zu %zu %d\\n", sizeof(fm_tensor), sizeof(fm_attention), sizeof(fm_gradients), sizeof(fm_cache),
         FM_ABI_VERSION);
  return 0;
}}
"""


def test_header_is_c_and_python_mirrors_it(tmp_path: Path) -> None:
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        pytest.skip("no C compiler on this machine")
    structs = {
        "fm_tensor": engine.Tensor,
        "fm_attention": engine.Attention,
        "fm_gradients": engine.Gradients,
        "fm_cache": engine.Cache,
    }
    fields = [(name, field[0]) for name, struct in structs.items() for field in struct._fields_]
    prints = "\n".join(f'  printf("%zu\\n", offsetof({name}, {field}));' for name, field in fields)
    (tmp_path / "layout.c").write_text(LAYOUT.format(prints=prints))
    flags = ["-std=c99", "-Wall", "-Wextra", "-Wpedantic", "-Werror", f"-I{CSRC}"]
    subprocess.run([compiler, *flags, "layout.c", "-o", "layout"], cwd=tmp_path, check=True, timeout=60)
    lines = subprocess.run([tmp_path / "layout"], capture_output=True, text=True, check=True).stdout.split()
    expected = [getattr(structs[name], field).offset for name, field in fields]
    expected += [*map(ctypes.sizeof, structs.values()), engine.ABI_VERSION]
    assert [int(number) for number in lines] == expected


def test_sources_know_neither_python_nor_torch() -> None:
    for path in [*CSRC.rglob("*.cpp"), *CSRC.rglob("*.h")]:
        for line in path.read_text().splitlines():
            if line.startswith("#include"):
                assert not any(word in line.lower() for word in ("python", "torch", "aten", "omp.h")), (path, line)


def test_library_is_built_from_these_sources() -> None:
    """Guards against a stale library: after a change in csrc/ run `pip install -e .` (make does)."""
    sources = sorted(str(path) for path in CSRC.rglob("*") if path.suffix in (".cpp", ".h"))
    digest = hashlib.sha256(b"".join(Path(path).read_bytes() for path in sources)).hexdigest()[:16]
    info = engine.build_info()
    assert info["sources"] == digest, "run: pip install --no-deps -e ."
    assert info["isa"] == engine.isas()[0]
    assert engine.isas()[-1] == "scalar"
    assert info["compiler"]


def test_wrong_arrays() -> None:
    q, k, v = inputs(1, 4, 2, 5, 6, 8, 8)
    for arguments, options, expected in [
        ((q[0], k, v), {}, "q: expected 4 dimensions"),
        ((q, k[..., :4], v), {}, "k: expected shape [1, Hkv, Sk, 8]"),
        ((q, k, v[:, :1]), {}, "v: expected shape [1, 2, 6, Dv]"),
        ((q[:, :3], k, v), {}, "heads: expected a multiple of kv_heads = 2, received 3"),
        ((q.astype(np.float64), k, v), {}, "q: expected float32, received float64"),
        ((q, k, v), {"mask": np.ones((5, 6), np.float32)}, "mask: expected bool, received float32"),
        ((q, k, v), {"mask": np.ones((5, 7), bool)}, "mask: expected a shape that broadcasts to [1, 4, 5, 6]"),
        ((q, k, v), {"bias": np.ones((5, 6))}, "bias: expected float32, received float64"),
        ((q, k, v), {"window": (-5, 0)}, "window: expected sides of at least 0"),
    ]:
        with pytest.raises(ValueError) as error:
            engine.attention(*arguments, **options)
        assert expected in str(error.value)


def test_absent_engine_is_explained(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    q, k, v = inputs(1, 2, 2, 5, 5, 8, 8)
    broken = tmp_path / "libfusemesh.so"
    broken.write_bytes(b"not a library")
    engine._load.cache_clear()
    try:
        for path, expected in ((tmp_path / "absent.so", "made without a C++ compiler"), (broken, "does not load")):
            monkeypatch.setattr(engine, "library_path", lambda path=path: path)
            engine._load.cache_clear()
            assert expected in str(engine.why_unavailable())
            with pytest.raises(
                ValueError, match=re.escape("backend='cpu' cannot run here: ") + ".*" + re.escape(expected)
            ):
                engine.attention(q, k, v)
    finally:
        engine._load.cache_clear()
