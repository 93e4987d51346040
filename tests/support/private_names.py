"""Find the private names of torch, triton and transformers that a folder of ours uses.

A private name is one that its library may change in any version without a word: a leading underscore in it or in a
component of its path, or one of the undocumented names in :data:`UNDOCUMENTED`. Each floor keeps its own in one module,
``compat.py``, and holds that by a test:

    outside = [found for found in private_names(ROOT / "hybrid") if found.file != "compat.py"]
    assert outside == []

What the checker sees, with the name that it reports:

- ``torch._C._nn.f(...)``, also through an alias: ``torch._C._nn.f``;
- ``from torch.x import _y``, ``from torch._x import y``, ``import torch._x``: the whole path;
- ``value._y``, and ``getattr(value, "_y")`` or ``setattr``: ``._y``, where our own source defines no such name (any
  ``_y`` of :data:`ATTRIBUTES` is reported even then, and where a class sets it);
- the strings ``"torch.x._y"`` (a logger, a module imported by name) and ``"TORCHELASTIC_..."``: the string.

Names of the standard library and of our own modules are not reported, nor is what stands in docstrings and comments.
"""

from __future__ import annotations

import ast
import functools
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent.parent
FLOORS = ("kernels", "hybrid", "src")
LIBRARIES = ("torch", "triton", "transformers")
# Attributes of these libraries' objects that are private whatever our own source calls by the same name.
ATTRIBUTES = frozenset(
    {
        "_parameters",
        "_buffers",
        "_modules",
        "_forward_hooks",
        "_forward_pre_hooks",
        "_backward_hooks",
        "_version",
        "_base",
        "_dynamo_marked_constant",
        "_maybe_max_seqlen",
        "_get_max_seqlen",
        "_ragged_idx",
        "_qkv_same_embed_dim",
        "_local_tensor",
        "_spec",
        "_tp_plan",
    }
)
# Names without an underscore that no documentation promises, by library; reported in files that import the library.
UNDOCUMENTED = {
    "torch": frozenset({"found_inf", "grad_scale"}),
    "triton": frozenset({"warmup", "cache_key", "InterpreterBuilder", "TensorHandle", "is_builtin"}),
    "transformers": frozenset({"masking_utils", "get_correct_attn_implementation"}),
}
# Beginnings of strings that are undocumented interfaces: environment variables.
STRINGS = ("TORCHELASTIC_",)
# Documented although they begin with an underscore: those of named tuples.
_DOCUMENTED = frozenset({"_replace", "_asdict", "_fields", "_make", "_field_defaults"})
_BY_NAME = ("getattr", "setattr", "hasattr", "delattr")
_PATH = re.compile(rf"({'|'.join(LIBRARIES)})(\.\w+)+")


class Found(NamedTuple):
    """One use of a private name: its file relative to the folder, its line, and the name."""

    file: str
    line: int
    name: str


def private_names(folder: str | Path) -> list[Found]:
    """Return every use of a private name of :data:`LIBRARIES` in the Python files below ``folder``, in order."""
    root = Path(folder)
    own = _own_names(*(ROOT / floor for floor in FLOORS), root)
    found = []
    for path in sorted(root.rglob("*.py")):
        for line, name in _in_source(path.read_text(), own):
            found.append(Found(path.relative_to(root).as_posix(), line, name))
    return found


def in_source(source: str) -> list[str]:
    """Return the private names that one file of this text uses, as if it stood alone; for tests of the checker."""
    return [name for _, name in _in_source(source, frozenset(_defined(ast.parse(source))))]


def is_private(component: str) -> bool:
    """Return whether a component of a name is private: a leading underscore, but neither __dunder__ nor _sunder_."""
    return component.startswith("_") and not component.endswith("_") and component not in _DOCUMENTED


@functools.cache
def _own_names(*folders: Path) -> frozenset[str]:
    """Return the names that our own source defines; those of compat.py hide nothing, being other libraries'."""
    names: set[str] = set()
    for folder in folders:
        for path in folder.rglob("*.py"):
            if path.name != "compat.py":
                names.update(_defined(ast.parse(path.read_text())))
    return frozenset(names)


def _defined(tree: ast.AST) -> Iterator[str]:
    """Yield every name that a file defines: functions, classes, variables, and attributes assigned to self or cls."""
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            yield node.name
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id
        elif (
            isinstance(node, ast.Attribute)
            and isinstance(node.ctx, ast.Store)
            and getattr(node.value, "id", "") in ("self", "cls")
        ):
            yield node.attr


def _in_source(source: str, own: frozenset[str]) -> list[tuple[int, str]]:
    tree = ast.parse(source)
    imported = _imported(tree)
    used = {path.partition(".")[0] for path in imported.values()}
    undocumented = {name for library in LIBRARIES if library in used for name in UNDOCUMENTED[library]}
    skipped = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Attribute)} | _docstrings(tree)
    found: list[tuple[int, str]] = []
    for node in ast.walk(tree):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            found += [(node.lineno, path) for path in _paths(node) if _of_library(path) and _has_private(path)]
        elif isinstance(node, ast.Attribute) and id(node) not in skipped:
            found += _attribute(node, imported, own, undocumented)
        elif isinstance(node, ast.Call) and getattr(node.func, "id", "") in _BY_NAME and len(node.args) > 1:
            name = getattr(node.args[1], "value", None)
            if isinstance(name, str) and _is_foreign(name, own):
                found.append((node.lineno, f".{name}"))
        elif isinstance(node, ast.ClassDef):
            found += [(line, f".{name}") for line, name in _class_variables(node) if name in ATTRIBUTES]
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in skipped:
            text = node.value
            if text.startswith(STRINGS) or (_PATH.fullmatch(text) and any(map(is_private, text.split(".")))):
                found.append((node.lineno, text))
    return sorted(set(found))


def _attribute(
    node: ast.Attribute, imported: dict[str, str], own: frozenset[str], undocumented: set[str]
) -> Iterator[tuple[int, str]]:
    """Yield the private names in a chain of attributes, given by its last one."""
    parts: list[str] = []
    base: ast.expr = node
    while isinstance(base, ast.Attribute):
        parts.insert(0, base.attr)
        base = base.value
    path = imported.get(base.id) if isinstance(base, ast.Name) else None
    if path is not None and _of_library(path):
        # What was private in the import is reported there.
        if any(map(is_private, parts)) or _is_undocumented(path.partition(".")[0], parts):
            yield node.lineno, ".".join([path, *parts])
        return
    if path is not None:
        # A module of ours or of the standard library: its own names are not looked at, its values' attributes are.
        parts = parts[1:]
    for part in parts:
        if _is_foreign(part, own) or (part in undocumented and part not in own):
            yield node.lineno, f".{part}"


def _class_variables(node: ast.ClassDef) -> Iterator[tuple[int, str]]:
    """Yield line and name of what a class sets for itself, and with that perhaps for the library it derives from."""
    for statement in node.body:
        targets = statement.targets if isinstance(statement, ast.Assign) else [getattr(statement, "target", None)]
        yield from ((target.lineno, target.id) for target in targets if isinstance(target, ast.Name))


def _imported(tree: ast.AST) -> dict[str, str]:
    """Return the full path of each name that a file imports; that of a relative import begins with a dot."""
    names: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                names[alias.asname or alias.name.partition(".")[0]] = (
                    alias.name if alias.asname else alias.name.partition(".")[0]
                )
        elif isinstance(node, ast.ImportFrom):
            for alias, path in zip(node.names, _paths(node), strict=True):
                names[alias.asname or alias.name] = path
    return names


def _paths(node: ast.Import | ast.ImportFrom) -> list[str]:
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    module = "." * node.level + (node.module or "")
    return [f"{module}.{alias.name}" for alias in node.names]


def _of_library(path: str) -> bool:
    return path.partition(".")[0] in LIBRARIES


def _has_private(path: str) -> bool:
    library, *parts = path.split(".")
    return any(map(is_private, parts)) or _is_undocumented(library, parts)


def _is_undocumented(library: str, parts: list[str]) -> bool:
    return not UNDOCUMENTED[library].isdisjoint(parts)


def _is_foreign(name: str, own: frozenset[str]) -> bool:
    return is_private(name) and (name in ATTRIBUTES or name not in own)


def _docstrings(tree: ast.AST) -> set[int]:
    """Return the ids of the constants that are statements of their own: docstrings, and strings that are comments."""
    statements = [node.value for node in ast.walk(tree) if isinstance(node, ast.Expr)]
    return {id(value) for value in statements if isinstance(value, ast.Constant)}
