"""Layer: one process, two fresh ones. Public names of version 0.1.0 still import; moved ones tell their new name.

The lists are the imports and dotted names of README.md, README.zh-CN.md, docs/ and examples/ before modules moved into
folders.
"""

from __future__ import annotations

import importlib
import importlib.machinery
import inspect
import pickle
import pkgutil
import re
import subprocess
import sys
import warnings

import pytest
import torch

import fusemesh
from fusemesh import _moved

# Statement, and the new name of its module if that has moved.
IMPORTS = {
    "import fusemesh": None,
    "from fusemesh import Layout": None,
    "from fusemesh import config": None,
    "from fusemesh import flash_attention": None,
    "from fusemesh import flash_attention, flash_attention_decode": None,
    "from fusemesh import flash_attention, flash_attention_varlen": None,
    "from fusemesh import flash_attention, merge_attention": None,
    "from fusemesh.evaluator import checkpoint_of, evaluate_file": "fusemesh.run.evaluator",
    "from fusemesh.hybrid.checkpoint import merge": None,
    "from fusemesh.hybrid.launch import build_mesh, distributed": "fusemesh.hybrid.ranks.join",
    "from fusemesh.hybrid.launch import launch_local": "fusemesh.hybrid.ranks.join",
    "from fusemesh.hybrid.layout import Layout": None,
    "from fusemesh.integrations import transformers as fusemesh_transformers": None,
    "from fusemesh.integrations.flash_attn import flash_attn_func": None,
    "from fusemesh.kernels import aot, env": None,
    "from fusemesh.kernels import backends": None,
    "from fusemesh.kernels.launch import launch": "fusemesh.kernels.runtime.launch",
    "from fusemesh.metrics import draw_loss_curve": "fusemesh.run.metrics",
    "from fusemesh.tasks.language_model import baselines, load_corpus": None,
    "from fusemesh.trainer import prepare, train_rank": "fusemesh.run.trainer",
}
DOTTED = {
    "fusemesh.Layout.parse": None,
    "fusemesh.MultiheadAttention": None,
    "fusemesh.Sampling": None,
    "fusemesh.ScoreMod": None,
    "fusemesh.Transformer": None,
    "fusemesh.TransformerConfig": None,
    "fusemesh.accelerate": None,
    "fusemesh.flash_attention": None,
    "fusemesh.fused_linear": None,
    "fusemesh.generate": None,
    "fusemesh.install": None,
    "fusemesh.parallelize": None,
    "fusemesh.register_score_mod": None,
    "fusemesh.uninstall": None,
    "fusemesh.use_backend": None,
    "fusemesh.hybrid": None,
    "fusemesh.hybrid.pipeline_parallel.PipelinedModel": None,
    "fusemesh.hybrid.tensor_parallel": "fusemesh.hybrid.tensor.modules",
    "fusemesh.hybrid.tensor_parallel.ColumnParallelLinear": "fusemesh.hybrid.tensor.modules",
    "fusemesh.hybrid.tensor_parallel.RowParallelLinear": "fusemesh.hybrid.tensor.modules",
    "fusemesh.integrations.torch_sdpa.scaled_dot_product_attention": "fusemesh.integrations.pytorch.sdpa",
    "fusemesh.integrations.transformers.register": None,
    "fusemesh.kernels": None,
    "fusemesh.kernels.aot.compile_launches": None,
    "fusemesh.kernels.backends.call_counts": None,
    "fusemesh.kernels.backends.reset_call_counts": None,
    "fusemesh.kernels.env.INTERPRET": None,
    "fusemesh.kernels.launch.launch": "fusemesh.kernels.runtime.launch",
    "fusemesh.kernels.testing": None,
    "fusemesh.kernels.testing.interpreter.install": "fusemesh.kernels.runtime.interpreter",
    "fusemesh.kernels.testing.poison": None,
}
PROGRAMS = ("fusemesh", "fusemesh.kernels.aot")


@pytest.fixture(autouse=True)
def forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    """Old names are imported anew."""
    for old in _moved.MOVED:
        monkeypatch.delitem(sys.modules, old, raising=False)


def moved_in(run: object) -> list[str]:
    """Return the warnings of a call that name a new place of a module of ours."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run()  # type: ignore[operator]
    return [
        str(w.message) for w in caught if issubclass(w.category, DeprecationWarning) and "has moved" in str(w.message)
    ]


def expected(old: str, new: str | None) -> list[str]:
    return [] if new is None else [f"{old} has moved: import {new}"]


@pytest.mark.parametrize("statement", IMPORTS)
def test_public_imports_work(statement: str) -> None:
    new = IMPORTS[statement]
    assert moved_in(lambda: exec(statement, {})) == expected(statement.split()[1], new)


@pytest.mark.parametrize("name", DOTTED)
def test_public_dotted_names_exist(name: str) -> None:
    new = DOTTED[name]
    old = next((old for old in _moved.MOVED if f"{name}.".startswith(f"{old}.")), "")
    assert moved_in(lambda: pkgutil.resolve_name(name)) == expected(old, new)


@pytest.mark.filterwarnings("ignore:.* has moved")
@pytest.mark.parametrize("old", sorted(_moved.MOVED))
def test_old_and_new_name_are_one_module(old: str) -> None:
    assert importlib.import_module(old) is importlib.import_module(_moved.MOVED[old])


@pytest.mark.filterwarnings("ignore:.* has moved")
@pytest.mark.parametrize("old", sorted(_moved.MOVED))
def test_no_module_stands_at_an_old_name(old: str) -> None:
    """The finder comes last: a module there would hide the redirect."""
    parent = importlib.import_module(old.rpartition(".")[0])
    assert importlib.machinery.PathFinder.find_spec(old, parent.__path__) is None


def test_the_warning_names_the_line_that_imports() -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        from fusemesh.metrics import draw_loss_curve  # noqa: F401
    (warning,) = (w for w in caught if "has moved" in str(w.message))
    assert warning.filename == __file__


def test_an_absent_module_is_absent_still() -> None:
    with pytest.raises(ModuleNotFoundError, match=r"fusemesh\.nowhere"):
        importlib.import_module("fusemesh.nowhere")


@pytest.mark.parametrize("program", PROGRAMS)
def test_programs_run(program: str) -> None:
    command = [sys.executable, "-W", "always::DeprecationWarning", "-m", program, "--help"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and done.stdout.startswith("usage: "), done.stderr
    assert "has moved" not in done.stderr


def _documented(text: str) -> list[str]:
    """The first name of each entry under Args of a docstring."""
    block = re.search(r"\n( *)Args:\n(.*?)(?:\n\n|\Z)", text, re.DOTALL)
    if block is None:
        return []
    indent = len(block[1]) + 4
    return re.findall(rf"^ {{{indent}}}(\w+)[^:\n]*:", block[2], re.MULTILINE)


@pytest.mark.parametrize("name", fusemesh.__all__)
def test_arguments_are_documented_in_the_order_of_the_signature(name: str) -> None:
    value = getattr(fusemesh, name)
    if not callable(value):
        return
    order = list(inspect.signature(value).parameters)
    names = [argument for argument in _documented(inspect.getdoc(value) or "") if argument in order]
    assert names == sorted(names, key=order.index)


@pytest.mark.parametrize("name", ["Origin", "MultiheadAttention", "merge_attention"])
def test_pickles_of_version_0_1_0_load(name: str) -> None:
    """They name the module in which a public class or function lived."""
    homes = {"Origin": "spec", "MultiheadAttention": "module", "merge_attention": "merge"}
    old = f"cfusemesh.kernels.attention.{homes[name]}\n{name}\n.".encode()
    with pytest.warns(DeprecationWarning, match="has moved"):
        for module in [module for module in sys.modules if module == old.decode().split()[0][1:]]:
            del sys.modules[module]
        assert pickle.loads(old) is getattr(fusemesh, name)


# Of saved programs of inference; torch.export finds arguments by name.
ARGUMENTS = {
    "attention_forward": "q k v mask bias origin aux sinks seed scale window_left window_right origin_q origin_k "
    "origin_head origin_batch mods params dropout_p backend descale",
    "attention_varlen_forward": "q k v cu_q cu_k mask bias aux sinks seed max_q max_k is_bottom_right scale "
    "window_left window_right origin_q origin_k origin_head origin_batch mods params dropout_p backend",
    "attention_decode": "q k_cache v_cache cache_lens block_table cache_starts k_new v_new mask bias sinks aux scale "
    "window_left window_right mods numbers v_dim backend",
    "linear_forward": "x w bias w_up activation save_slope save_slope_up backend",
}


@pytest.mark.parametrize("op", ARGUMENTS)
def test_programs_saved_by_version_0_1_0_find_the_arguments_of_ops(op: str) -> None:
    arguments = getattr(torch.ops.fusemesh, op).default._schema.arguments
    saved = set(ARGUMENTS[op].split())
    assert {argument.name for argument in arguments if not argument.has_default_value()} == saved
