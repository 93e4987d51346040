"""Layer: application. fusemesh doctor --trace: a script runs as Python would run it, and its calls are told."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch.nn.functional as F

from fusemesh import cli
from tests.support import fresh_process

SCRIPT = """
import os
import sys
import torch
import torch.nn.functional as F
from beside import LENGTH

assert __name__ == "__main__"
torch.manual_seed(0)
print("arguments", sys.argv[1:])
os.write(1, b"from below Python\\n")
q = torch.randn(2, 4, LENGTH, 16)
for _ in range(3):
    F.scaled_dot_product_attention(q, q, q, is_causal=True)
for length in range(1, 6):
    F.scaled_dot_product_attention(q[:, :, :length], q, q)
F.scaled_dot_product_attention(q, q, q, dropout_p=0.5)
torch.nn.MultiheadAttention(64, 4, batch_first=True)(*[q.flatten(0, 1).reshape(2, LENGTH, 64)] * 3)
"""


@pytest.fixture
def script(tmp_path: Path) -> Path:
    (tmp_path / "beside.py").write_text("LENGTH = 5\n")
    path = tmp_path / "attend.py"
    path.write_text(SCRIPT)
    return path


def trace(capfd: Any, *words: str) -> tuple[int, str, str]:
    capfd.readouterr()
    before = (sys.argv, list(sys.path), F.scaled_dot_product_attention)
    status = cli.main(["doctor", *words])
    assert (sys.argv, sys.path, F.scaled_dot_product_attention) == before
    sys.modules.pop("beside", None)
    return status, *capfd.readouterr()


def test_for_people(script: Path, capfd: Any) -> None:
    status, out, _ = trace(capfd, "--trace", str(script), "--steps", "3", "-v")
    assert status == 0
    lines = out.splitlines()
    assert lines[:3] == ["arguments ['--steps', '3', '-v']", "from below Python", f"{script}  exit status 0"] or set(
        lines[:2]
    ) == {"arguments ['--steps', '3', '-v']", "from below Python"}
    assert "FuseMesh's ops  attention_forward cpu 9" in lines
    assert "       9 x F.scaled_dot_product_attention  ->  fusemesh, cpu" in lines
    shape = "[2, 4, 5, 16] float32"
    assert f"{5:>12} x query {shape}, key {shape}, value {shape}" in lines
    assert f"{'':>12}   and 2 other shapes" in lines
    weights = "PyTorch: only the eager reference has attention weights (need_weights) here"
    assert f"       1 x F.multi_head_attention_forward  ->  {weights}" in lines


@pytest.mark.parametrize("words", [("--json", "--trace", "SCRIPT", "7"), ("--trace", "SCRIPT", "7", "--json")])
def test_one_json_object(script: Path, capfd: Any, words: tuple[str, ...]) -> None:
    status, out, err = trace(capfd, *(str(script) if word == "SCRIPT" else word for word in words))
    assert status == 0 and out.count("\n") == 1
    found = json.loads(out)
    assert found["script"] == str(script) and found["exit_status"] == 0 and "error" not in found
    assert found["fusemesh"] == [{"op": "attention_forward", "backend": "cpu", "calls": 9}]
    assert [(x["function"], x["backend"], x["calls"]) for x in found["calls"]] == [
        ("F.scaled_dot_product_attention", "cpu", 9),
        ("F.multi_head_attention_forward", None, 1),
    ]
    assert found["calls"][0]["shapes"][0]["calls"] == 5 and len(found["calls"][0]["shapes"]) == 5
    assert sum(x["calls"] for x in found["calls"][0]["shapes"]) == 9
    assert "arguments ['7']" in err and "from below Python" in err


def test_arguments_after_two_dashes_are_all_the_scripts(script: Path, capfd: Any) -> None:
    status, out, _ = trace(capfd, "--trace", str(script), "a", "--", "--json", "--")
    assert status == 0 and "arguments ['a', '--json', '--']" in out


@pytest.mark.parametrize(
    "end, status, error",
    [
        ("raise SystemExit(7)", 7, None),
        ("sys.exit()", 0, None),
        ("sys.exit('a message')", 1, None),
        ("1 / 0", 1, "ZeroDivisionError: division by zero"),
    ],
)
def test_the_exit_status_is_the_scripts(script: Path, capfd: Any, end: str, status: int, error: str | None) -> None:
    script.write_text(f"{SCRIPT}\n{end}\nraise AssertionError('not reached')\n")
    got, out, err = trace(capfd, "--json", "--trace", str(script))
    found = json.loads(out)
    assert got == found["exit_status"] == status and found.get("error") == error
    assert found["calls"][0]["calls"] == 9
    assert ("a message" in err) == ("a message" in end) and ("Traceback" in err) == (error is not None)


def test_no_such_script(capfd: Any) -> None:
    for words, message in (([], "received nothing"), (["/no/such.py"], "received '/no/such.py', which is no file")):
        status, out, err = trace(capfd, "--json", "--trace", *words)
        assert status == 2 and message in json.loads(out)["error"] and message in err


def test_as_a_command(script: Path) -> None:
    script.write_text(SCRIPT + "\nsys.exit(3)\n")
    words = ["fusemesh", "doctor", "--trace", str(script), "x"]
    out = fresh_process.run(
        f"""
        import runpy, sys
        sys.argv = {words!r}
        try:
            runpy.run_module("fusemesh", run_name="__main__")
        except SystemExit as end:
            print("ended with", end.code)
        """
    )
    assert out.endswith("ended with 3\n") and "arguments ['x']" in out and "9 x F.scaled_dot_product_attention" in out
