"""Faults that trials as a new user found, each shown through the public API alone.

It imports nothing else of the project, so that this file can be run against older versions, too, and shows there what
was wrong. Where the mend is a function that is new (``check_score_mod``), the older version does not know its name.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.autograd import forward_ad

import fusemesh
from fusemesh.integrations import flash_attn

pytestmark = pytest.mark.slow

TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")


def python(code: str, folder: Path, *launcher: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run a script in a process of its own, in this folder, or by a launcher's module."""
    (folder / "script.py").write_text(textwrap.dedent(code))
    environ = {**os.environ, "OMP_NUM_THREADS": "1", **variables}
    command = [sys.executable, *launcher, "script.py"]
    return subprocess.run(command, capture_output=True, text=True, timeout=140, env=environ, cwd=folder)


ON_TWO_RANKS = """
    import json, torch, torch.distributed as dist, transformers, fusemesh
    from torch import nn
    from torch.distributed.device_mesh import init_device_mesh
    from fusemesh.integrations.transformers import register

    register()
    dist.init_process_group("gloo")
    rank, ids = dist.get_rank(), torch.arange(14).reshape(2, 7)
    sizes = dict(hidden_size=32, num_attention_heads=4, num_hidden_layers=2, intermediate_size=48, vocab_size=40)

    def llama(**more):
        torch.manual_seed(0)
        config = transformers.LlamaConfig(**sizes, attn_implementation="fusemesh", **more)
        return transformers.LlamaForCausalLM(config)

    def place(model, text):
        layout = fusemesh.Layout.parse(text)
        mesh = init_device_mesh("cpu", layout.shape, mesh_dim_names=("pp", "dp", "fsdp", "cp", "tp"))
        return fusemesh.parallelize(model, mesh, layout)

    def table():
        place(nn.Sequential(nn.Linear(8, 8)), "tp2")

    def replicas():
        torch.manual_seed(rank)
        place(nn.Linear(4, 4), "dp2")

    def loss(model):
        torch.manual_seed(3)
        with fusemesh.use_backend("reference"):
            return model(ids, labels=ids, use_cache=False).loss.item()

    def dropout():
        model = llama(attention_dropout=0.5).train()
        alone = loss(model)
        return f"differs by {abs(loss(place(model, 'tp2')) - alone):.4f}"

    def save():
        model = llama().eval()
        want = model(ids).logits
        place(model, "tp2").save_pretrained("saved")
        dist.barrier()
        found = transformers.LlamaForCausalLM.from_pretrained("saved").eval()
        return f"differs by {(found(ids).logits - want).abs().max().item():.4f}"

    cases = {
        "without a table": table,
        "replicas of other weights": replicas,
        "dropout under tp": dropout,
        "a saved model": save,
    }
    results = {}
    for name, case in cases.items():
        try:
            results[name] = str(case())
        except Exception as error:
            results[name] = f"{type(error).__name__}: {error}"
    if rank == 0:
        json.dump(results, open("results.json", "w"))
"""


@pytest.fixture(scope="module")
def on_two_ranks(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What each case gave on rank 0 of two."""
    folder = tmp_path_factory.mktemp("ranks")
    done = python(ON_TWO_RANKS, folder, *TORCHRUN)
    assert (folder / "results.json").is_file(), done.stderr
    results: dict[str, str] = json.loads((folder / "results.json").read_text())
    return results


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("case", "expected"),
    [
        ("without a table", "tensor-parallel table"),
        ("replicas of other weights", "differs on ranks"),
        ("dropout under tp", "differs by 0.0000"),
        ("a saved model", "differs by 0.0000"),
    ],
)
def test_a_model_on_a_mesh(case: str, expected: str, on_two_ranks: dict[str, str]) -> None:
    assert expected in on_two_ranks[case]


SCRIPTS = {
    "compiling in a second block": """
    import torch, fusemesh
    from torch import nn
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(64, 4, 128, batch_first=True), 2).eval()
    x, pad = torch.randn(2, 5, 64), torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    with fusemesh.accelerate():
        want = model(x, src_key_padding_mask=pad)
    with fusemesh.accelerate():
        found = torch.compile(model, fullgraph=True, backend="eager")(x, src_key_padding_mask=pad)
    torch.testing.assert_close(found, want)
    """,
    "a forked child of two threads": """
    import os, signal, torch, fusemesh
    torch.set_num_threads(2)
    q = torch.randn(1, 8, 256, 32)
    fusemesh.flash_attention(q, q, q, backend="cpu")
    if os.fork() == 0:
        signal.alarm(20)
        torch.set_num_threads(2)
        fusemesh.flash_attention(q, q, q, backend="cpu")
        os._exit(0)
    assert os.wait()[1] == 0
    """,
    "an error in the interpreter, a wrong backward": r"""
    import pytest, torch, triton, fusemesh
    import triton.language as tl

    @triton.jit
    def double(b_s, i_b, i_h, i_q, i_k, aux, numbers):
        return 2 * b_s

    @triton.jit
    def broken(b_s, i_b, i_h, i_q, i_k, aux, numbers):
        return b_s + numbers[3]

    @triton.jit
    def triple(b_ds, b_s, i_b, i_h, i_q, i_k, aux, numbers):
        return 3 * b_ds

    mods = [fusemesh.ScoreMod(str(f), f, triple, lambda s, i_b, i_h, i_q, i_k: 2 * s) for f in (double, broken)]
    q = torch.randn(1, 1, 4, 16)
    wrong, broken = map(fusemesh.register_score_mod, mods)
    with pytest.raises(Exception, match=r"(?s).*return b_s \+ numbers\[3\]$"):
        fusemesh.flash_attention(q, q, q, score_mod=broken(), backend="triton")
    with pytest.raises(ValueError, match="backward: expected"):
        fusemesh.check_score_mod(wrong())
    """,
}


@pytest.mark.parametrize("fault", list(SCRIPTS))
def test_a_process_with(fault: str, tmp_path: Path) -> None:
    done = python(SCRIPTS[fault], tmp_path, TRITON_INTERPRET="1" if "interpreter" in fault else "0")
    assert done.returncode == 0, done.stderr


def test_a_forward_on_meta_inside_accelerate() -> None:
    with torch.device("meta"), fusemesh.accelerate():
        layer = nn.TransformerEncoderLayer(64, 4, 128, batch_first=True).eval()
        assert layer(torch.empty(2, 5, 64)).shape == (2, 5, 64)


def test_scores_that_are_stored_are_said() -> None:
    q = torch.randn(1, 2, 4096, 8, dtype=torch.float64)
    with pytest.warns(UserWarning, match="MiB"):
        fusemesh.flash_attention(q, q, q, window=(3, 3))


def test_heads_in_the_place_of_lengths_are_named() -> None:
    with pytest.raises(ValueError, match="heads second"):
        fusemesh.flash_attention(torch.ones(2, 16, 8, 32), *torch.ones(2, 2, 16, 2, 32), causal=True)


Q, K, V = torch.randn(3, 2, 2, 5, 8, generator=torch.Generator().manual_seed(0))
CU = torch.tensor([0, 2, 5], dtype=torch.int32)
SIZES = {"vocab_size": 40, "hidden_size": 32, "num_layers": 1, "num_heads": 4, "num_kv_heads": 2}
Function = Callable[[torch.Tensor], torch.Tensor]


def model_output(backend: str) -> Function:
    """Our model's outputs as a function of a factor of all its parameters."""
    config = fusemesh.TransformerConfig(**SIZES, intermediate_size=48, max_sequence_length=16)
    model = fusemesh.Transformer(config, backend)
    weights, ids = dict(model.named_parameters()), torch.arange(6)[None]
    return lambda x: torch.func.functional_call(model, {n: w * (1 + x.mean()) for n, w in weights.items()}, (ids,))


def packed(backend: str) -> Function:
    k, v = K[0].transpose(0, 1), V[0].transpose(0, 1)
    return lambda q: fusemesh.flash_attention_varlen(q[0].transpose(0, 1), k, v, CU, CU, 3, 3, backend=backend)


def dual(f: Function) -> torch.Tensor | None:
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(f(forward_ad.make_dual(Q, V))).tangent


TRANSFORMS: dict[str, Callable[[Function], Any]] = {
    "jvp": lambda f: torch.func.jvp(f, (Q,), (V,))[1],
    "dual": dual,
    "grad": lambda f: torch.func.grad(lambda q: f(q).square().sum())(Q),
    "samples": lambda f: torch.func.vmap(torch.func.grad(lambda q: f(q[None]).square().sum()))(Q),
}


@pytest.mark.parametrize("transform", list(TRANSFORMS))
@pytest.mark.parametrize("function", ["attention", "packed", "model"])
def test_transforms_give_the_formulas_derivatives(function: str, transform: str) -> None:
    functions: dict[str, Callable[[str], Function]] = {
        "attention": lambda backend: lambda q: fusemesh.flash_attention(q, K[: len(q)], V[: len(q)], backend=backend),
        "packed": packed,
        "model": model_output,
    }
    found, want = (TRANSFORMS[transform](functions[function](backend)) for backend in ("auto", "reference"))
    assert want.abs().max() > 1e-3
    torch.testing.assert_close(found, want)


@pytest.mark.parametrize("window", [torch.tensor([2, 0]), np.array([2, 0])], ids=["tensor", "numpy"])
def test_a_window_as_flash_attn_takes_it(window: Any) -> None:
    want = flash_attn.flash_attn_func(Q, K, V, window_size=(2, 0))
    torch.testing.assert_close(flash_attn.flash_attn_func(Q, K, V, window_size=window), want)


def test_probabilities_with_dropout_have_signs() -> None:
    out, _, signed = flash_attn.flash_attn_func(Q, K, V, 0.5, return_attn_probs=True)
    kept = torch.where(signed > 0, 2 * signed, 0)
    assert (signed < 0).any()
    torch.testing.assert_close((kept @ V.transpose(1, 2)).transpose(1, 2), out)
