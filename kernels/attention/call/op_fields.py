"""From dataclasses to the arguments of torch.library ops, and back: schema, packing, unpacking.

An op carries tensors, numbers and names, but no dataclass. :class:`OpFields` derives all three from the fields of the
dataclasses that an op takes, so that a new field changes nothing here and nothing in the ops:

    ==========================  ============  ==========================================
    type of the field           in the op     value in the op
    ==========================  ============  ==========================================
    Tensor, Tensor | None       Tensor(?)     the tensor
    tuple[Tensor, ...]          Tensor[]      a list
    float, bool                 float, bool   the number
    int                         SymInt        the number
    int | None                  SymInt        -1 for None; the numbers are not negative
    tuple[str | float, ...]     str[] float[] a list
    another dataclass           its fields    in its place
    ==========================  ============  ==========================================
"""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import torch

_TYPES: dict[Any, str] = {
    torch.Tensor: "Tensor",
    torch.Tensor | None: "Tensor?",
    tuple[torch.Tensor, ...]: "Tensor[]",
    float: "float",
    bool: "bool",
    int: "SymInt",
    int | None: "SymInt",
    tuple[str, ...]: "str[]",
    tuple[float, ...]: "float[]",
}


class _Leaf(NamedTuple):
    """One argument of an op."""

    name: str
    path: str  # from the record to the value: "spec.scale"
    hint: Any

    def packed(self) -> str:
        """Return the expression of the op's value, of a record ``x``."""
        value = f"x.{self.path}"
        if typing.get_origin(self.hint) is tuple:
            return f"list({value})"
        return f"-1 if {value} is None else {value}" if self.hint == (int | None) else value

    def unpacked(self, value: str) -> str:
        """Return the expression of the field's value, of that of the op."""
        if typing.get_origin(self.hint) is tuple:
            return f"tuple({value})"
        return f"None if {value} < 0 else {value}" if self.hint == (int | None) else value


class OpFields:
    """The arguments by which an op carries an instance of ``record``.

    Args:
        record: a dataclass whose fields are of the types above.
        without: fields that this op never has; they keep their defaults.
        mutable: tensor fields that the op changes.
        names: of op arguments that are not called as their fields; saved programs find arguments by name.

    Attributes:
        schema: the arguments in the language of torch.library.
        pack: ``pack(instance)`` returns the list of the op's arguments.
        unpack: ``unpack(arguments)`` returns the instance.
    """

    def __init__(
        self,
        record: type,
        *,
        without: Sequence[str] = (),
        mutable: Sequence[str] = (),
        names: Mapping[str, str] = MappingProxyType({}),
    ) -> None:
        self.leaves: list[_Leaf] = []
        # Written out and compiled, as dataclasses do with __init__: a loop over fields would cost each call 10 us.
        namespace: dict[str, Any] = {}
        numbers = (f"v[{i}]" for i in range(1000))
        built = self._expression(record, "", tuple(without), namespace, numbers)
        packed = ", ".join(leaf.packed() for leaf in self.leaves)
        exec(f"def pack(x): return [{packed}]\ndef unpack(v): return {built}", namespace)
        self.pack: Callable[[Any], list[Any]] = namespace["pack"]
        self.unpack: Callable[[Sequence[Any]], Any] = namespace["unpack"]
        letters = dict(zip(mutable, "abcdefgh", strict=False))
        self.schema = ", ".join(
            _TYPES[leaf.hint].replace("Tensor", f"Tensor({letters[leaf.name]}!)" if leaf.name in letters else "Tensor")
            + f" {names.get(leaf.name, leaf.name)}"
            for leaf in self.leaves
        )

    def _expression(
        self, record: type, path: str, without: tuple[str, ...], namespace: dict[str, Any], values: Iterator[str]
    ) -> str:
        """Return the expression that builds ``record``, and collect the leaves on the way."""
        namespace[record.__name__] = record
        hints, arguments = typing.get_type_hints(record), []
        for field in dataclasses.fields(record):
            if field.name in without:
                continue
            hint = hints[field.name]
            inner = next((x for x in (hint, *typing.get_args(hint)) if dataclasses.is_dataclass(x)), None)
            if isinstance(inner, type):
                value = self._expression(inner, f"{path}{field.name}.", without, namespace, values)
            else:
                leaf = _Leaf(field.name, path + field.name, hint)
                self.leaves.append(leaf)
                value = leaf.unpacked(next(values))
            arguments.append(f"{field.name}={value}")
        return f"{record.__name__}({', '.join(arguments)})"

    def __len__(self) -> int:
        return len(self.leaves)

    def by_name(self, values: Sequence[Any]) -> dict[str, Any]:
        """Return the op's arguments by the names of their fields."""
        return {leaf.name: value for leaf, value in zip(self.leaves, values, strict=True)}

    def split(self, values: Sequence[Any]) -> tuple[list[torch.Tensor | None], list[Any]]:
        """Return the tensors among the op's arguments, and the arguments with their numbers in the tensors' place."""
        tensors: list[torch.Tensor | None] = []
        others: list[Any] = []
        for leaf, value in zip(self.leaves, values, strict=True):
            if leaf.hint == tuple[torch.Tensor, ...]:
                others.append(len(value))
                tensors += value
            elif leaf.hint in (torch.Tensor, torch.Tensor | None):
                others.append(None)
                tensors.append(value)
            else:
                others.append(value)
        return tensors, others

    def joined(self, tensors: Sequence[torch.Tensor | None], others: Sequence[Any]) -> list[Any]:
        """Return the arguments of which :meth:`split` made these."""
        rest: list[Any] = list(tensors)
        values: list[Any] = []
        for leaf, other in zip(self.leaves, others, strict=True):
            if leaf.hint == tuple[torch.Tensor, ...]:
                values.append(rest[:other])
                rest = rest[other:]
            elif leaf.hint in (torch.Tensor, torch.Tensor | None):
                values.append(rest.pop(0))
            else:
                values.append(other)
        return values

    def gradients(self, found: dict[str, Any], values: Sequence[Any]) -> list[Any]:
        """Return the gradients of the op's arguments ``values``: those ``found`` by name, and none of the others."""
        gradients: list[Any] = []
        for leaf, value in zip(self.leaves, values, strict=True):
            gradient = found.get(leaf.name)
            if gradient is None and isinstance(value, (list, tuple)):
                # Autograd takes a list of gradients for a list of tensors, and wants an empty list for an empty one.
                gradient = [None] * len(value) if leaf.hint == tuple[torch.Tensor, ...] or not value else None
            gradients.append(gradient)
        return gradients
