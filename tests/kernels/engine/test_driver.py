"""Layer: kernels, without Python: the C++ engine by a driver that draws calls of every kind on every instruction set,
and compares them with the scalar code (native/driver.cpp): under sanitizers, and on an emulated ARM processor. The
thread sanitizer sees the engine's own threads, because the driver has no OpenMP library to lend its."""

from __future__ import annotations

import os
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from fusemesh.kernels import engine
from tests.support.engine_required import require_engine

require_engine()

CSRC = engine.library_path().parent
DRIVER = Path(__file__).parent / "driver.cpp"
AVX2 = ["-mavx2", "-mfma", "-mf16c"]
AVX512 = [*AVX2, "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq"]
FLAGS = {"isa_avx2": AVX2, "isa_avx512": AVX512, "isa_avx512_bf16": [*AVX512, "-mavx512bf16"]}


def build(folder: Path, compiler: str, *flags: str, link: tuple[str, ...] = (), x86: bool = True) -> str:
    """The driver and the engine in one program."""
    common = [compiler, "-std=c++17", "-pthread", *flags]

    def compiled(source: Path) -> str:
        target = str(folder / f"{source.stem}.o")
        isa = FLAGS.get(source.stem, []) if x86 else []
        subprocess.run([*common, f"-I{CSRC}", *isa, "-c", str(source), "-o", target], check=True, timeout=600)
        return target

    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(compiled, [*CSRC.glob("*/*.cpp"), DRIVER]))
    program = str(folder / "driver")
    subprocess.run([*common, *objects, "-o", program, *link], check=True, timeout=120)
    return program


def run(command: list[str], calls: int, threads: int, isas: tuple[str, ...]) -> None:
    """As many calls of each kind, none of which differs between instruction sets."""
    done = subprocess.run([*command, str(calls), "11", str(threads)], capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{calls} calls of each kind on {', '.join(isas)}, 0 failures" in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize(
    ("sanitizers", "calls", "threads"), [("address,undefined", 2000, 2), ("thread", 1000, 3)], ids=["memory", "threads"]
)
def test_the_driver_runs_clean(sanitizers: str, calls: int, threads: int, tmp_path: Path) -> None:
    compiler = os.environ.get("CXX") or shutil.which("g++")
    if compiler is None:
        pytest.skip("no g++ on this machine")
    flags = ("-O1", "-g", f"-fsanitize={sanitizers}", "-fno-sanitize-recover=all")
    run([build(tmp_path, compiler, *flags, link=("-ldl",))], calls, threads, engine.isas())


@pytest.mark.slow
def test_the_driver_on_an_emulated_arm_processor(tmp_path: Path) -> None:
    compiler, emulator = shutil.which("aarch64-linux-gnu-g++"), shutil.which("qemu-aarch64-static")
    if compiler is None or emulator is None:
        pytest.skip("no aarch64-linux-gnu-g++ or no qemu-aarch64-static (Debian: qemu-user-static) on this machine")
    program = build(tmp_path, compiler, "-O2", link=("-static",), x86=False)
    run([emulator, program], 1500, 2, ("neon", "scalar"))
