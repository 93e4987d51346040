"""Layer: kernels, one process, CPU, no interpreter. Extra memory of flash_attention on the Triton backend is O(S * D).

Launches are recorded and do not run, so that long sequences cost nothing; the inputs' memory is never touched. Every
allocation of the host code, forward and backward, is read from PyTorch's profiler, which sits in the allocator and so
sees what ops allocate inside, too. Tiles are those of a GPU: of a mask, 8 bytes for each tile are written down.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch

from fusemesh import MultiheadAttention, flash_attention
from fusemesh.kernels.attention.gpu import backward as triton_backward
from fusemesh.kernels.attention.gpu import dense as gpu_dense
from fusemesh.kernels.attention.gpu import forward as triton_forward
from fusemesh.kernels.runtime import launch
from fusemesh.kernels.runtime.launch import any_device

B, H, D = 2, 2, 16
LENGTHS = (4096, 8192, 16384)
SLOPES = torch.tensor([0.5, 0.25])


def allocations(run: Callable[[], Any]) -> tuple[list[int], list[str]]:
    """Bytes of every allocation that ``run`` makes on the CPU, and the names of the kernels that it launches."""
    kernels: list[str] = []

    def hook(kernel: Any, grid: tuple[int, ...], args: Any, kwargs: Any) -> None:
        kernels.append(kernel.__name__)

    target = launch.assume_target(launch.TARGETS["sm_90"])
    with any_device(), target, launch.intercept(hook), torch.autograd.profiler.profile(profile_memory=True) as profile:
        run()
    assert profile.kineto_results is not None
    events = profile.kineto_results.events()
    return [event.nbytes() for event in events if event.name() == "[memory]" and event.nbytes() > 0], kernels


def leaf(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, requires_grad=True)


def bias_of(dims: str, S: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    whole = {"b": B, "h": H, "m": S, "n": S}
    return leaf(*(size if name in dims else 1 for name, size in whole.items()), dtype=dtype)


# name -> the options of flash_attention at length S; "kv_heads", "dlse" and "dtype" are this file's own
Features = dict[str, Callable[[int], dict[str, Any]]]
FEATURES: Features = {
    "plain": lambda S: {},
    "fp32": lambda S: {"dtype": torch.float32},
    "causal": lambda S: {"causal": True},
    "window": lambda S: {"window": (100, 5)},
    "gqa": lambda S: {"kv_heads": 1},
    "dlse": lambda S: {"dlse": True},
    "mask": lambda S: {"mask": torch.empty(1, 1, S, S, dtype=torch.bool)},
    "mask_of_heads": lambda S: {"mask": torch.empty(1, H, S, S, dtype=torch.bool)},
    "mask_of_keys": lambda S: {"mask": torch.empty(S, dtype=torch.bool)},
    "mask_expanded": lambda S: {"mask": torch.empty(B, 1, 1, S, dtype=torch.bool).expand(B, H, S, S)},
    "bias_expanded": lambda S: {"bias": leaf(B, 1, 1, S).expand(B, H, S, S)},
    "softcap": lambda S: {"softcap": 20.0},
    "alibi": lambda S: {"alibi_slopes": SLOPES},
    "sinks": lambda S: {"sinks": leaf(H, dtype=torch.float32)},
    "dropout": lambda S: {"dropout_p": 0.1},
    "everything": lambda S: {
        "causal": True,
        "window": (1000, None),
        "kv_heads": 1,
        "dlse": True,
        "mask": torch.empty(S, dtype=torch.bool),
        "bias": bias_of("hn", S),
        "softcap": 20.0,
        "alibi_slopes": SLOPES,
        "sinks": leaf(H),
        "dropout_p": 0.1,
    },
}
BIASES = ["", "b", "h", "m", "n", "hm", "hn", "bm", "bn", "bhm", "bhn", "mn", "hmn", "bmn", "bhmn"]


def measure(S: int, options: dict[str, Any]) -> list[int]:
    """Bytes of every allocation of one forward and backward; every kernel that it needs was launched."""
    options = dict(options)
    dtype, kv_heads, dlse = options.pop("dtype", torch.bfloat16), options.pop("kv_heads", H), options.pop("dlse", False)
    q, k, v = leaf(B, H, S, D, dtype=dtype), leaf(B, kv_heads, S, D, dtype=dtype), leaf(B, kv_heads, S, D, dtype=dtype)
    inputs = [q, k, v, *(x for x in (options.get("bias"), options.get("sinks")) if x is not None)]
    do, d = torch.empty(B, H, S, D, dtype=dtype), torch.empty(B, H, S)

    def run() -> None:
        out, lse = flash_attention(q, k, v, backend="triton", return_lse=True, **options)
        outputs, gradients = ([out, lse], [do, d]) if dlse else ([out], [do])
        torch.autograd.grad(outputs, inputs, gradients)

    sizes, kernels = allocations(run)
    assert len(kernels) >= 4, kernels  # forward, delta, dk and dv, dq
    return sizes


def check(
    sizes_at: Callable[[int], list[int]],
    allowed: Callable[[int], int | None] = lambda S: None,
    lengths: tuple[int, ...] = LENGTHS,
) -> None:
    """Assert that allocations grow with S as S does, and that none is S x S, but for one of ``allowed(S)`` bytes.

    An allocation of S * S bytes is a matrix of the smallest elements there are.
    """
    totals = []
    for S in lengths:
        sizes = sizes_at(S)
        own = allowed(S)
        if own is not None:
            assert own in sizes, f"S={S}: the allocation of {own} bytes that is allowed is not among {sorted(sizes)}"
            sizes.remove(own)
        assert sizes and max(sizes) < S * S, f"S={S}: an allocation of {max(sizes)} bytes among {sorted(sizes)}"
        totals.append(sum(sizes))
    for shorter, longer in itertools.pairwise(totals):
        assert longer <= 2.1 * shorter, f"bytes at S = {lengths}: {totals}"


@pytest.mark.parametrize("feature", FEATURES)
def test_each_feature(feature: str) -> None:
    check(lambda S: measure(S, FEATURES[feature](S)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
@pytest.mark.parametrize("dims", BIASES)
def test_bias_with_gradient(dims: str, dtype: torch.dtype) -> None:
    """In every broadcast form; where the bias is S x S itself, so is its gradient, and nothing else is."""

    def gradient(S: int) -> int | None:
        return bias_of(dims, S, dtype).nbytes if "m" in dims and "n" in dims else None

    check(lambda S: measure(S, {"bias": bias_of(dims, S, dtype)}), gradient)


@pytest.mark.parametrize("module", [triton_forward, triton_backward], ids=["forward", "backward"])
@pytest.mark.parametrize(("share", "message"), [(1, "an allocation of"), (64, "bytes at S")])
def test_a_matrix_of_scores_is_seen(module: Any, share: int, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Planted in the host code of the kernels, a byte for each score, or for every 64th, breaks the check."""
    name = module.__name__.rpartition(".")[2]
    original = getattr(module, name)

    def wasteful(*args: Any, **kwargs: Any) -> Any:
        S = args[1].shape[2]
        torch.empty(S * S // share, dtype=torch.bool)
        return original(*args, **kwargs)

    monkeypatch.setattr(gpu_dense, name, wasteful)
    with pytest.raises(AssertionError, match=message):
        check(lambda S: measure(S, {}))


def measure_module(S: int, options: dict[str, Any]) -> list[int]:
    """The same for one forward and backward of MultiheadAttention, with its projections."""
    E = H * D
    module = MultiheadAttention(E, H, batch_first=True, dtype=torch.bfloat16, backend="triton")
    x = torch.zeros(B, S, E, dtype=torch.bfloat16, requires_grad=True)
    do = torch.zeros(B, S, E, dtype=torch.bfloat16)

    def run() -> None:
        out, weights = module(x, x, x, need_weights=False, **options)
        assert weights is None
        torch.autograd.grad(out, [x, *module.parameters()], do)

    sizes, kernels = allocations(run)
    assert len(kernels) >= 4, kernels
    return sizes


MODULE_FEATURES: Features = {
    "plain": lambda S: {},
    "causal_padded": lambda S: {"causal": True, "key_padding_mask": torch.zeros(B, S, dtype=torch.bool)},
    "hint": lambda S: {
        "attn_mask": torch.empty(S, S, dtype=torch.bool),
        "is_causal": True,
        "key_padding_mask": torch.zeros(B, S, dtype=torch.bool),
    },
    "expanded": lambda S: {"attn_mask": torch.zeros(S, dtype=torch.bool).expand(B * H, S, S)},
    "float": lambda S: {
        "attn_mask": torch.empty(S, S, dtype=torch.bfloat16),
        "key_padding_mask": torch.zeros(B, S, dtype=torch.bool),
    },
}


@pytest.mark.parametrize("feature", MODULE_FEATURES)
def test_module(feature: str) -> None:
    check(lambda S: measure_module(S, MODULE_FEATURES[feature](S)))


def test_module_keeps_one_copy_of_a_boolean_mask() -> None:
    """torch's mask is the opposite of flash_attention's; with the padding it takes no more memory than was given."""

    def options(S: int) -> dict[str, Any]:
        padding = torch.zeros(B, S, dtype=torch.bool)
        return {"attn_mask": torch.zeros(S, S, dtype=torch.bool), "key_padding_mask": padding}

    check(lambda S: measure_module(S, options(S)), lambda S: S * S, lengths=(2048, 4096, 8192))
