"""A model of plain torch modules on tp: a table of name patterns says how each module is split.

A pattern is a module's name, in which a component may hold wildcards (``layers.*.attention.query``). The styles:

============  ==========================================================================================================
column        torch.nn.Linear; its output features are split, its input is whole
row           torch.nn.Linear; its input features are split as a column's output is, its output is summed and whole
row_of_whole  the same of a whole input, of which each rank takes its part
vocab         torch.nn.Embedding, whose rows are split and whose output is whole; torch.nn.Linear, whose output features
              are split and whose output is gathered: a head that gives whole logits
heads         any module, held by every rank and applied to the rank's own heads; its gradients are summed over tp
sequence      any module, held by every rank and applied to the rank's part of the sequence (dim 1); its gradients are
              summed over tp. One of these switches sequence parallel on: rows and embeddings leave parts of the
              sequence, columns and heads gather it
whole         any module, held by every rank and applied to whole activations: what a module that no pattern names is
features      torch.nn.Embedding, whose columns are split and whose output is the rank's columns: biases of its heads
tied          any module that holds parameters of the table's layers under second names and does not compute with them
============  ==========================================================================================================

Modules must take head counts from the tensors they are given (``view(batch, length, -1, head_dim)``), because a rank
has only its share of the heads. Where a parent of columns has an attribute ``head_dim``, ``attention_head_size`` or
``key_value_proj_dim``, no head is cut, and key and value heads fewer than the ranks are repeated.

For Hugging Face's models there is a table where :mod:`fusemesh.hybrid.hugging_face.families` has one; others bring a
plan along (``model._tp_plan``, from their config's ``base_model_tp_plan``), whose styles are translated into these.
Source of the styles: Shoeybi et al., "Megatron-LM" (2019), section 3.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.distributed.tensor import Shard

from ..hugging_face.families import find_family, tensor_table
from ..hugging_face.plans import translated_plan
from .converted import check_free, column, embedding, features, holder, row, whole
from .modules import TensorParallelModule
from .patterns import matches

STYLES = ("column", "row", "row_of_whole", "vocab", "heads", "sequence", "whole", "features", "tied")
_LAYERS = ("column", "row", "row_of_whole", "vocab")
# Attributes by which parents of columns say the size of a head.
_HEAD_DIMS = ("head_dim", "attention_head_size", "key_value_proj_dim")


@dataclass(frozen=True)
class Table:
    """Patterns and their styles; ``argument`` is what errors call it. Of the user's own, each must match."""

    styles: Mapping[str, str]
    argument: str = "plan"
    is_users: bool = True


def find_table(model: nn.Module, plan: Mapping[str, str] | None, ranks: int) -> Table | None:
    """Return the table for ``model``: the user's, or with several ranks that of its family, or its own plan.

    Raises:
        ValueError: a style that is not known.
    """
    if plan is not None:
        for pattern, style in plan.items():
            if style not in STYLES:
                raise ValueError(
                    f"plan: expected one of {', '.join(STYLES)} for {pattern!r}, received {style!r}; see "
                    "fusemesh.hybrid.tensor.table"
                )
        return Table(dict(plan))
    if ranks == 1:
        return None
    family = find_family(model)
    if family is not None and family.table is not None:
        return Table(tensor_table(model) or {}, f"fusemesh's table of {family.name}", is_users=False)
    found = translated_plan(model)
    return None if found is None else Table(found, "model._tp_plan", is_users=False)


def convert(model: nn.Module, table: Table, ranks: int, *, sequence_parallel: bool) -> bool:
    """Turn the modules of ``model`` into tensor parallel ones, in place, as the table says; their parameters stay.

    Args:
        ranks: of tp.
        sequence_parallel: whether ``sequence`` may split the sequence; else its modules count as ``whole``.

    Returns:
        Whether activations are to be split along the sequence.

    Raises:
        ValueError: a pattern that names nothing, two styles for one module, a module that its style cannot split, or
            one that may see a part of the activations and that the table does not name. Nothing is changed then.
    """
    modules = dict(model.named_modules())
    styles = _styles_by_name(table, modules)
    splits_sequence = sequence_parallel and ranks > 1 and "sequence" in styles.values()
    _follow_ties(modules, styles)
    heads = _heads(table, modules, styles, ranks)
    layers: dict[nn.Module, TensorParallelModule] = {}
    tables: list[nn.Embedding] = []
    columns: list[nn.Embedding] = []
    others: dict[nn.Module, bool] = {}  # whether its gradients on a rank are parts of a sum
    for name, module in modules.items():
        style = styles.get(name)
        if isinstance(module, TensorParallelModule) or not any(True for _ in module.parameters(recurse=False)):
            if style is not None and table.is_users:
                expected = "a plain module with parameters of its own"
                raise _wrong(table, name, expected, module, "name others, or those inside it")
            if (
                style in _LAYERS
                and not isinstance(module, TensorParallelModule)
                and any(True for _ in module.parameters())
            ):
                raise _not_linear(table, name, module, style)
        elif style == "vocab" and isinstance(module, nn.Embedding):
            _check_table(table, name, module)
            tables.append(module)
        elif style == "features":
            _check_features(table, name, module, ranks)
            columns.append(module)
        elif style in _LAYERS:
            layers[module] = _split(table, name, module, style, heads.get(name), ranks)
            layers[module].check(ranks)
        else:
            if style is None and ranks > 1:
                _check_unnamed(table, name, styles, splits_sequence)
            check_free(module)
            others[module] = style == "heads" or (style == "sequence" and splits_sequence)
    ties = {x: _ties(x, layers) for x in (modules[name] for name in styles if styles[name] == "tied") if x in others}
    _check_ties({name: module for name, module in modules.items() if not ties.get(module)}, layers, others)
    for parent in modules.values():
        for name, child in list(parent.named_children()):
            if child in layers:
                parent.register_module(name, layers[child].train(child.training))
    for module in tables:
        embedding(module)
    for module in columns:
        features(module)
    for module, is_partial in others.items():
        if ties.get(module):
            holder(module, ties[module])
        else:
            whole(module, is_partial)
    _repeat_heads(modules, heads, ranks)
    return splits_sequence


def _styles_by_name(table: Table, modules: Mapping[str, nn.Module]) -> dict[str, str]:
    styles: dict[str, str] = {}
    for pattern, style in table.styles.items():
        found = [name for name in modules if matches(pattern, name)]
        if not found and table.is_users:
            known = [name for name, module in modules.items() if not list(module.children())][:5]
            raise ValueError(
                f"{table.argument}: expected patterns of module names such as {', '.join(known)}, received "
                f"{pattern!r}, which names none; a * stands for one component of a name"
            )
        for name in found:
            if styles.setdefault(name, style) != style:
                raise ValueError(
                    f"{table.argument}: expected one style for {name}, received {styles[name]!r} and {style!r}; make "
                    "the patterns disjoint"
                )
    return styles


def _follow_ties(modules: Mapping[str, nn.Module], styles: dict[str, str]) -> None:
    """Split the rows of each embedding that shares its weight with a head that is split over the vocabulary."""
    heads = [modules[name] for name, style in styles.items() if style == "vocab"]
    tables = {id(p) for module in heads for p in module.parameters(recurse=False)}
    for name, module in modules.items():
        if name not in styles and isinstance(module, nn.Embedding) and id(module.weight) in tables:
            styles[name] = "vocab"


def _heads(table: Table, modules: Mapping[str, nn.Module], styles: Mapping[str, str], ranks: int) -> dict[str, int]:
    """Return the number of heads in the output of each column whose parent knows their dimension."""
    by_parent: dict[str, dict[str, int]] = {}
    for name, style in styles.items():
        parent = name.rpartition(".")[0]
        dim = next((d for d in (getattr(modules[parent], key, None) for key in _HEAD_DIMS) if d is not None), None)
        out = getattr(modules[name], "out_features", None)
        if style == "column" and isinstance(dim, int) and isinstance(out, int) and out % dim == 0:
            by_parent.setdefault(parent, {})[name] = out // dim
    for counts in by_parent.values():
        name, most = max(counts.items(), key=lambda item: item[1])
        if most % ranks != 0:
            legal = [d for d in range(1, most + 1) if most % d == 0]
            raise ValueError(
                f"{table.argument}: expected a number of heads that tp{ranks} divides, received {most} in {name}; use "
                f"tp in {legal}"
            )
    return {name: count for counts in by_parent.values() for name, count in counts.items()}


def _repeat_heads(modules: Mapping[str, nn.Module], heads: Mapping[str, int], ranks: int) -> None:
    """Tell Hugging Face's attention how many query heads of a rank share a key, where keys are repeated over ranks."""
    for parent in {name.rpartition(".")[0] for name in heads}:
        counts = [count for name, count in heads.items() if name.rpartition(".")[0] == parent]
        if min(counts) < ranks and hasattr(modules[parent], "num_key_value_groups"):
            modules[parent].num_key_value_groups = max(counts) // ranks  # type: ignore[assignment]


def _split(
    table: Table, name: str, module: nn.Module, style: str, heads: int | None, ranks: int
) -> TensorParallelModule:
    """Return the tensor parallel module that takes the place of a plain one."""
    if type(module).forward is not nn.Linear.forward:
        raise _not_linear(table, name, module, style)
    assert isinstance(module, nn.Linear)
    if style in ("row", "row_of_whole"):
        return row(module, split_input=style == "row_of_whole")
    if style == "column" and heads is None and module.out_features % ranks != 0:
        raise ValueError(
            f"{table.argument}: expected output features that tp{ranks} divides for {name}, received "
            f"{module.out_features}; use a multiple of {ranks}, or 'vocab', which splits any number and gathers"
        )
    return column(module, heads, gather_output=style == "vocab")


def _not_linear(table: Table, name: str, module: nn.Module, style: str) -> ValueError:
    expected = "torch.nn.Linear" + (" or torch.nn.Embedding" if style == "vocab" else "")
    remedy = (
        "give one that keeps Linear's forward, or use fsdp in the place of tp, which takes wrappers such as LoRA's "
        "(put around the parts after parallelize(), their sizes would not fit)"
    )
    return _wrong(table, name, f"a {expected} for {style!r}", module, remedy)


def _check_table(table: Table, name: str, module: nn.Embedding) -> None:
    check_free(module)
    if module.max_norm is not None or module.scale_grad_by_freq or module.sparse:
        remedy = "these need the whole table at once; leave them off, or use tp1"
        raise _wrong(table, name, "an embedding without max_norm, scale_grad_by_freq and sparse", module, remedy)


def _check_features(table: Table, name: str, module: nn.Module, ranks: int) -> None:
    if not isinstance(module, nn.Embedding):
        raise _wrong(table, name, "a torch.nn.Embedding for 'features'", module, "give it another style")
    _check_table(table, name, module)
    if module.embedding_dim % ranks != 0:
        raise ValueError(
            f"{table.argument}: expected columns that tp{ranks} divides for {name}, received {module.embedding_dim}; "
            f"use a tp that divides them"
        )


def _ties(
    module: nn.Module, layers: Mapping[nn.Module, TensorParallelModule]
) -> dict[str, tuple[TensorParallelModule, str]]:
    """Return where each parameter of ``module`` stands in one of ``layers``, too; {} unless all do."""
    held = {id(p): (layer, name) for layer in layers.values() for name, p in layer.named_parameters(recurse=False)}
    own = dict(module.named_parameters(recurse=False))
    return {name: held[id(p)] for name, p in own.items()} if all(id(p) in held for p in own.values()) else {}


def _check_unnamed(table: Table, name: str, styles: Mapping[str, str], splits_sequence: bool) -> None:
    """Raise if a module that no pattern names may see a part of the activations that it would see in one process.

    Taken for whole, its gradient would be a part of the whole one, and the ranks' copies would drift apart silently.
    """
    parent = name.rpartition(".")[0]
    beside = [other for other, style in styles.items() if style == "column" and other.rpartition(".")[0] == parent]
    if not splits_sequence and not beside:
        return
    why = "sequence parallel is on" if splits_sequence else f"it stands beside {beside[0]}, whose output is split"
    raise ValueError(
        f"{table.argument}: expected a style for {name}, received none, and {why}; say whether it sees whole "
        "activations ('whole'), its rank's heads ('heads') or its rank's part of the sequence ('sequence')"
    )


def _check_ties(
    modules: Mapping[str, nn.Module],
    layers: Mapping[nn.Module, TensorParallelModule],
    others: Mapping[nn.Module, bool],
) -> None:
    """Raise unless modules that hold one parameter hold it in the same way."""
    found: dict[int, tuple[str, Any]] = {}
    for name, module, parameter, attribute in _held(modules):
        how: Any = (Shard(0), Shard(0))  # the rows of a table
        if module in layers:
            how = layers[module].placements()[attribute]
        elif module in others:
            how = ("whole", "in parts" if others[module] else "alike")
        first = found.setdefault(id(parameter), (f"{name}.{attribute}", how))
        if first[1] != how:
            raise ValueError(
                f"model: {first[0]} and {name}.{attribute} are one parameter, which tp would split in two ways, "
                f"{first[1]} and {how}; give both modules one style"
            )


def _held(modules: Mapping[str, nn.Module]) -> Iterator[tuple[str, nn.Module, nn.Parameter, str]]:
    for name, module in modules.items():
        if not isinstance(module, TensorParallelModule):
            for attribute, parameter in module.named_parameters(recurse=False):
                yield name, module, parameter, attribute


def _wrong(table: Table, name: str, expected: str, module: nn.Module, remedy: str) -> ValueError:
    return ValueError(f"{table.argument}: expected {expected} at {name!r}, received {type(module).__name__}; {remedy}")
