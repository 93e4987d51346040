"""Layer: packaging, long sweep. The package installed into fresh environments, as its users would: under other Pythons
without torch, with torch and Hugging Face's `kernels` beside it, editable, and seen by the type checker."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.packaging_tree import ROOT, copy_tree, has_compiler, run

pytestmark = pytest.mark.slow

PIP = ("-m", "pip", "--disable-pip-version-check", "-q")

# The engine through ctypes and numpy, against the formula in fp64, in a process without torch.
ENGINE_WITHOUT_TORCH = """
import importlib.util, sys
import numpy as np
import fusemesh
from fusemesh.kernels import engine

assert importlib.util.find_spec("torch") is None
assert "site-packages" in fusemesh.__file__, fusemesh.__file__
assert engine.why_unavailable() is None, engine.why_unavailable()
draw = np.random.default_rng(0)
shapes = ((2, 4, 17, 24), (2, 2, 113, 24), (2, 2, 113, 24))
q, k, v = (draw.standard_normal(shape, dtype=np.float32) for shape in shapes)
out, lse = engine.attention(q, k, v, window=(None, 0), origin=(96, 0))
q, k, v = q.astype(np.float64), k.repeat(2, 1).astype(np.float64), v.repeat(2, 1)
s = q @ k.swapaxes(-1, -2) / np.sqrt(24)
s = np.where(np.arange(113) <= np.arange(17)[:, None] + 96, s, -np.inf)
p = np.exp(s)
assert np.abs(out - p / p.sum(-1, keepdims=True) @ v).max() < 2e-6
assert np.abs(lse - np.log(p.sum(-1))).max() < 2e-6
print(fusemesh.__version__, engine.build_info()["sources"], "%d.%d" % sys.version_info[:2])
"""


def find_python(version: str) -> Path | None:
    """An interpreter of this version: on PATH, or installed by pyenv."""
    candidates = [Path(found)] if (found := shutil.which(f"python{version}")) else []
    candidates += sorted(Path.home().glob(f".pyenv/versions/{version}.*/bin/python"))
    for candidate in candidates:
        # pyenv's shims stand on PATH for versions that are not switched on, and then only say so.
        code = "import sys, venv; print('%d.%d' % sys.version_info[:2])"
        result = subprocess.run([candidate, "-c", code], capture_output=True, text=True)
        if result.returncode == 0 and result.stdout.strip() == version:
            return candidate
    return None


def environment(folder: Path, python: Path | str = sys.executable) -> Path:
    """Make a fresh environment; return its Python."""
    run(python, "-m", "venv", folder, cwd=folder.parent)
    return folder / "bin" / "python"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built by this Python, with pip's build isolation, so with neither torch nor numpy in sight."""
    folder = tmp_path_factory.mktemp("wheel")
    run(sys.executable, *PIP, "wheel", "--no-deps", "-w", folder, copy_tree(folder / "tree"), cwd=folder)
    (built,) = folder.glob("*.whl")
    return built


@pytest.mark.skipif(not has_compiler(), reason="no C++ compiler on this machine")
@pytest.mark.parametrize("version", ["3.10", "3.11", "3.12", "3.13"])
def test_engine_on_each_python(version: str, wheel: Path, tmp_path: Path) -> None:
    """Builds and runs without torch; and a wheel that another Python built runs as it is."""
    interpreter = find_python(version)
    if interpreter is None:
        pytest.skip(f"there is no Python {version} on this machine")
    python = environment(tmp_path / "env", interpreter)
    run(python, *PIP, "wheel", "--no-deps", "-w", "dist", copy_tree(tmp_path / "tree"), cwd=tmp_path)
    (own,) = (tmp_path / "dist").glob("*.whl")
    assert own.name == wheel.name, "every Python builds a wheel of the same name"
    run(python, *PIP, "install", "-c", ROOT / "constraints.txt", "numpy", cwd=tmp_path)
    for built in (own, wheel):
        run(python, *PIP, "install", "--no-deps", "--force-reinstall", built, cwd=tmp_path)
        output = run(python, "-c", ENGINE_WITHOUT_TORCH, cwd=tmp_path).stdout.split()
        assert output[0] == "0.1.0"
        assert output[2] == version


@pytest.mark.parametrize("version", ["3.10", "3.11", "3.12", "3.13"])
def test_constraints_can_be_met(version: str, tmp_path: Path) -> None:
    """Every pinned version exists for every Python, and pip finds the pins and our bounds compatible."""
    interpreter = find_python(version)
    if interpreter is None:
        pytest.skip(f"there is no Python {version} on this machine")
    python = environment(tmp_path / "env", interpreter)
    command = ("-m", "pip", "--disable-pip-version-check", "install", "--dry-run", "-c", ROOT / "constraints.txt")
    tree = copy_tree(tmp_path / "tree")
    output = run(python, *command, f"{tree}[app,mpi,test,lint]", cwd=tmp_path, timeout=1800).stdout
    (found,) = (line for line in output.splitlines() if line.startswith("Would install"))
    for pin in re.findall(r"^[a-z-]+==[0-9.]+", (ROOT / "constraints.txt").read_text(), re.MULTILINE):
        name, number = pin.split("==")
        if len(re.findall(rf"^{name}==", (ROOT / "constraints.txt").read_text(), re.MULTILINE)) == 1:
            assert f"{name}-{number}" in found, (pin, found)


def test_install_with_torch_beside_hugging_face_kernels(tmp_path: Path) -> None:
    """`pip install .` outside the clone: the public names, `fusemesh doctor`, and a package called kernels intact."""
    python = environment(tmp_path / "env")
    tree = copy_tree(tmp_path / "tree")
    run(python, *PIP, "install", "-c", ROOT / "constraints.txt", "kernels", tree, cwd=tmp_path, timeout=1800)
    shutil.rmtree(tree)
    run(python, "-c", "import fusemesh; fusemesh.flash_attention", cwd=tmp_path)
    code = """
import importlib.metadata, kernels, fusemesh.kernels.backends, fusemesh.hybrid
assert callable(kernels.get_kernel) and kernels.__version__ == importlib.metadata.version("kernels")
assert kernels is not fusemesh.kernels
import torch
x = torch.randn(1, 2, 33, 16)
names = ("reference", "torch") + (("cpu",) if fusemesh.kernels.backends.why_unavailable("cpu", "cpu") is None else ())
for name in names:
    torch.testing.assert_close(fusemesh.flash_attention(x, x, x, backend=name), fusemesh.flash_attention(x, x, x))
print(*names)
"""
    assert ("cpu" in run(python, "-c", code, cwd=tmp_path).stdout) == has_compiler()
    doctor = run(tmp_path / "env" / "bin" / "fusemesh", "doctor", cwd=tmp_path).stdout
    assert "fusemesh" in doctor
    assert "cpu" in doctor
    run(python, *PIP, "uninstall", "-y", "fusemesh", cwd=tmp_path)
    run(python, "-c", "import kernels; kernels.get_kernel", cwd=tmp_path)


@pytest.mark.skipif(not has_compiler(), reason="no C++ compiler on this machine")
@pytest.mark.parametrize("mode", ["lenient", "strict"])
def test_editable_installs(mode: str, tmp_path: Path) -> None:
    """The engine stands in the tree, is built anew from changed sources, and goes when it is not wanted."""
    python = environment(tmp_path / "env")
    tree = copy_tree(tmp_path / "tree")
    settings = ("--config-settings", "editable_mode=strict") if mode == "strict" else ()
    install = (python, *PIP, "install", "--no-deps", *settings, "-e", tree)
    ask = "from fusemesh.kernels import engine; print(engine.why_unavailable() or engine.build_info()['sources'])"

    run(*install, cwd=tmp_path)
    first = run(python, "-c", ask, cwd=tmp_path).stdout.strip()
    assert re.fullmatch("[0-9a-f]{16}", first)
    assert (tree / "csrc" / "libfusemesh.so").exists()
    with (tree / "csrc" / "abi" / "api.cpp").open("a") as source:
        source.write("// changed\n")
    run(*install, cwd=tmp_path)
    second = run(python, "-c", ask, cwd=tmp_path).stdout.strip()
    assert re.fullmatch("[0-9a-f]{16}", second)
    assert second != first
    run(*install, cwd=tmp_path, FUSEMESH_NO_ENGINE="1")
    assert "this installation has no CPU engine" in run(python, "-c", ask, cwd=tmp_path).stdout
    assert not (tree / "csrc" / "libfusemesh.so").exists()


def test_type_checker_sees_every_floor(tmp_path: Path) -> None:
    """`make lint` would find an error planted in any of the folders that make the package."""
    tree = copy_tree(tmp_path / "tree")
    shutil.copy(ROOT / "Makefile", tree)
    planted = {
        "src/fusemesh/cli.py": "cli.py",
        "kernels/backends.py": "kernels/backends.py",
        "hybrid/layout.py": "hybrid/layout.py",
    }
    for source in planted:
        with (tree / source).open("a") as file:
            file.write("\n\nPLANTED: int = 'not a number'\n")
    target = tmp_path / "types"
    run(sys.executable, *PIP, "install", "--no-deps", "--target", target, tree, cwd=tree, FUSEMESH_NO_ENGINE="1")
    with pytest.raises(AssertionError) as error:
        run(sys.executable, "-m", "mypy", "-p", "fusemesh", cwd=tree, MYPYPATH=str(target))
    found = re.findall(r'fusemesh/(\S+?):\d+: error: Incompatible types in assignment.*"str".*"int"', str(error.value))
    assert sorted(found) == sorted(planted.values())
