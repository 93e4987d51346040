"""Layer: scripts a user would run, on CPU. The worked example of attention prints what mathematics says."""

from __future__ import annotations

import importlib.util
import json
import math
import runpy
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

from tests.support.engine_required import AUTO

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


def example(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def by_hand() -> ModuleType:
    return example("attention_by_hand")


def test_the_matrix(by_hand: ModuleType) -> None:
    x = by_hand.matrix()
    assert x.shape == (5, 5) and x.dtype == np.float64
    np.testing.assert_allclose(x[0], [0.1, 0.2, 0.3, 0.4, 0.5], rtol=1e-15)
    np.testing.assert_allclose(x[4], [2.1, 2.2, 2.3, 2.4, 2.5], rtol=1e-15)


def test_every_step(by_hand: ModuleType) -> None:
    """Numbers worked out apart from the script: exact products, and the softmax by Python's own arithmetic."""
    x = by_hand.matrix()
    products, scores, _, weights, output = by_hand.steps(x, x, x).values()
    rows = [[(5 * i + j + 1) / 10 for j in range(5)] for i in range(5)]
    for i in range(5):
        want = [math.fsum(a * b for a, b in zip(rows[i], rows[j], strict=True)) for j in range(5)]
        np.testing.assert_allclose(products[i], want, rtol=1e-14)
        np.testing.assert_allclose(scores[i], [value / math.sqrt(5) for value in want], rtol=1e-14)
        shares = [math.exp((value - want[-1]) / math.sqrt(5)) for value in want]
        total = math.fsum(shares)
        np.testing.assert_allclose(weights[i], [share / total for share in shares], rtol=1e-13)
        for j in range(5):
            value = math.fsum(share / total * rows[m][j] for m, share in enumerate(shares))
            assert output[i, j] == pytest.approx(value, rel=1e-14)
    # 0.1*0.1 + 0.2*0.2 + ... + 0.5*0.5 = 0.55 and 2.1^2 + ... + 2.5^2 = 26.55
    assert products[0, 0] == pytest.approx(0.55) and products[4, 4] == pytest.approx(26.55)
    np.testing.assert_allclose(weights.sum(1), 1, rtol=1e-15)
    # A softmax weighs the words, so each output lies between the smallest and the largest value of its column.
    assert (output >= x.min(0)).all() and (output <= x.max(0)).all()


def test_equals_flash_attention_in_fp64(by_hand: ModuleType) -> None:
    x = by_hand.matrix()
    *_, output = by_hand.steps(x, x, x).values()
    out = by_hand.fused(x, x, x)
    assert out.dtype == np.float64
    np.testing.assert_allclose(out, output, rtol=0, atol=1e-14)
    sdpa = torch.nn.functional.scaled_dot_product_attention(*(torch.from_numpy(x)[None, None] for _ in range(3)))
    np.testing.assert_allclose(sdpa[0, 0].numpy(), output, rtol=0, atol=1e-14)


def test_the_script_prints_every_step_and_agrees(capsys: pytest.CaptureFixture[str]) -> None:
    runpy.run_path(str(EXAMPLES / "attention_by_hand.py"), run_name="__main__")
    printed = capsys.readouterr().out
    for piece in ("Q K^T:", "scores =", "weights = softmax", "output = weights V", "flash_attention(Q, K, V):"):
        assert piece in printed
    assert "largest difference: " in printed


def test_the_script_notices_a_disagreement(by_hand: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(by_hand, "flash_attention", lambda q, k, v: q)
    with pytest.raises(SystemExit, match="disagree"):
        by_hand.main()


def test_a_script_is_accelerated_and_learns_the_same(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    script = example("accelerate_script")
    monkeypatch.setattr(script, "STEPS", 5)
    script.main()
    plain, accelerated = capsys.readouterr().out.split("FuseMesh  loss")
    # Two layers, five steps, and the evaluation.
    assert "ran on" not in plain and f"attention_forward ran on {AUTO} 12 times" in accelerated
    assert AUTO != "cpu" or "attention_backward ran on cpu 10 times" in accelerated
    results = iter([([1.0], 0.5), ([1.1], 0.5)])
    monkeypatch.setattr(script, "train", lambda: next(results))
    with pytest.raises(SystemExit, match="disagree"):
        script.main()


@pytest.mark.slow
@pytest.mark.distributed
def test_from_text_to_chat(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """The demo, on this package's own source; in fewer steps."""
    script = example("pretrain_and_chat")
    source, out = Path(script.cli.__file__).parent, tmp_path / "out"
    assert script.main(["--out", str(out), "--text", str(source), "--scale", "0.25"]) == 0
    report = json.loads((out / "report.json").read_text())
    losses = report["answers_loss"]
    assert losses["tuned"] < min(losses["untuned"], losses["unigram"]) and report["relative_difference"] <= 1e-5
    assert list(report["answers"]) == list(script.QUESTIONS) and all(report["answers"].values())
    assert "$ fusemesh predict" in capfd.readouterr().out
    # It replaces a run of its own, and nothing else.
    other = tmp_path / "other"
    other.mkdir()
    (other / "base").write_text("a file of mine")
    with pytest.raises(SystemExit, match="holds files, but no run of this script"):
        script.main(["--out", str(other)])
