"""Layer: source text and one fresh process. Dependencies point downwards: tests -> fusemesh -> hybrid -> kernels."""

from __future__ import annotations

import ast
import sys
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path

import pytest

from tests.support import fresh_process

ROOT = Path(__file__).resolve().parent.parent
FLOORS = {"src/fusemesh": "fusemesh", "hybrid": "fusemesh.hybrid", "kernels": "fusemesh.kernels"}
# What may not be imported from a floor: everything above it.
ABOVE = {"fusemesh": (), "fusemesh.hybrid": ("fusemesh",), "fusemesh.kernels": ("fusemesh", "fusemesh.hybrid")}
# Third-party packages of the lower floors; the application's are the extras of pyproject.toml.
THIRD_PARTY = {
    "fusemesh.hybrid": {"torch", "numpy", "safetensors", "mpi4py"},
    "fusemesh.kernels": {"torch", "triton", "numpy"},
}
LEAVES = ("fusemesh.kernels.env", "fusemesh.kernels.attention.call.spec")


def modules() -> dict[str, Path]:
    """Every module of the package by its full name."""
    found = {}
    for folder, package in FLOORS.items():
        for path in (ROOT / folder).rglob("*.py"):
            parts = path.relative_to(ROOT / folder).with_suffix("").parts
            found[".".join([package, *(part for part in parts if part != "__init__")])] = path
    return found


MODULES = modules()


def floor_of(module: str) -> str:
    """The floor that a module stands on; csrc counts as kernels, whose engine it holds."""
    for floor in ("fusemesh.hybrid", "fusemesh.kernels"):
        if module == floor or module.startswith(floor + "."):
            return floor
    if module == "fusemesh.csrc" or module.startswith("fusemesh.csrc."):
        return "fusemesh.kernels"
    return "fusemesh"


def imports(module: str, source: str, is_package: bool, at: str = "") -> Iterator[tuple[str, bool, int]]:
    """Yield (imported module, whether relative, line) for every import: absolute, relative, or by a literal name.

    ``from package import name`` yields ``package.name``, which may be a module or an attribute of one. ``at`` leaves
    out those for type checkers, and with "import time" those in functions too; "any time" keeps these.
    """
    tree = ast.parse(source)
    nodes = _that_run(tree, in_functions=at == "any time") if at else ast.walk(tree)
    package = module.split(".") if is_package else module.split(".")[:-1]
    for node in nodes:
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, False, node.lineno
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            base = [*base, *(node.module.split(".") if node.module else [])]
            for alias in node.names:
                yield ".".join([*base, alias.name]), node.level > 0, node.lineno
        elif isinstance(node, ast.Call):
            name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            first = node.args[0] if node.args else None
            if name in ("import_module", "__import__") and isinstance(first, ast.Constant):
                # import_module(".name", __package__)
                relative = str(first.value).startswith(".")
                yield (
                    ".".join([*package, str(first.value)[1:]]) if relative else str(first.value),
                    relative,
                    node.lineno,
                )


def _that_run(tree: ast.AST, in_functions: bool) -> Iterator[ast.AST]:
    """Yield the nodes that run, in functions only if so asked; never those for type checkers."""
    for node in ast.iter_child_nodes(tree):
        if not in_functions and isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            continue
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            continue
        yield node
        yield from _that_run(node, in_functions)


def arrows_up(module: str, source: str, is_package: bool = False) -> list[str]:
    """Imports of a module that point upwards, cross floors relatively, or reach a package its floor may not use."""
    floor, wrong = floor_of(module), []
    for target, relative, line in imports(module, source, is_package):
        root = target.partition(".")[0]
        where = f"{module}:{line} imports {target}"
        if root == "fusemesh":
            target_floor = "fusemesh" if target == "fusemesh" else floor_of(target)
            if target_floor in ABOVE[floor]:
                wrong.append(f"{where}: {floor} stands below {target_floor}")
            elif relative and target_floor != floor:
                wrong.append(f"{where}: relative across floors, write it absolutely")
            elif not relative and target_floor == floor and floor != "fusemesh":
                wrong.append(f"{where}: absolute inside a floor, write it relatively")
        elif floor in THIRD_PARTY and root not in sys.stdlib_module_names and root not in THIRD_PARTY[floor]:
            wrong.append(f"{where}: {floor} may use only {sorted(THIRD_PARTY[floor])}")
    return wrong


@pytest.mark.parametrize("module", sorted(MODULES))
def test_imports_point_down(module: str) -> None:
    path = MODULES[module]
    assert arrows_up(module, path.read_text(), path.name == "__init__.py") == []


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("fusemesh.kernels.attention.dense.api", "import fusemesh.hybrid.layout"),
        ("fusemesh.kernels.attention.dense.api", "from fusemesh.hybrid import layout"),
        ("fusemesh.kernels.attention.dense.api", "from fusemesh import hybrid"),
        ("fusemesh.kernels.attention.dense.api", "import fusemesh"),
        ("fusemesh.kernels.attention.dense.api", "from ....hybrid import layout"),
        ("fusemesh.kernels.attention.dense.api", "from .... import transformer"),
        (
            "fusemesh.kernels.attention.dense.api",
            "def f():\n    if True:\n        from fusemesh.run.trainer import fit",
        ),
        ("fusemesh.kernels.attention.dense.api", "import importlib\nimportlib.import_module('fusemesh.run.trainer')"),
        ("fusemesh.kernels.attention.dense.api", "from fusemesh.kernels import backends"),
        ("fusemesh.kernels.attention.dense.api", "import tqdm"),
        ("fusemesh.hybrid.apply", "from fusemesh import Transformer"),
        ("fusemesh.hybrid.apply", "from fusemesh.run.trainer import train"),
        ("fusemesh.hybrid.apply", "from ..kernels import backends"),
        ("fusemesh.hybrid.apply", "from .. import cli"),
        ("fusemesh.hybrid.apply", "def f():\n    import triton"),
        ("fusemesh.run.trainer", "from ..hybrid import layout"),
    ],
)
def test_the_check_finds_planted_arrows(module: str, source: str) -> None:
    assert len(arrows_up(module, source)) == 1


@pytest.mark.parametrize(
    ("module", "source"),
    [
        (
            "fusemesh.kernels.attention.dense.api",
            "from ... import backends\nfrom ..call.spec import Origin\nimport torch, math",
        ),
        ("fusemesh.kernels.attention.engine.dense", "def f():\n    from ..engine import library"),
        ("fusemesh.hybrid.apply", "from fusemesh.kernels import backends\nfrom .layout import Layout"),
        ("fusemesh.run.trainer", "from fusemesh.hybrid.layout import Layout\nfrom . import metrics\nimport tqdm"),
    ],
)
def test_the_check_allows_what_is_right(module: str, source: str) -> None:
    assert arrows_up(module, source) == []


TESTING = ("fusemesh.kernels.testing", "fusemesh.hybrid.ranks.testing")
MEASURING = "fusemesh.kernels.measure"
PROVING = "fusemesh.kernels.proof"
EMULATING = ("fusemesh.kernels.emulator", "fusemesh.kernels.aot")


def within(module: str, packages: tuple[str, ...]) -> bool:
    """Return whether a module is one of ``packages``, or stands in one."""
    return any(module == package or module.startswith(package + ".") for package in packages)


def imports_of_tools(module: str, source: str, is_package: bool) -> list[str]:
    """Return the imports of testing tools by a module that is not one, and of measuring tools by one that computes.

    Measuring checks a result before it is timed, and a proof before it is handed out, so both may use the tools for
    tests. The application's commands measure. The emulator, and the command that emulates, are tools themselves.
    """
    wrong = []
    for target, _, line in imports(module, source, is_package):
        if within(target, TESTING) and not within(module, (*TESTING, MEASURING, PROVING)):
            wrong.append(f"{module}:{line} imports {target}")
        if floor_of(module) == "fusemesh":
            continue
        if within(target, (MEASURING,)) and not within(module, (MEASURING, EMULATING[0])):
            wrong.append(f"{module}:{line} imports {target}")
        if within(target, EMULATING[:1]) and not within(module, EMULATING):
            wrong.append(f"{module}:{line} imports {target}")
    return wrong


@pytest.mark.parametrize("module", sorted(MODULES))
def test_production_imports_no_tools(module: str) -> None:
    path = MODULES[module]
    assert imports_of_tools(module, path.read_text(), path.name == "__init__.py") == []


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("fusemesh.kernels.aot", "from .testing import budget"),
        ("fusemesh.kernels.aot", "from . import testing"),
        ("fusemesh.kernels.runtime.launch", "def f():\n    from ..testing.poison import surround"),
        ("fusemesh.kernels.testing.budget", "from ..measure import timing"),
        ("fusemesh.kernels.proof.first_use", "from ..measure import standard"),
        ("fusemesh.kernels.aot", "from .measure import timing"),
        ("fusemesh.kernels.runtime.launch", "from ..emulator import emulate"),
        ("fusemesh.hybrid.planner.measure", "from fusemesh.kernels.measure import time_call"),
        ("fusemesh.run.trainer", "from fusemesh.hybrid.ranks import testing"),
    ],
)
def test_the_check_finds_planted_imports_of_tools(module: str, source: str) -> None:
    assert len(imports_of_tools(module, source, False)) == 1


IMPLEMENTATIONS = ("reference", "engine", "gpu", "hopper")


def family(module: str) -> str | None:
    """Which of the implementations that must not know each other a module belongs to: a folder of floor 1."""
    if not module.startswith("fusemesh.kernels."):
        return None
    parts = module.split(".")[2:]
    return next((part for part in parts if part in IMPLEMENTATIONS and len(parts) > 1), None)


def reachable(module: str, at: str = "") -> set[str]:
    """Our modules that ``module`` imports, directly or not; packages themselves are passed over."""
    seen: set[str] = set()
    pending = [module]
    while pending:
        current = pending.pop()
        path = MODULES[current]
        for target, _, _ in imports(current, path.read_text(), path.name == "__init__.py", at):
            for name in (target, target.rpartition(".")[0]):
                if name in MODULES and MODULES[name].name != "__init__.py" and name not in seen:
                    seen.add(name)
                    pending.append(name)
    return seen


@pytest.mark.parametrize("module", sorted(name for name in MODULES if family(name)))
def test_implementations_do_not_know_each_other(module: str) -> None:
    """Not even through a third module: a reference that shares code with what it judges judges nothing."""
    others = {name for name in reachable(module) if family(name) not in (None, family(module))}
    assert others == set()
    path = MODULES[module]
    direct = {target for target, _, _ in imports(module, path.read_text(), False)}
    assert {name for name in direct if family(name) not in (None, family(module))} == set()


@pytest.mark.parametrize("module", LEAVES)
def test_leaves_import_nothing_of_ours(module: str) -> None:
    targets = [target for target, _, _ in imports(module, MODULES[module].read_text(), False)]
    assert targets and not [target for target in targets if target.startswith("fusemesh")]


TORCH_ONLY = sorted(
    name
    for name in MODULES
    if name.startswith("fusemesh.kernels.")
    and (name.rpartition(".")[2] in ("api", "ops", "parallel", "spec") or ".reference" in name)
)


@pytest.mark.parametrize("module", TORCH_ONLY)
def test_torch_only_modules_reach_no_triton_when_imported(module: str) -> None:
    for name in {module, *reachable(module, at="import time")}:
        path = MODULES[name]
        roots = {target.partition(".")[0] for target, _, _ in imports(name, path.read_text(), False, at="import time")}
        assert "triton" not in roots, f"{module} reaches {name}, which imports triton"


def test_importing_the_package_imports_neither_torch_nor_triton() -> None:
    fresh_process.run(
        """
        import sys
        import fusemesh
        assert fusemesh.__version__ and "flash_attention" in dir(fusemesh)
        heavy = {"torch", "triton", "numpy"} & set(sys.modules)
        assert not heavy, heavy
        """
    )


def test_public_names_and_the_trainer_do_not_import_the_compiler() -> None:
    """It takes two seconds of every process, and every rank, that never compiles anything."""
    fresh_process.run(
        """
        import sys
        import fusemesh
        for name in fusemesh.__all__:
            getattr(fusemesh, name)
        import fusemesh.run.trainer
        assert "torch" in sys.modules and "torch._dynamo" not in sys.modules
        """
    )


def test_public_names_do_not_hide_modules() -> None:
    """A function re-exported under its module's name would make the module unreachable by import ... as."""
    import fusemesh

    siblings = {path.stem for path in (ROOT / "src/fusemesh").glob("*.py")} | {"kernels", "hybrid", "csrc"}
    assert len(fusemesh.__all__) > 5 and not set(fusemesh.__all__) & siblings


# Circles


def arrows_of(module: str, source: str, is_package: bool, modules: Collection[str]) -> set[str]:
    """Return which of ``modules`` a module imports at any time, with the packages that this runs from outside."""
    found = set()
    for target, _, _ in imports(module, source, is_package, at="any time"):
        name = target if target in modules else target.rpartition(".")[0]
        found.add(name)
        # To import a.b.c from elsewhere runs a/__init__ and a.b/__init__ first; a module's own packages run already.
        found.update(package for package in _packages(name) if not module.startswith(f"{package}."))
    return (found & set(modules)) - {module}


def _packages(name: str) -> list[str]:
    """Return the packages around a module."""
    parts = name.split(".")
    return [".".join(parts[:n]) for n in range(1, len(parts))]


def circles(arrows: Mapping[str, set[str]]) -> list[list[str]]:
    """Return the strongly connected components of more than one module, by Tarjan's algorithm without recursion."""
    number: dict[str, int] = {}
    lowest: dict[str, int] = {}
    stack: list[str] = []
    found = []
    for start in sorted(arrows):
        work = [] if start in number else [(start, iter(sorted(arrows[start])))]
        while work:
            node, successors = work[-1]
            if node not in number:
                number[node] = lowest[node] = len(number)
                stack.append(node)
            pending = next((other for other in successors if other not in number or other in stack), None)
            if pending is None:
                work.pop()
                if work:
                    parent = work[-1][0]
                    lowest[parent] = min(lowest[parent], lowest[node])
                if lowest[node] == number[node]:
                    component = stack[stack.index(node) :]
                    del stack[stack.index(node) :]
                    if len(component) > 1:
                        found.append(sorted(component))
            elif pending in number:
                lowest[node] = min(lowest[node], number[pending])
            else:
                work.append((pending, iter(sorted(arrows[pending]))))
    return sorted(found)


def arrows_within(floor: str) -> dict[str, set[str]]:
    """Return which modules of a floor each of its modules imports."""
    own = {name: path for name, path in MODULES.items() if floor_of(name) == floor}
    return {name: arrows_of(name, path.read_text(), path.name == "__init__.py", own) for name, path in own.items()}


@pytest.mark.parametrize("floor", sorted(ABOVE))
def test_no_circle_of_imports(floor: str) -> None:
    assert circles(arrows_within(floor)) == []


def test_a_planted_circle_is_found() -> None:
    sources = {
        "p": "",
        "p.a": "from . import b",
        "p.b": "def f():\n    from p.c import x",
        "p.c": "import p.a",
        "p.d": "from typing import TYPE_CHECKING\nfrom p.e import y\nif TYPE_CHECKING:\n    from p.a import z",
        "p.e": "if TYPE_CHECKING:\n    import p.d",
        "p.q": "from p.f import g",
        "p.q.h": "",
        "p.f": "def f():\n    import importlib\n    importlib.import_module('p.q.h')",
        "p.r": "",
        "p.r.a": "import importlib\nimportlib.import_module('.b', __package__)",
        "p.r.b": "from .a import x",
    }
    arrows = {name: arrows_of(name, text, name in ("p", "p.q", "p.r"), sources) for name, text in sources.items()}
    assert circles(arrows) == [["p.a", "p.b", "p.c"], ["p.f", "p.q"], ["p.r.a", "p.r.b"]]
    assert arrows["p.d"] == {"p.e"} and arrows["p.e"] == set()
