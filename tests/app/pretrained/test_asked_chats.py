"""Layers: one process; 4 gloo ranks. Chats are asked by the folder's template and answered to the end of the turn."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from fusemesh import cli, config
from fusemesh.pretrained.tokenizer import FolderTokens
from fusemesh.run.folder import config_of_folder
from fusemesh.run.predictor import answer_rank
from tests.support.pretrained.chats import (
    CHATML,
    MARKED,
    PLAIN,
    REWRITING,
    WITH_BOS,
    chat,
    make_chat_folder,
    model_config,
)

pytestmark = pytest.mark.distributed
QUESTION, LENGTH = "What is it?", 5
CHATS = [chat(QUESTION), chat("Hi", "It is.", "And the dog?"), {**chat("Run"), "tools": []}]
CPU = ["--run.device", "cpu"]


def ids_of(folder: Path, messages: list[dict[str, Any]]) -> list[int]:
    """The prompt of an answer by transformers alone."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    found: list[int] = tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
    return found


def continued(model: Any, ids: Sequence[int], tokens: int) -> list[int]:
    found: list[int] = model.generate(torch.tensor([ids]), max_new_tokens=tokens, do_sample=False)[0][
        len(ids) :
    ].tolist()
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that ends its turn behind :data:`LENGTH` tokens of the answer to :data:`QUESTION`."""
    path = make_chat_folder(tmp_path_factory.mktemp("chat"), WITH_BOS, bos=True)
    torch.manual_seed(0)
    settings = model_config()
    settings.initializer_range = 0.3
    model = transformers.LlamaForCausalLM(settings).eval()
    ids = ids_of(path, CHATS[0]["messages"])
    whole = torch.tensor([[*ids, *continued(model, ids, LENGTH)]])
    with torch.no_grad():
        h = model.model(whole)[0][0, -1]
        end = transformers.AutoTokenizer.from_pretrained(path).convert_tokens_to_ids("<|im_end|>")
        model.lm_head.weight[end] = h * 1.1 * model.lm_head(h).max() / (h @ h)
    model.generation_config.eos_token_id = 2
    model.save_pretrained(path)
    return path


def answer_of(folder: Path, messages: list[dict[str, Any]], tokens: int) -> str:
    """The answer by transformers alone, up to the end of the turn or of the text."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model.generation_config.eos_token_id = [2, tokenizer.convert_tokens_to_ids("<|im_end|>")]
    found: str = tokenizer.decode(continued(model, ids_of(folder, messages), tokens), skip_special_tokens=True)
    return found


def asked(folder: Path, lines: Sequence[str], **given: str) -> list[str]:
    dotted = {key.replace("__", "."): value for key, value in given.items()}
    values = config_of_folder(
        str(folder), {"run.device": "cpu", "data.sequence_length": "24", **dotted}, reads_data=False
    )
    return [answer.text for answer in answer_rank(str(folder), config.as_dict(values), list(lines))]


@pytest.mark.parametrize("bos", [False, True])
@pytest.mark.parametrize("template", [CHATML, WITH_BOS, PLAIN, REWRITING, *MARKED.values()])
def test_a_prompt_is_what_the_template_writes_with_one_bos_at_most(template: str, bos: bool, tmp_path: Path) -> None:
    path = make_chat_folder(tmp_path / "chat", template, bos=bos)
    tokens = FolderTokens(str(path))
    for item in CHATS:
        found = tokens.asked(json.dumps(item), "line 1")
        assert found is not None
        assert found.ids == ids_of(path, item["messages"]) and found.ids.count(1) == (template == WITH_BOS)
        ending = "</s>" if template == PLAIN else "<|im_end|>"
        assert sorted(found.ends) == sorted({2, tokens.tokenizer.convert_tokens_to_ids(ending)})
    assert tokens.asked("What is it?", "line 1") is None and tokens.asked('{"a": "messages"}', "line 1") is None
    prompt = tokens.asked('{"prompt": "What"}', "line 1")
    assert prompt is not None and prompt.ids == tokens.tokenizer("What")["input_ids"] and list(prompt.ends) == [2]


def test_the_answer_alone_is_written_up_to_the_end_of_the_turn(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wanted = answer_of(folder, CHATS[0]["messages"], 12)
    words = ["generate", str(folder), "--chat", "--prompt", QUESTION, "--tokens", "12", *CPU]
    assert cli.main(words) == 0
    assert capsys.readouterr().out == wanted + "\n"
    assert cli.main([*words, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["prompt"], found["text"], found["tokens"]) == (QUESTION, wanted, LENGTH)


def test_lines_are_chats_and_messages(folder: Path, capsys: Any, monkeypatch: Any) -> None:
    wanted = [answer_of(folder, item["messages"], 12) for item in CHATS]
    assert asked(folder, [json.dumps(item) for item in CHATS]) == wanted
    words = ["predict", str(folder), "--data.sequence_length", "24", *CPU]
    monkeypatch.setattr("sys.stdin", iter([json.dumps(item) + "\n" for item in CHATS]))
    assert cli.main(words) == 0
    written = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert written == [{"role": "assistant", "content": text} for text in wanted]
    monkeypatch.setattr("sys.stdin", iter([QUESTION + "\n", json.dumps({"prompt": QUESTION}) + "\n"]))
    assert cli.main([*words, "--chat"]) == 0
    first, second = capsys.readouterr().out.splitlines()
    assert first == wanted[0].replace("\n", "\\n") and json.loads(second) == {"completion": wanted[0]}


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["tp2", "fsdp2", "dp2 x tp2"])
def test_chats_are_answered_the_same_in_every_layout(layout: str, folder: Path, capfd: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr("sys.stdin", iter([json.dumps(item) + "\n" for item in CHATS]))
    assert cli.main(["predict", str(folder), "--data.sequence_length", "24", *CPU, "--layout", layout, "--json"]) == 0
    found = json.loads(capfd.readouterr().out)["answers"]
    assert found == [answer_of(folder, item["messages"], 12) for item in CHATS]
    assert cli.main(["generate", str(folder), "--chat", "--prompt", QUESTION, *CPU, "--layout", layout]) == 0
    assert capfd.readouterr().out == found[0] + "\n"


def test_what_cannot_be_answered_is_refused(folder: Path, tmp_path: Path, capsys: Any, monkeypatch: Any) -> None:
    bare = Path(shutil.copytree(folder, tmp_path / "bare"))
    (bare / "chat_template.jinja").unlink()
    line = json.dumps(CHATS[0])
    cases = [
        (folder, [json.dumps(chat("Hi", "Yes."))], "line 1: expected a chat that ends with the user's turn"),
        (folder, [line, "Hi"], "line 2: expected JSON with messages or a prompt, as in the lines before it"),
        (folder, ["Hi", line], "line 2: expected text, as in the lines before it"),
        (folder, [line, json.dumps(chat("dog " * 2100))], "line 2: expected at most 2036 tokens"),
        (folder, ['{"messages": []}'], "line 1: expected messages as a list"),
        (folder, ['{"prompt": ""}'], "line 1: expected a prompt"),
        (bare, [line], "line 1: expected a folder with a chat template for a line with messages"),
    ]
    for path, lines, message in cases:
        with pytest.raises(ValueError, match=message):
            asked(path, lines)
    monkeypatch.setattr("sys.stdin", iter(["Hi\n"]))
    assert cli.main(["predict", str(bare), "--chat", *CPU]) == 2
    assert "leave --chat out" in capsys.readouterr().err
    assert cli.main(["generate", str(folder), "--chat", "--prompt", "dog " * 50, "--tokens", "2040", *CPU]) == 2
    assert "--prompt: expected a message of at most 8 tokens" in capsys.readouterr().err
