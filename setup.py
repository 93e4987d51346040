"""Build of FuseMesh: maps the floors of the tree onto one package and compiles the CPU engine.

Metadata lives in pyproject.toml. This file holds only what needs code: the mapping of the top-level folders to
``fusemesh.kernels``, ``fusemesh.hybrid`` and ``fusemesh.csrc``, and the build of the C++ engine as a plain shared
library that includes neither Python's nor PyTorch's headers, so that one build serves every version of both.

Environment of the build: ``CXX``, ``CXXFLAGS`` and ``LDFLAGS`` as usual; ``FUSEMESH_NO_ENGINE=1`` leaves the engine
out. Without a C++ compiler it is left out too, the package installs all the same, and ``fusemesh doctor`` says what is
lost. A compiler that is there and fails stops the build.
"""

import hashlib
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import ClassVar

from setuptools import Command, Distribution, find_packages, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build import build

FLOORS = {"fusemesh.kernels": "kernels", "fusemesh.hybrid": "hybrid"}
ENGINE = "libfusemesh.so"
SOURCES = sorted(str(path) for path in Path("csrc").rglob("*") if path.suffix in (".cpp", ".h"))
FLAGS = ["-O3", "-std=c++17", "-fPIC", "-fvisibility=hidden", "-pthread", "-Icsrc"]
# Each instruction set's code is a file of its own; a compiler that does not know the flags leaves it empty.
AVX2 = ["-mavx2", "-mfma", "-mf16c"]
AVX512 = [*AVX2, "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mprefer-vector-width=512"]
ISA_FLAGS = {"isa_avx2.cpp": AVX2, "isa_avx512.cpp": AVX512, "isa_avx512_bf16.cpp": [*AVX512, "-mavx512bf16"]}
LIBRARIES = ["-ldl"] if sys.platform == "linux" else []


def find_compiler() -> "tuple[list[str] | None, str]":
    """The C++ compiler's command, or None and the reason why there is none."""
    if os.environ.get("FUSEMESH_NO_ENGINE", "0") not in ("", "0"):
        return None, "FUSEMESH_NO_ENGINE is set"
    if sys.platform == "win32":
        return None, "the engine is not built on Windows"
    chosen = shlex.split(os.environ.get("CXX", ""))
    if chosen:
        if shutil.which(chosen[0]) is None:
            raise SystemExit(
                f"CXX: expected a C++ compiler, received {chosen[0]!r}, which is not found; correct or unset it"
            )
        return chosen, ""
    for name in ("g++", "c++", "clang++"):
        if shutil.which(name):
            return [name], ""
    return None, "no C++ compiler was found (looked for g++, c++, clang++ and $CXX)"


COMPILER, WHY_NO_ENGINE = find_compiler()


def flags_of(unit: str) -> "list[str]":
    """The flags of an instruction set's file, none where the compiler refuses them; the file is empty without."""
    flags = ISA_FLAGS.get(Path(unit).name, [])
    if not flags:
        return []
    probe = [*COMPILER, *flags, "-x", "c++", "-fsyntax-only", os.devnull]
    return flags if subprocess.run(probe, capture_output=True).returncode == 0 else []


def run(command: "list[str]") -> None:
    """Run the compiler; its failure ends the build."""
    result = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    print("fusemesh:", shlex.join(command), result.stdout, sep="\n", end="")
    if result.returncode != 0:
        raise SystemExit(
            f"fusemesh: the C++ compiler failed on the CPU engine (above):\n{result.stdout[-2000:]}\n"
            "Choose another with CXX=..., or install without the engine with FUSEMESH_NO_ENGINE=1"
        )


class BuildEngine(Command):
    """Compiles csrc/*/*.cpp into one shared library: in the source tree for editable installs, else in build/."""

    description = "compile the CPU engine"
    user_options: ClassVar[list] = []
    editable_mode = False

    def initialize_options(self):
        self.build_lib = None

    def finalize_options(self):
        self.set_undefined_options("build_py", ("build_lib", "build_lib"))

    def run(self):
        in_tree = Path("csrc", ENGINE)
        target = in_tree if self.editable_mode else Path(self.build_lib, "fusemesh", "csrc", ENGINE)
        if COMPILER is None:
            if self.editable_mode:
                in_tree.unlink(missing_ok=True)
            print(f"fusemesh: installing without the CPU engine: {WHY_NO_ENGINE}", file=sys.stderr)
            return
        target.parent.mkdir(parents=True, exist_ok=True)
        digest = hashlib.sha256(b"".join(Path(source).read_bytes() for source in SOURCES)).hexdigest()[:16]
        flags = [*FLAGS, f'-DFM_VERSION="{self.distribution.get_version()}"', f'-DFM_SOURCES="{digest}"']
        flags += shlex.split(os.environ.get("CXXFLAGS", ""))
        # Written beside and renamed, so that a process that has the old library open keeps it whole.
        fresh = target.with_suffix(f".{os.getpid()}.tmp")
        with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(os.cpu_count()) as pool:
            units = [source for source in SOURCES if source.endswith(".cpp")]
            objects = [str(Path(folder, Path(unit).stem + ".o")) for unit in units]
            commands = [
                [*COMPILER, *flags, *flags_of(unit), "-c", unit, "-o", built]
                for unit, built in zip(units, objects, strict=True)
            ]
            # The largest first, so that the last one to end has not begun last.
            for _ in pool.map(run, reversed(commands)):
                pass
            links = shlex.split(os.environ.get("LDFLAGS", ""))
            run([*COMPILER, *flags, "-shared", *objects, "-o", str(fresh), *links, *LIBRARIES])
        os.replace(fresh, target)

    def get_source_files(self):
        return list(SOURCES)

    def get_outputs(self):
        return [] if COMPILER is None else [str(Path(self.build_lib, "fusemesh", "csrc", ENGINE))]

    def get_output_mapping(self):
        # In an editable install the library stands in the source tree.
        return {output: f"csrc/{ENGINE}" for output in self.get_outputs()} if self.editable_mode else {}


class Build(build):
    """The usual steps, then the engine."""

    sub_commands: ClassVar[list] = [*build.sub_commands, ("build_engine", None)]

    def run(self):
        # Modules deleted from the tree since the last build would come back from here.
        for folder in Path(self.build_base).glob("lib*"):
            shutil.rmtree(folder)
        super().run()


class EngineDistribution(Distribution):
    """With the engine, a package for one platform."""

    def has_ext_modules(self):
        return COMPILER is not None


class Wheel(bdist_wheel):
    """Tags the wheel py3-none-<platform> with the engine, py3-none-any without."""

    def get_tag(self):
        return ("py3", "none", super().get_tag()[2])


packages = ["fusemesh", *(f"fusemesh.{name}" for name in find_packages("src/fusemesh")), "fusemesh.csrc"]
for package, folder in FLOORS.items():
    packages += [package, *(f"{package}.{name}" for name in find_packages(folder))]

setup(
    packages=packages,
    package_dir={"fusemesh": "src/fusemesh", "fusemesh.csrc": "csrc", **FLOORS},
    package_data={
        "fusemesh": ["py.typed"],
        "fusemesh.csrc": ["*/*.cpp", "*/*.h"],
        "fusemesh.hybrid.planner": ["*.json"],
    },
    distclass=EngineDistribution,
    cmdclass={"build": Build, "build_engine": BuildEngine, "bdist_wheel": Wheel},
)
