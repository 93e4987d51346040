"""A tiny random Hugging Face model, run by test_packaging.py from the root of the clone: there the folders
kernels/ and hybrid/ stand in the way of packages of these names, and transformers probes for one called ``kernels``."""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path


def test_model_runs_beside_the_clone() -> None:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=64, max_position_embeddings=32, **sizes)).eval()
    tokens = torch.arange(10).reshape(1, 10)
    assert model(tokens).logits.shape == (1, 10, 64)
    assert model.generate(tokens, max_new_tokens=3, do_sample=False).shape == (1, 13)


def test_bare_names_are_empty_shells() -> None:
    import kernels

    import fusemesh.kernels.env
    import hybrid

    assert {"", str(Path.cwd())} & set(sys.path), "Python was not started in the clone's root"
    for shell in (kernels, hybrid):
        assert shell.__version__ == "0"
        assert list(shell.__path__) == []
        with contextlib.suppress(AttributeError):
            raise AssertionError(f"the shell holds {shell.anything}")
    assert fusemesh.kernels is not kernels


if __name__ == "__main__":
    test_model_runs_beside_the_clone()
    test_bare_names_are_empty_shells()
    print("fine")
