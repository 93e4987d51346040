"""Layer: kernels, one process, CPU, no interpreter. What a CUDA graph needs of attention's host code.

A graph replays the launches that were recorded, whatever its tensors hold by then. So the host code must not read a
tensor's contents, must not upload anything, and must launch the same for any contents. Launches are recorded and do not
run. Fake tensors have no contents to read: what runs on them has read none, and what it launched is then compared with
the launches for real tensors of different contents.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from fusemesh import Origin, flash_attention, flash_attention_decode, flash_attention_varlen
from fusemesh.kernels import op_rules
from fusemesh.kernels.attention.gpu import backward as triton_backward
from fusemesh.kernels.attention.gpu import decode as triton_decode
from fusemesh.kernels.attention.gpu import forward as triton_forward
from fusemesh.kernels.runtime import launch
from fusemesh.kernels.runtime.launch import TARGETS, any_device

B, H, Hkv, Sq, Sk, D, Dv = 2, 4, 2, 130, 200, 64, 48
BF16, FP32, INT32, INT64, BOOL = torch.bfloat16, torch.float32, torch.int32, torch.int64, torch.bool
FORWARD = ["attention_forward_kernel"]
BACKWARD = [*FORWARD, "attention_delta_kernel", "attention_dkdv_kernel", "attention_dq_kernel"]
DECODE = ["decode_append_kernel", "decode_append_kernel", "decode_split_kernel", "decode_combine_kernel"]
Make = Callable[..., torch.Tensor]  # of shape and dtype


class HostOnly(TorchDispatchMode):
    """Runs the bodies of our ops on fake tensors in place of their fakes, and fails where data would be uploaded."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.namespace == "fusemesh":
            with self:
                return op_rules.FUNCTIONS[func._schema.name.split("::")[1]](*args, **kwargs)
        # What torch.tensor and torch.as_tensor end in; on a GPU it is followed by a copy that waits.
        assert func is not torch.ops.aten.lift_fresh.default, "data of the host was made a tensor"
        return func(*args, **kwargs)


@contextmanager
def recording() -> Iterator[list[Any]]:
    """(kernel, grid, arguments, constants) of every launch within the block, tensors by what a launch sees of them."""
    found: list[Any] = []

    def seen(x: Any) -> Any:
        if isinstance(x, torch.Tensor):
            return "tensor", tuple(x.shape), x.stride(), x.dtype
        return tuple(seen(item) for item in x) if isinstance(x, tuple) else x

    def hook(kernel: Any, grid: tuple[int, ...], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        found.append((kernel.__name__, grid, seen(args), kwargs))

    with any_device(), launch.assume_target(TARGETS["sm_90"]), launch.intercept(hook):
        yield found


def train(call: Callable[..., Any], tensors: list[torch.Tensor], **options: Any) -> None:
    """One forward and the gradients of everything that has some, dlse included."""
    leaves = [x.requires_grad_() for x in (*tensors, options.get("bias"), options.get("sinks")) if x is not None]
    out, lse = call(*tensors, **options, return_lse=True, backend="triton")
    torch.autograd.grad([out, lse], leaves, [torch.empty_like(out), torch.empty_like(lse)])


def batched(make: Make) -> list[torch.Tensor]:
    return [make((B, H, Sq, D)), make((B, Hkv, Sk, D)), make((B, Hkv, Sk, Dv))]


def everything(make: Make, sq: int, sk: int) -> dict[str, Any]:
    """Every feature that batches and packed sequences share, with all of its numbers on the device."""
    return {
        "causal": True,
        "window": (50, None),
        "mask": make((B, 1, sq, sk), BOOL),
        "bias": make((1, H, 1, sk)),
        "alibi_slopes": make((B, H), FP32),
        "softcap": 20.0,
        "sinks": make((H,)),
        "dropout_p": 0.1,
        "seed": make((1,), INT64),
    }


def dense(make: Make) -> None:
    at = Origin(*(make((1,), INT64).reshape(()) for _ in range(4)))
    train(flash_attention, batched(make), origin=at, **everything(make, Sq, Sk))


def masked(make: Make) -> None:
    train(flash_attention, batched(make), mask=make((B, H, Sq, Sk), BOOL))


def biased(make: Make) -> None:
    train(flash_attention, batched(make), bias=make((B, H, Sq, Sk), FP32))


def drawn_seed(make: Make) -> None:
    train(flash_attention, batched(make), dropout_p=0.1, align="top_left")


def fp8(make: Make) -> None:
    q, k, v = (x.to(torch.float8_e4m3fn) for x in batched(make))
    flash_attention(q, k, v, descale=(make((1,), FP32), make((B, Hkv), FP32), 0.5), backend="triton")


def packed(make: Make) -> None:
    tensors = [
        make((300, H, D)),
        make((400, Hkv, D)),
        make((400, Hkv, Dv)),
        make((B + 1,), INT32),
        make((B + 1,), INT32),
    ]
    options = {"align": "bottom_right", **everything(make, Sq, Sk)}

    def call(q: Any, k: Any, v: Any, **options: Any) -> Any:
        return flash_attention_varlen(q, k, v, *tensors[3:], Sq, Sk, **options)

    train(call, tensors[:3], **options)


def contiguous_cache(make: Make) -> None:
    cache, new = (make((B, Hkv, 1024, D)), make((B, Hkv, 1024, Dv))), (make((B, Hkv, 2, D)), make((B, Hkv, 2, Dv)))
    more = {"cache_lens": make((B,), INT32), "cache_starts": make((B,), INT64), "k_new": new[0], "v_new": new[1]}
    with torch.no_grad():
        flash_attention_decode(make((B, H, 2, D)), *cache, **more, backend="triton")


def paged_cache(make: Make) -> None:
    pages, new = (make((50, Hkv, 64, D)), make((50, Hkv, 64, Dv))), (make((B, Hkv, 1, D)), make((B, Hkv, 1, Dv)))
    more = {"cache_lens": make((B,), INT64), "block_table": make((B, 16), INT32), "k_new": new[0], "v_new": new[1]}
    options = {name: x for name, x in everything(make, 1, 1024).items() if name not in ("dropout_p", "seed")}
    with torch.no_grad():
        flash_attention_decode(make((B, H, 1, D)), *pages, **more, **options, align="bottom_right", backend="triton")


# name -> the call, and kernels that it must have launched (others may join: those of the bias's gradient)
CASES: dict[str, tuple[Callable[[Make], None], list[str]]] = {
    "dense": (dense, BACKWARD),
    "mask": (masked, BACKWARD),
    "bias": (biased, BACKWARD),
    "drawn_seed": (drawn_seed, BACKWARD),
    "fp8": (fp8, FORWARD),
    "packed": (packed, BACKWARD),
    "decode": (contiguous_cache, DECODE),
    "decode_paged": (paged_cache, DECODE),
}


def without_contents(run: Callable[[Make], None]) -> list[Any]:
    """The launches of a call on fake tensors."""

    def make(shape: tuple[int, ...], dtype: torch.dtype = BF16) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype)

    with recording() as found, FakeTensorMode(), HostOnly():
        run(make)
    return found


def with_contents(run: Callable[[Make], None], largest: int) -> list[Any]:
    """The launches of a call on tensors that hold whole numbers up to ``largest``."""

    def make(shape: tuple[int, ...], dtype: torch.dtype = BF16) -> torch.Tensor:
        return torch.randint(0, largest + 1, shape).to(dtype)

    with recording() as found:
        run(make)
    return found


@pytest.mark.parametrize("name", CASES)
def test_launches_depend_on_no_contents(name: str) -> None:
    run, kernels = CASES[name]
    launches = without_contents(run)
    names = [kernel for kernel, *_ in launches]
    assert [kernel for kernel in names if kernel in kernels] == kernels, names
    for largest in (0, 1, 300):
        assert with_contents(run, largest) == launches


def planted(monkeypatch: pytest.MonkeyPatch, module: Any, name: str, before: Callable[..., None]) -> None:
    """Make ``module.name`` do something with its arguments first."""
    original = getattr(module, name)

    def changed(*args: Any, **kwargs: Any) -> Any:
        before(*args, **kwargs)
        return original(*args, **kwargs)

    monkeypatch.setattr(module, name, changed)


PLACES = {
    "dense": (triton_forward, "describe_call", lambda q, k, v, call: call.seed),
    "drawn_seed": (triton_backward, "describe_call", lambda q, k, v, call, **options: call.seed),
    "packed": (triton_backward, "describe_call", lambda q, k, v, call, **options: call.packed.cu_q),
    "decode": (triton_decode, "decode", lambda call: call.cache_lens),
}


@pytest.mark.parametrize("how", ["item", "branch", "shape", "list"])
@pytest.mark.parametrize("name", PLACES)
def test_a_read_is_found(name: str, how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Planted in the host code, each way of looking at a tensor's contents fails."""
    module, function, tensor_of = PLACES[name]
    reads: dict[str, Callable[[torch.Tensor], Any]] = {
        "item": lambda x: x.flatten()[0].item(),
        "branch": lambda x: 1 if (x > 0).any() else 0,
        "shape": lambda x: [0] * x.nonzero().shape[0],
        "list": lambda x: x.tolist(),
    }
    planted(monkeypatch, module, function, lambda *args, **options: reads[how](tensor_of(*args, **options)))
    with pytest.raises((DataDependentOutputException, DynamicOutputShapeException)):
        without_contents(CASES[name][0])


@pytest.mark.parametrize("name", PLACES)
def test_an_upload_is_found(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module, function, _ = PLACES[name]
    planted(monkeypatch, module, function, lambda *args, **options: torch.tensor([1, 2]))
    with pytest.raises(AssertionError, match="data of the host"):
        without_contents(CASES[name][0])


def test_a_launch_that_follows_contents_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that came by the contents in a way that fakes do not see."""
    original = triton_forward.launch

    def changed(kernel: Any, grid: tuple[int, ...], views: tuple[Any, ...], *args: Any, **kwargs: Any) -> None:
        original(kernel, (grid[0] + int(views[0].any()),), views, *args, **kwargs)

    monkeypatch.setattr(triton_forward, "launch", changed)
    assert with_contents(masked, 0) != with_contents(masked, 300)
