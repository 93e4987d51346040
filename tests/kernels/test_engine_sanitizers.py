"""Layer: kernels, without Python: the C++ engine under sanitizers, by a driver that draws calls of every kind on every
instruction set (native/driver.cpp). The thread sanitizer sees the engine's own threads, because the driver has no
OpenMP library to lend its."""

from __future__ import annotations

import os
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from engine_required import require_engine

from fusemesh.kernels import engine

require_engine()

CSRC = engine.library_path().parent
DRIVER = Path(__file__).parent / "native" / "driver.cpp"
AVX2 = ["-mavx2", "-mfma", "-mf16c"]
AVX512 = [*AVX2, "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq"]
FLAGS = {"isa_avx2": AVX2, "isa_avx512": AVX512, "isa_avx512_bf16": [*AVX512, "-mavx512bf16"]}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("sanitizers", "calls", "threads"), [("address,undefined", 2000, 2), ("thread", 1000, 3)], ids=["memory", "threads"]
)
def test_the_driver_runs_clean(sanitizers: str, calls: int, threads: int, tmp_path: Path) -> None:
    compiler = os.environ.get("CXX") or shutil.which("g++")
    if compiler is None:
        pytest.skip("no g++ on this machine")
    common = [compiler, "-O1", "-g", "-std=c++17", "-pthread", f"-fsanitize={sanitizers}", "-fno-sanitize-recover=all"]

    def build(source: Path) -> str:
        target = str(tmp_path / f"{source.stem}.o")
        command = [*common, f"-I{CSRC}", *FLAGS.get(source.stem, []), "-c", str(source), "-o", target]
        subprocess.run(command, check=True, timeout=600)
        return target

    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(build, [*CSRC.glob("*.cpp"), DRIVER]))
    driver = str(tmp_path / "driver")
    subprocess.run([*common, *objects, "-o", driver, "-ldl"], check=True, timeout=120)
    done = subprocess.run([driver, str(calls), "11", str(threads)], capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{calls} calls of each kind on {', '.join(engine.isas())}, 0 failures" in done.stdout
