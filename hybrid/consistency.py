"""Check that replicas agree and that numbers are finite; an error names the rank and the parameter."""

from __future__ import annotations

import functools
import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor

from .outputs import UserError
from .pipeline_parallel import PipelinedModel


class DriftError(UserError, RuntimeError):
    """Replicas of a parameter are no longer equal; the message names the parameter and the ranks."""


_ROW = 2**15  # integers


class NonFiniteError(UserError, RuntimeError):
    """A number is infinite or NaN; the message names the step, and the rank and parameter where it first appeared."""


def checksum(tensor: torch.Tensor) -> torch.Tensor:
    """Return an int64 scalar of a tensor's bits: a change of one element always changes it, others nearly always."""
    bits = tensor.detach().contiguous().flatten().view(torch.uint8)
    padding = -bits.numel() % 4
    words = torch.nn.functional.pad(bits, (0, padding)).view(torch.int32).to(torch.int64)
    # Odd factors modulo 2^64, so that elements which change places are seen, too.
    factors = torch.arange(words.numel(), device=words.device) * 2654435762 + 1
    return (words * factors).sum()


def quick_sum(tensor: torch.Tensor) -> int:
    """Return a number of a tensor's bits and their order, nearly at the speed of memory; on any device the same.

    A change of one element always changes the sums of its row, which a hash puts together; others nearly always.
    """
    bits = tensor.detach().contiguous().flatten().view(torch.uint8)
    if bits.data_ptr() % 8:  # a parameter may begin anywhere in a buffer that it shares
        bits = bits.clone()
    if bits.numel() % 8:
        bits = torch.nn.functional.pad(bits, (0, -bits.numel() % 8))
    words = bits.view(torch.int64)
    whole = words.numel() // _ROW * _ROW
    rows = 1 if bits.device.type == "cpu" else 128  # what stays in a core's cache, or fills a GPU
    weights = _weights(bits.device)
    buffer = torch.empty_like(words[: rows * _ROW])
    sums = []
    for block in (*words[:whole].view(-1, _ROW).split(rows), words[whole:].view(1, -1)):
        products, factors = buffer[: block.numel()].view(block.shape), weights[: block.shape[1]]
        torch.mul(block, factors, out=products)
        sums.append(products.sum(1))
        # Modulo 2^64 any odd factor leaves the highest bit as it is, so that two that flip would be as none: it moves.
        torch.bitwise_right_shift(block, 32, out=products)
        sums.append(products.mul_(factors).sum(1))
    return _digest(torch.cat(sums[0::2]).tolist(), torch.cat(sums[1::2]).tolist())


@functools.cache
def _weights(device: torch.device) -> torch.Tensor:
    """Return the odd factors of the integers in a row. Those of an arithmetic series would not see all permutations."""
    generator = torch.Generator().manual_seed(0)
    return (torch.randint(-(2**63), 2**63 - 1, (_ROW,), generator=generator) | 1).to(device)


def _digest(*values: object) -> int:
    # Eight bytes would be a signed integer, which is reduced as such.
    return int.from_bytes(hashlib.blake2b(repr(values).encode(), digest_size=7).digest(), "big")


def agree(values: object, device: torch.device, group: dist.ProcessGroup | None = None) -> bool:
    """Return whether all ranks of the group hold the same ``values``, whose ``repr`` tells them apart.

    One reduction of two numbers.

    Args:
        device: where the group's backend reduces.
        group: None is the world.
    """
    mine = _digest(values)
    both = torch.tensor([mine, -mine], device=device)
    dist.all_reduce(both, op=dist.ReduceOp.MAX, group=group)
    # The largest equals the smallest, which is minus the largest of the negatives.
    return bool(both[0] == -both[1])


def check_same_on_all_ranks(tensors: Iterable[tuple[str, torch.Tensor]], device: torch.device) -> None:
    """Check that every rank of the world holds the same whole model, before its parts are cut; every rank calls it.

    One reduction of two numbers, whatever the model. Tensors are compared to the bit, by :func:`quick_sum`, and by
    shape, dtype and requires_grad; those on meta by the latter alone.

    Args:
        tensors: the model's parameters and buffers by name, on no mesh.
        device: where the backend of the world's group reduces.

    Raises:
        ValueError: on every rank, naming the first parameter or buffer that differs, and the ranks.
    """
    if dist.get_world_size() == 1:
        return
    mine = [(name, _Told(_content(tensor), tensor.requires_grad)) for name, tensor in tensors]
    if agree(mine, device):
        return
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    _raise_different([dict(found) for found in everyone], [name for name, _ in mine])


def check_has_memory(call: str, model: nn.Module) -> None:
    """Raise ValueError if a parameter, or a buffer of the state dict, is on meta; ``call`` is what asks for values."""
    empty = next((name for name, x in model.state_dict().items() if isinstance(x, torch.Tensor) and x.is_meta), None)
    if empty is not None:
        raise ValueError(
            f"{call}: expected parameters and buffers that have memory, received {empty!r} on meta; call "
            "model.to_empty(device=...) before, and load_state_dict() or checkpoint.load() for their values"
        )


class _Told(NamedTuple):
    """How a rank tells the others of a tensor."""

    content: str
    requires_grad: bool


def _content(tensor: torch.Tensor) -> str:
    told = f"{tuple(tensor.shape)} {tensor.dtype}"
    if tensor.is_meta:
        return f"{told} on meta"
    # A subclass, as of quantized numbers, has bits that cannot be seen so.
    is_plain = type(tensor.data) is torch.Tensor and tensor.layout is torch.strided
    return f"{told} {quick_sum(tensor)}" if is_plain else told


def _raise_different(everyone: list[dict[str, _Told]], names: list[str]) -> None:
    """Raise for the first name, in this rank's order and then in any's, whose values are not the same on all ranks."""
    others = [name for found in everyone for name in found if name not in names]
    for name in [*names, *others]:
        values = [found.get(name) for found in everyone]
        if len(set(values)) == 1:
            continue
        contents = [value and value.content for value in values]
        if len(set(contents)) > 1:
            ranks, than = _odd_ones(contents)
            raise ValueError(
                f"model: expected the same whole model on every rank, received {name!r} that differs on {ranks} from "
                f"{than}; set the same seed on every rank before the model is built, or load the same weights on every "
                "rank"
            )
        ranks, than = _odd_ones([value and value.requires_grad for value in values])
        raise ValueError(
            f"model: expected the same whole model on every rank, received {name!r} whose requires_grad differs on "
            f"{ranks} from {than}; freeze the same parameters on every rank"
        )
    raise ValueError(
        "model: expected the same whole model on every rank, received the same parameters in another order; build it "
        "by the same code on every rank"
    )


def _odd_ones(values: Sequence[object]) -> tuple[str, str]:
    """Return the ranks whose values are not the most frequent one, and from which they differ, for a message."""
    (common, count), *rest = Counter(values).most_common()
    tied = bool(rest) and rest[0][1] == count
    ranks = [rank for rank, value in enumerate(values) if tied or value != common]
    told = f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}"
    return told, "each other" if tied else "the others"


def check_replicas(model: nn.Module, *, step: int) -> None:
    """Compare each parameter among the ranks that hold the same part of it; every rank calls it.

    One reduction of two numbers a parameter on each axis along which something is replicated, and an exchange of one
    number for a parameter that two stages of a pipeline hold.

    Args:
        model: parallelized; parameters that are no DTensors are not compared.
        step: for the message.

    Raises:
        DriftError: on every rank, naming the first parameter that differs, in the order of ``named_parameters``.
    """
    parameters = [(name, p) for name, p in model.named_parameters() if isinstance(p, DTensor)]
    sums = [checksum(p.to_local()) for _, p in parameters]
    drifted: tuple[str, str, list[int]] | None = None
    for axis, group, members in _replicated(parameters):
        mine = torch.stack([sums[i] for i in members])
        both = torch.stack([mine, -mine])
        dist.all_reduce(both, op=dist.ReduceOp.MAX, group=group)
        # The largest equals the smallest, which is minus the largest of the negatives.
        differs = (both[0] != -both[1]).nonzero().flatten().tolist()
        if differs:
            first = members[differs[0]]
            found = parameters[first][0], axis, _minority(sums[first], group)
            if drifted is None or first < [name for name, _ in parameters].index(drifted[0]):
                drifted = found
    copies = _drifted_copies(model)  # every rank takes part, whatever it has found
    _raise_together(drifted or copies, step)


def _drifted_copies(model: nn.Module) -> tuple[str, str, list[int]] | None:
    """Return the first parameter that this rank shares with another stage of the pipeline and that differs there."""
    pipeline = model.pipeline if isinstance(model, PipelinedModel) else None
    if pipeline is None:
        return None
    for name, ranks in pipeline.parts.shared.items():
        mine = checksum(_local(model.get_parameter(name)))
        found = [other.item() for other in pipeline.exchange(mine, ranks)]
        if len(set(found)) > 1:
            return name, "pp", [dist.get_global_rank(pipeline.group, rank) for rank in ranks]
    return None


def _local(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _replicated(parameters: Sequence[tuple[str, DTensor]]) -> Iterator[tuple[str, dist.ProcessGroup, list[int]]]:
    """Yield each axis, its group, and the parameters replicated along it, in the same order on every rank."""
    groups: dict[tuple[int, str], tuple[dist.ProcessGroup, list[int]]] = {}
    for index, (_, parameter) in enumerate(parameters):
        mesh = parameter.device_mesh
        for dim, placement in enumerate(parameter.placements):
            if placement.is_replicate() and mesh.size(dim) > 1:
                group = mesh.get_group(dim)
                name = (mesh.mesh_dim_names or [str(i) for i in range(mesh.ndim)])[dim]
                groups.setdefault((dim, name), (group, []))[1].append(index)
    for (_, name), (group, members) in groups.items():
        yield name, group, members


def _minority(mine: torch.Tensor, group: dist.ProcessGroup) -> list[int]:
    """Return the global ranks of the group whose checksum is not the most frequent one; all of them where none is."""
    found = [torch.empty_like(mine) for _ in range(dist.get_world_size(group))]
    dist.all_gather(found, mine, group=group)
    values = [value.item() for value in found]
    (common, count), *others = Counter(values).most_common()
    ranks = dist.get_process_group_ranks(group)
    tied = bool(others) and others[0][1] == count
    return [rank for rank, value in zip(ranks, values, strict=True) if tied or value != common]


def _raise_together(drifted: tuple[str, str, list[int]] | None, step: int) -> None:
    """Raise on every rank if any has found something; the ranks of other groups have not seen it."""
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, drifted)
    told = [item for item in found if item is not None]
    if told:
        name, axis, _ = told[0]
        ranks = sorted({rank for other, _, ranks in told if other == name for rank in ranks})
        raise DriftError(
            f"step {step}: replicas of parameter {name!r} along {axis} differ: rank {', '.join(map(str, ranks))} from "
            "the rest, or of two from each other. Go on from the last checkpoint, if there is one, with --resume; if "
            "it comes again on the same rank, suspect its hardware"
        )


@dataclass(frozen=True, order=True)
class Finding:
    """The first place where this rank saw a number that is not finite; the smallest of all ranks' is its origin."""

    phase: int  # 0 a parameter, 1 the forward, 2 the backward
    stage: int  # of the pipeline, in the order in which the phase passes through it
    order: int  # of what this rank did in the phase
    name: str

    def __str__(self) -> str:
        kind = ("in parameter", "in the output of module", "in the gradient of parameter")[self.phase]
        return f"{kind} {self.name!r}"


def find_non_finite(model: nn.Module, run: Callable[[], object], *, stage: int = 0) -> str:
    """Repeat a step's forward and backward, and return where the first number that is not finite comes from.

    Every rank calls it; model and data must be as they were. Gradients are looked at on each rank by itself, before
    they are summed over replicas, after which all of them would be bad.

    Args:
        run: the forward and backward.
        stage: of the pipeline that this rank holds.

    Returns:
        "rank 2, in the gradient of parameter 'layers.0.mlp.up.weight'", or that it did not come again.
    """
    with _watched(model, stage) as findings:
        run()
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, min(findings, default=None))
    found = [item for item in everyone if item is not None]
    if not found:
        return "nowhere, when the step was done again: suspect the hardware of the rank"
    first = min(found)
    ranks = [rank for rank, item in enumerate(everyone) if item == first]
    return f"on rank {', '.join(map(str, ranks))}, {first}"


@contextmanager
def _watched(model: nn.Module, stage: int) -> Iterator[list[Finding]]:
    """Record in the list, by hooks on the model within the block, where each phase first saw a bad number."""
    findings: list[Finding] = []
    counts = [0, 0, 0]
    handles: list[Any] = []

    def record(phase: int, name: str, bad: bool) -> None:
        counts[phase] += 1
        if bad and not any(found.phase == phase for found in findings):
            findings.append(Finding(phase, -stage if phase == 2 else stage, counts[phase], name))

    def after(name: str, module: nn.Module, inputs: Any, output: Any) -> None:
        record(1, name, _is_bad(output) and not _is_bad(inputs))

    def before(name: str, module: nn.Module, inputs: Any) -> None:
        # Only here, within the forward, are a sharded module's parameters whole, and leaves of the graph.
        for own, parameter in module.named_parameters(recurse=False):
            if parameter.requires_grad and torch.is_grad_enabled():
                full = f"{name}.{own}" if name else own
                handles.append(parameter.register_hook(partial(on_gradient, full)))

    def on_gradient(name: str, gradient: torch.Tensor) -> None:
        record(2, name, _is_bad(gradient))

    for name, parameter in model.named_parameters():
        record(0, name, _is_bad(parameter))
    for name, module in model.named_modules():
        handles.append(module.register_forward_pre_hook(partial(before, name)))
        if not list(module.children()):
            handles.append(module.register_forward_hook(partial(after, name)))
    try:
        yield findings
    finally:
        for handle in handles:
            handle.remove()


def _is_bad(value: Any) -> bool:
    """Return whether a tensor, or one in a tuple or list, holds a number that is not finite, on this rank."""
    if isinstance(value, (tuple, list)):
        return any(_is_bad(item) for item in value)
    if not isinstance(value, torch.Tensor) or not value.dtype.is_floating_point:
        return False
    return not bool(torch.isfinite(_local(value.detach())).all())
