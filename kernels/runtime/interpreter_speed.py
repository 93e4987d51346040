"""Triton's interpreter at twice its speed (``TRITON_INTERPRET=1``), every result equal to the bit.

Four fifths of an interpreted kernel's time is bookkeeping around numpy, and half of that is done for nothing:

- every sum, difference and product of whole numbers is computed once more in 64 bits, for an assertion against overflow
  that only a debug build would make;
- the numpy dtype of a Triton dtype is looked up in a table that is built anew for each look;
- each tensor and each block type wraps and validates its shape, though few different ones exist;
- every comparison of types, and every argument of every operation, is searched for constants inside lists and tuples;
- ``triton.language`` is prepared anew for every call of one jit function by another, which takes longer than most such
  functions run.

:func:`replacements` names what takes their place; :func:`fusemesh.kernels.runtime.interpreter.install` puts it there.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from .. import compat


def replacements(parts: compat.Interpreter) -> dict[tuple[Any, str], Any]:
    """Return (owner, attribute) -> replacement, for what this version of Triton's interpreter has."""
    import triton.language as tl

    found: dict[tuple[Any, str], Any] = {
        (tl.block_type, "__init__"): _block_type_once(tl),
        (tl.tensor, "__init__"): _tensor_shape_once(tl),
        (tl.dtype, "__eq__"): _equal_names(tl),
    }
    if hasattr(tl.core, parts.unwrap):
        found[tl.core, parts.unwrap] = _unwrap_seldom(parts, tl)
    options: Any = getattr(parts.builder, "options", None)
    if hasattr(options, "sanitize_overflow") and not getattr(options, "debug", True):
        found[parts.builder, "options"] = dataclasses.replace(options, sanitize_overflow=False)
    if hasattr(parts.module, parts.numpy_dtype):
        found[parts.module, parts.numpy_dtype] = _numpy_dtype_once(parts, tl)
    if hasattr(parts.module, parts.patch_lang):
        found[parts.module, parts.patch_lang] = _prepare_once(parts, tl)
    return found


def _block_type_once(tl: Any) -> Callable[..., None]:
    """``block_type.__init__`` that copies what it made for the same element type and shape before."""
    original = tl.block_type.__init__
    known: dict[tuple[Any, ...], dict[str, Any]] = {}

    def init(self: Any, element_ty: Any, shape: Any) -> None:
        key = (element_ty.name, *[size.value if isinstance(size, tl.constexpr) else size for size in shape])
        made = known.get(key)
        if made is not None and made["element_ty"] is element_ty:
            vars(self).update(made)
            return
        original(self, element_ty, shape)
        known[key] = dict(vars(self))

    return init


def _tensor_shape_once(tl: Any) -> Callable[..., None]:
    """``tensor.__init__`` that shares the wrapped shape and number of elements between tensors of one block type."""
    original = tl.tensor.__init__
    known: dict[str, dict[str, Any]] = {}

    def init(self: Any, handle: Any, type: Any) -> None:
        name = type.name if type.is_block() else ""
        made = known.get(name)
        if made is None:
            original(self, handle, type)
            own = vars(self)
            known[name] = {key: own[key] for key in own.keys() - {"handle", "type", "dtype"}}
            return
        own = vars(self)
        own.update(made)
        own["handle"], own["type"], own["dtype"] = handle, type, type.scalar

    return init


def _equal_names(tl: Any) -> Callable[[Any, Any], bool]:
    """``dtype.__eq__`` that compares two plain dtypes at once."""
    original, plain = tl.dtype.__eq__, tl.dtype

    def equal(self: Any, other: Any) -> bool:
        return self.name == other.name if type(other) is plain else original(self, other)

    return equal


def _unwrap_seldom(parts: compat.Interpreter, tl: Any) -> Callable[[Any], Any]:
    """The search for constants that looks into nothing that cannot hold one."""
    original, constexpr = getattr(tl.core, parts.unwrap), tl.constexpr
    plain = frozenset((tl.tensor, tl.dtype, tl.block_type, int, float, bool, str, type(None)))

    def unwrap(value: Any) -> Any:
        kind = type(value)
        if kind in plain:
            return value
        return value.value if kind is constexpr else original(value)

    return unwrap


def _numpy_dtype_once(parts: compat.Interpreter, tl: Any) -> Callable[[Any], Any]:
    """The look-up of a numpy dtype that asks once for each element type."""
    original = getattr(parts.module, parts.numpy_dtype)
    known: dict[str, Any] = {}

    def numpy_dtype(dtype: Any) -> Any:
        element = dtype.element_ty if isinstance(dtype, tl.block_type) else dtype
        found = known.get(element.name)
        if found is None:
            found = known[element.name] = original(element)
        return found

    return numpy_dtype


def _prepare_once(parts: compat.Interpreter, tl: Any) -> Callable[[Any], Any]:
    """The preparation of ``triton.language`` that does nothing for a function called by one that was prepared."""
    original, is_builtin = getattr(parts.module, parts.patch_lang), parts.is_builtin
    seen: dict[Any, list[Any]] = {}  # function -> those of the two modules that it sees

    def patch_lang(fn: Any) -> Any:
        # A launch restores what it replaced when it ends, so what is replaced now was replaced by the running launch.
        if is_builtin(tl.tensor.__add__):
            return original(fn)
        modules = seen.get(fn)
        if modules is None:
            values = list(fn.__globals__.values())
            modules = seen[fn] = [module for module in (tl, tl.core) if any(value is module for value in values)]
        if modules and not any(is_builtin(module.load) for module in modules):
            return parts.lang_scope()
        return original(fn)

    return patch_lang
