"""Layer: packaging. What is built from the tree: wheels with and without the engine, the source distribution, what is
said where something is missing, and the empty shells that keep the clone's folders out of other packages' way.

Installations into fresh environments, which take minutes, are in tests/packaging/test_installation.py.
"""

from __future__ import annotations

import email
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import pytest

from tests.support.packaging_tree import BUILD_FILES, ROOT, compiler_found, copy_tree, has_compiler, run

sys.path.insert(0, str(ROOT / "tests" / "packaging"))
from tests.packaging import wheel_contents

NO_ENGINE = {"FUSEMESH_NO_ENGINE": "1"}
# A compiler that preprocesses each source into its object, and links nothing.
PARSER = """#!/bin/sh
case " $* " in
*" -shared "*) while [ "$1" != -o ]; do shift; done; : > "$2" ;;
*" -fsyntax-only "*) exec COMPILER "$@" ;;
*) exec COMPILER -E "$@" ;;
esac
"""


def build(tree: Path, kind: str = "wheel", **environment: str) -> tuple[Path, str]:
    """Build ``tree`` by its own backend in this environment; return the archive and what was printed."""
    # What is tested is what is built, not how fast it runs.
    environment["CXXFLAGS"] = f"{environment.get('CXXFLAGS', '')} -O0"
    code = f"from setuptools import build_meta; print(build_meta.build_{kind}('dist'))"
    output = run(sys.executable, "-c", code, cwd=tree, **environment)
    return tree / "dist" / output.stdout.split()[-1], output.stdout + output.stderr


def metadata(wheel: Path, name: str) -> email.message.Message:
    with zipfile.ZipFile(wheel) as archive:
        (path,) = (path for path in archive.namelist() if path.endswith(f".dist-info/{name}"))
        return email.message_from_bytes(archive.read(path))


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    return copy_tree(tmp_path / "tree")


@pytest.mark.skipif(not has_compiler(), reason="no C++ compiler on this machine")
def test_wheel_with_engine(tree: Path) -> None:
    """Complete, tagged for this platform, and compiled with the flags of the environment."""
    wheel, output = build(tree, CXXFLAGS="-DFROM_CXXFLAGS", LDFLAGS="-Wl,-O1")
    assert "-DFROM_CXXFLAGS" in output
    assert "-Wl,-O1" in output
    assert wheel_contents.compare(wheel, tree) == []
    assert wheel_contents.ENGINE in wheel_contents.contents(wheel)
    tag = wheel.name.removesuffix(".whl").split("-", 2)[2]
    assert tag.startswith("py3-none-")
    assert tag != "py3-none-any"
    assert metadata(wheel, "WHEEL").get_all("Tag") == [tag]
    assert metadata(wheel, "WHEEL")["Root-Is-Purelib"] == "false"


@pytest.mark.parametrize("way", ["asked for", "no compiler"])
def test_wheel_without_engine(tree: Path, tmp_path: Path, way: str) -> None:
    """Such a wheel fits every platform, holds no engine left over from an earlier build, and says what it lacks."""
    (tree / "csrc" / "libfusemesh.so").write_bytes(b"an editable installation's engine")
    empty = tmp_path / "empty"
    empty.mkdir()
    wheel, output = build(tree, **(NO_ENGINE if way == "asked for" else {"PATH": str(empty), "CXX": ""}))
    reason = {"asked for": "FUSEMESH_NO_ENGINE is set", "no compiler": "no C++ compiler was found"}[way]
    assert f"installing without the CPU engine: {reason}" in output
    assert wheel.name.endswith("-py3-none-any.whl")
    assert wheel_contents.compare(wheel, tree) == []
    assert wheel_contents.ENGINE not in wheel_contents.contents(wheel)
    if way == "no compiler":
        return  # the same files, as was just compared

    site = tmp_path / "site"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    code = """
import torch, fusemesh
from fusemesh.kernels import backends
print(fusemesh.__file__)
print(backends.why_unavailable("cpu", "cpu"))
x = torch.randn(1, 2, 8, 16)
expected = fusemesh.flash_attention(x, x, x, backend="reference")
print(torch.allclose(fusemesh.flash_attention(x, x, x), expected, atol=1e-5))
try:
    fusemesh.flash_attention(x, x, x, backend="cpu")
except ValueError as error:
    print(error)
"""
    lines = run(sys.executable, "-c", code, cwd=tmp_path, PYTHONPATH=str(site)).stdout.splitlines()
    assert lines[0].startswith(str(site)), "the extracted wheel was meant to be imported"
    assert "no CPU engine, because it was made without a C++ compiler" in lines[1]
    assert lines[2] == "True"
    assert lines[3].startswith("backend='cpu' cannot run here: this installation has no CPU engine")


@pytest.mark.parametrize(
    ("compiler", "expected"),
    [
        ("a-compiler-that-is-not-there", "CXX: expected a C++ compiler, received 'a-compiler-that-is-not-there'"),
        ("false", "the C++ compiler failed on the CPU engine"),
    ],
)
def test_compiler_that_cannot_do_it_stops_the_build(tree: Path, compiler: str, expected: str) -> None:
    with pytest.raises(AssertionError) as error:
        build(tree, CXX=compiler)
    assert expected in str(error.value)
    assert not (tree / "dist").exists() or not list((tree / "dist").glob("*.whl"))


def test_deleted_modules_do_not_come_back(tree: Path) -> None:
    """The build folder outlives builds; what it holds must not reach the next wheel."""
    gone = tree / "kernels" / "gone.py"
    gone.write_text("")
    wheel, _ = build(tree, **NO_ENGINE)
    assert wheel_contents.compare(wheel, tree) == []
    assert "fusemesh/kernels/gone.py" in wheel_contents.contents(wheel)
    gone.unlink()
    wheel, _ = build(tree, **NO_ENGINE)
    assert wheel_contents.compare(wheel, tree) == []


def test_source_distribution_builds_the_same_wheel(tree: Path, tmp_path: Path) -> None:
    (tree / "csrc" / "libfusemesh.so").write_bytes(b"an editable installation's engine")
    archive, _ = build(tree, "sdist")
    # Some of Python's 3.10 and 3.11 know no filter yet.
    options: dict[str, Any] = {"filter": "data"} if hasattr(tarfile, "data_filter") else {}
    with tarfile.open(archive) as tar:
        tar.extractall(tmp_path / "unpacked", **options)
    (unpacked,) = (tmp_path / "unpacked").iterdir()
    for name in BUILD_FILES:
        assert (unpacked / name).exists(), f"{name} is missing from the source distribution"
    assert not list(unpacked.rglob("*.so"))
    # Parsed and not compiled: a header that is missing stops the build as it would a compiler's.
    compiler = tmp_path / "c++"
    compiler.write_text(PARSER.replace("COMPILER", compiler_found() or ""))
    compiler.chmod(0o755)
    wheel, _ = build(unpacked, **({"CXX": str(compiler)} if has_compiler() else {}))
    assert wheel_contents.compare(wheel, tree) == []
    assert has_compiler() == (wheel_contents.ENGINE in wheel_contents.contents(wheel))


def test_metadata(tree: Path) -> None:
    wheel, _ = build(tree, **NO_ENGINE)
    message = metadata(wheel, "METADATA")
    requires = message.get_all("Requires-Dist") or []
    assert 'triton>=3.6; platform_system == "Linux"' in requires
    assert "torch>=2.11" in requires
    assert message["License-Expression"] == "Apache-2.0"
    assert message.get_all("License-File") == ["LICENSE"]
    assert message["Requires-Python"] == ">=3.10"
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith("/LICENSE"))
        assert b"Apache License" in archive.read(name)
        assert len(archive.read(name)) > 10_000, "the full text"


def test_importing_needs_neither_torch_nor_triton(tmp_path: Path) -> None:
    code = """
import sys
sys.modules.update(torch=None, triton=None)
import fusemesh, fusemesh.kernels, fusemesh.kernels.engine, fusemesh.hybrid, fusemesh.csrc
print(fusemesh.__version__)
"""
    assert run(sys.executable, "-c", code, cwd=tmp_path).stdout.strip() == "0.1.0"


@pytest.mark.parametrize("way", ["python -c", pytest.param("python -m pytest", marks=pytest.mark.slow)])
def test_hugging_face_model_from_the_root_of_the_clone(way: str) -> None:
    """transformers looks for a package called `kernels` by importing it; here it meets our folder's empty shell."""
    script = "tests/packaging/hugging_face_model.py"
    if way == "python -c":
        code = f"import runpy; import kernels; runpy.run_path({script!r}, run_name='__main__')"
        assert run(sys.executable, "-c", code, cwd=ROOT).stdout.strip().endswith("fine")
    else:
        options = ("-q", "-p", "no:cacheprovider", "-p", "no:xdist")
        assert "2 passed" in run(sys.executable, "-m", "pytest", *options, script, cwd=ROOT).stdout


def test_what_building_leaves_behind_is_ignored() -> None:
    if shutil.which("git") is None or not (ROOT / ".git").exists():
        pytest.skip("not a git clone")
    built = [
        "csrc/libfusemesh.so",
        "build/lib/fusemesh/x.py",
        "fusemesh.egg-info/PKG-INFO",
        ".venv/x",
        ".venvs/x",
        "dist/x.whl",
    ]
    ignored = subprocess.run(
        ["git", "check-ignore", *built], cwd=ROOT, capture_output=True, text=True, env=dict(os.environ)
    )
    assert ignored.stdout.split() == built
