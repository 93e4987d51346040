"""Layer: source text. The checker of private names finds them, and nothing else."""

from __future__ import annotations

import pytest

from tests.support.private_names import in_source


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("import torch\ntorch._C._nn.gelu(x)", "torch._C._nn.gelu"),
        ("import torch\ny = torch._foreach_norm(g)", "torch._foreach_norm"),
        ("import torch.nn.functional as F\nF._pad(x)", "torch.nn.functional._pad"),
        (
            "from torch.autograd import forward_ad\nforward_ad._current_level",
            "torch.autograd.forward_ad._current_level",
        ),
        ("from torch.distributed.tensor.debug import _clear", "torch.distributed.tensor.debug._clear"),
        ("def f():\n    from torch._inductor import config", "torch._inductor.config"),
        ("import torch._dynamo", "torch._dynamo"),
        ("from triton.runtime import driver\ndriver._active = 1", "triton.runtime.driver._active"),
        ("import triton.language as tl\ntl.core.is_builtin(f)", "triton.language.core.is_builtin"),
        ("from transformers import masking_utils", "transformers.masking_utils"),
        ("import triton\nkernel.warmup(x)", ".warmup"),
        ("def f(x):\n    return x._ragged_idx", "._ragged_idx"),
        ("def f(x):\n    return x.y()._something.z", "._something"),
        ("class A(M):\n    def f(self):\n        return self._parameters", "._parameters"),
        ("_parameters = 1\nx._parameters", "._parameters"),
        ("getattr(model, '_tp_plan', None)", "._tp_plan"),
        ("class A(M):\n    _qkv_same_embed_dim = False", "._qkv_same_embed_dim"),
        ("f._dynamo_marked_constant = True", "._dynamo_marked_constant"),
        ("import logging\nlogging.getLogger('torch.distributed._x')", "torch.distributed._x"),
        ("import os\nos.environ['TORCHELASTIC_RUN_ID']", "TORCHELASTIC_RUN_ID"),
    ],
)
def test_a_private_name_is_found(source: str, name: str) -> None:
    assert in_source(source) == [name]


@pytest.mark.parametrize(
    "source",
    [
        "import torch\ntorch.nn.functional.pad(x)\ntorch.__version__",
        "import os, atexit, functools\nos._exit(0)\natexit._run_exitfuncs()\nfunctools._lru_cache_wrapper",
        "from . import reference, _moved\nreference._kept(s)\n_moved.install()",
        "from fusemesh.kernels import launch\nlaunch._started",
        "point._replace(x=1)._asdict()",
        "class A:\n    def _own(self):\n        self._mine = 1\n\nA()._own()\nA()._mine",
        "'''torch._C is private.'''\ndef f():\n    'torch._C'\n    # torch._C\n    raise E('torch._C is gone')",
        "class A:\n    def cache_key(self): ...\nimport triton\nA().cache_key",
        "schedule.warmup",
    ],
)
def test_public_names_and_our_own_are_not(source: str) -> None:
    assert in_source(source) == []
