"""Compares a wheel with the tree it was built from: ``python wheel_contents.py WHEEL TREE`` lists the wheel, and fails
if a module of the tree is missing from it or one is in it that the tree does not hold."""

from __future__ import annotations

import sys
import zipfile
from pathlib import Path

# Where each folder of the tree lies in the package.
FLOORS = {
    "src/fusemesh": "fusemesh",
    "kernels": "fusemesh/kernels",
    "hybrid": "fusemesh/hybrid",
    "csrc": "fusemesh/csrc",
}
ENGINE = "fusemesh/csrc/libfusemesh.so"


def expected(tree: Path) -> set[str]:
    """Files of ``tree`` that a wheel holds, by their names in it: modules, tables, marker of types, the engine."""
    files = set()
    for folder, package in FLOORS.items():
        for path in (tree / folder).rglob("*"):
            if path.suffix in (".py", ".json", ".cpp", ".h") or path.name == "py.typed":
                files.add(f"{package}/{path.relative_to(tree / folder).as_posix()}")
    return files


def contents(wheel: Path) -> set[str]:
    """Files of the wheel, its metadata left out."""
    with zipfile.ZipFile(wheel) as archive:
        return {name for name in archive.namelist() if ".dist-info/" not in name}


def compare(wheel: Path, tree: Path) -> list[str]:
    """What is wrong with the wheel, a line for each file."""
    has, wants = contents(wheel), expected(tree)
    is_any = wheel.stem.endswith("py3-none-any")
    return [
        *([f"tagged for every platform but with {ENGINE}"] if is_any and ENGINE in has else []),
        *([f"tagged for one platform but without {ENGINE}"] if not is_any and ENGINE not in has else []),
        *(f"missing from the wheel: {name}" for name in sorted(wants - has)),
        *(f"in the wheel but not in the tree: {name}" for name in sorted(has - wants - {ENGINE})),
    ]


def main() -> int:
    wheel, tree = Path(sys.argv[1]), Path(sys.argv[2])
    for name in sorted(contents(wheel)):
        print(name)
    problems = compare(wheel, tree)
    print(*problems, sep="\n", end="\n" if problems else "")
    modules = sum(name.endswith(".py") for name in expected(tree))
    print(f"{wheel.name}: {'WRONG' if problems else 'complete'}, the tree has {modules} modules")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
