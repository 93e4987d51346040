"""Layer: the application. Chats, prompts and texts as tokens, by a folder's tokenizer: which tokens are targets."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from fusemesh.pretrained.tokenizer import FolderTokens
from tests.support.pretrained.chats import (
    CHATML,
    MARKED,
    PLAIN,
    REWRITING,
    WITH_BOS,
    chat,
    encode,
    make_chat_folder,
    trained,
)

TWO = chat("What is it?", "It is a fox.", "And that?", "The lazy dog.")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_chat_folder(tmp_path_factory.mktemp("chatml"))


def test_the_assistants_turns_with_their_end_are_targets_without_marks(folder):
    (document,), counts = encode(folder, [TWO])
    assert trained(folder, document) == ["It is a fox.<|im_end|>", "The lazy dog.<|im_end|>"]
    assert counts.records == 1
    assert not counts.without_target
    tokenizer = FolderTokens(str(folder)).tokenizer
    assert document.ids.tolist() == tokenizer.apply_chat_template(TWO["messages"])["input_ids"]


@pytest.mark.parametrize("marks", MARKED)
def test_marks_of_the_template_give_the_same_targets(folder, tmp_path, marks):
    # A template without marks gives transformers' mask nothing but zeros, and training would learn nothing.
    marked = make_chat_folder(tmp_path / "marked", MARKED[marks])
    # Marks around the content alone mark nothing of an empty one.
    for item in (TWO, chat("Hi", "It." if marks == "content" else "")):
        (one,), _ = encode(folder, [item])
        (other,), _ = encode(marked, [item])
        assert np.array_equal(one.ids, other.ids)
        assert np.array_equal(one.counts, other.counts)
        assert one.counts.any()


def test_a_turn_of_weight_0_is_no_target(folder, tmp_path):
    item = {"messages": [dict(m) for m in TWO["messages"]]}
    item["messages"][1]["weight"] = 0
    for where in (folder, make_chat_folder(tmp_path / "marked", MARKED["end"])):
        (document,), _ = encode(where, [item])
        assert trained(where, document) == ["The lazy dog.<|im_end|>"]


def test_a_template_that_rewrites_earlier_turns_is_refused_unless_the_last_alone_is_trained(tmp_path):
    folder = make_chat_folder(tmp_path, REWRITING)
    with pytest.raises(
        ValueError, match=r"file.jsonl, line 2: expected a chat template that writes .* the chat up to message 2 is"
    ):
        encode(folder, [chat("Hi", "It is."), TWO])
    item = {"messages": [dict(m) for m in TWO["messages"]]}
    item["messages"][1]["weight"] = 0
    (document,), _ = encode(folder, [item])
    assert trained(folder, document) == ["<think></think>The lazy dog.<|im_end|>"]


@pytest.mark.parametrize(("template", "answer"), [(PLAIN, "It is a fox."), (CHATML, "\n\n It is a fox.")])
def test_an_answer_that_shares_a_token_with_the_prompt_follows_the_prompts_own_tokens(tmp_path, template, answer):
    folder = make_chat_folder(tmp_path, template)
    tokenizer, item = FolderTokens(str(folder)).tokenizer, chat("What is it?", answer)
    (document,), _ = encode(folder, [item])
    asked = tokenizer.apply_chat_template(item["messages"][:1], add_generation_prompt=True)["input_ids"]
    whole = tokenizer.apply_chat_template(item["messages"])["input_ids"]
    assert whole[: len(asked)] != asked == document.ids[: len(asked)].tolist()
    assert trained(folder, document)[0].startswith(answer)
    assert document.counts.tolist().index(True) == len(asked)
    assert tokenizer.decode(document.ids).startswith(tokenizer.decode(whole))


def test_a_tokenizer_that_cannot_take_an_answer_alone_is_refused(tmp_path):
    folder = make_chat_folder(tmp_path, PLAIN, dummy=True)
    with pytest.raises(
        ValueError, match=r"line 1: .* what stands before message 2 ends within a token .* mark them by"
    ):
        encode(folder, [TWO])
    with pytest.raises(
        ValueError, match=r"line 1: expected a prompt whose tokens stay the same .* it: ' before 'It is"
    ):
        encode(folder, [{"prompt": "What is it: ", "completion": "It is"}])


def test_a_turn_that_the_template_does_not_end_is_ended_by_the_token_that_ends_texts(tmp_path):
    folder = make_chat_folder(tmp_path, PLAIN.replace(": ", ":"))
    (document,), _ = encode(folder, [TWO])
    assert trained(folder, document) == ["It is a fox.\n", "The lazy dog.\n</s>"]


@pytest.mark.parametrize("template", [WITH_BOS, CHATML])
def test_no_beginning_token_is_doubled(tmp_path, template):
    folder = make_chat_folder(tmp_path, template, bos=True)
    (document,), _ = encode(folder, [TWO])
    # The template alone decides: the tokenizer, which puts one before every text, adds none.
    assert document.ids.tolist().count(1) == ("bos_token" in template)
    for item in ({"text": "It is a fox."}, {"prompt": "What?", "completion": " It is."}):
        (document,), _ = encode(folder, [item])
        assert document.ids.tolist().count(1) == 1
        assert not document.counts[0]


def test_padding_by_the_end_token_leaves_the_ends_targets(tmp_path):
    folder = make_chat_folder(tmp_path, CHATML, pad="</s>")
    assert FolderTokens(str(folder)).pad == FolderTokens(str(folder)).end == 2
    for item in ({"text": "It is a fox."}, {"prompt": "What?", "completion": " It is."}):
        (document,), _ = encode(folder, [item])
        assert document.ids[-1] == 2
        assert document.counts[-1]


def test_all_tokens_of_a_text_but_the_first_are_targets(folder):
    (document,), _ = encode(folder, [{"text": "It is a fox."}])
    assert document.counts.tolist() == [False] + [True] * (len(document.ids) - 1)
    assert FolderTokens(str(folder)).tokenizer.decode(document.ids) == "It is a fox.</s>"


def test_a_completion_is_trained_behind_the_prompts_own_tokens(folder):
    tokenizer = FolderTokens(str(folder)).tokenizer
    for prompt, completion in (("What is it?", " It is a fox."), ("What is it? ", "It is a fox."), ("", "fox")):
        (document,), _ = encode(folder, [{"prompt": prompt, "completion": completion}])
        alone = tokenizer(prompt)["input_ids"] if prompt else []
        assert document.ids[: len(alone)].tolist() == alone
        if prompt:
            assert trained(folder, document) == [completion + "</s>"]
        assert tokenizer.decode(document.ids) == prompt + completion + "</s>"


def test_tools_reach_the_template(tmp_path):
    folder = make_chat_folder(tmp_path, "{{ tools[0].function.name if tools else '' }}" + CHATML)
    tool = {"type": "function", "function": {"name": "judge", "parameters": {}}}
    (document,), _ = encode(folder, [chat("Hi", "It is.", tools=[tool])])
    assert FolderTokens(str(folder)).tokenizer.decode(document.ids).startswith("judge<|im_start|>user")


def test_records_without_a_target_are_counted_named_and_refused_where_all_are(folder):
    for empty, full in (
        ({"text": " "}, {"text": "a fox"}),
        ({"prompt": "a", "completion": ""}, {"prompt": "a", "completion": "b"}),
    ):
        documents, counts = encode(folder, [full, empty, empty])
        assert (len(documents), counts.records, counts.without_target) == (1, 3, 2)
        assert counts.first == "file.jsonl, line 2"
        counts.check()
        _, counts = encode(folder, [empty])
        with pytest.raises(ValueError, match=r"file.jsonl, line 1: .* received 1 without a target"):
            counts.check()


def test_a_template_with_marks_around_nothing_leaves_every_record_out(tmp_path):
    nothing = "{% generation %}{% endgeneration %}"
    folder = make_chat_folder(tmp_path, nothing + CHATML)
    documents, counts = encode(folder, [TWO])
    assert not documents
    with pytest.raises(ValueError, match="without a target"):
        counts.check()


@pytest.mark.parametrize(
    ("item", "message"),
    [
        (chat("Hi"), r"line 2: expected a chat that ends with the assistant's turn.*turn of 'user'; add the answer"),
        ({"messages": []}, "line 2: expected messages as a list .* an empty list"),
        ({"messages": [{"from": "user"}]}, "line 2, message 1: expected an object with role and content, received 'fr"),
        ({"messages": [{"role": "user"}]}, "line 2, message 1: expected a content, received none"),
        ({"text": "other"}, "line 2: expected messages, as in the lines before it, received text; give records of"),
        ({"question": "a"}, "line 2: expected the key text, the keys prompt .*received 'question'; rename them"),
        ({"prompt": 1, "completion": "a"}, "line 2: expected a text as 'prompt', received 1"),
        ([1], "line 2: expected a JSON object, received a list"),
        (chat("Hi", "\ud800"), r"line 2: expected characters, received \\ud800"),
    ],
)
def test_a_wrong_record_is_named_by_its_line(folder, item, message):
    with pytest.raises(ValueError, match=message):
        encode(folder, [TWO, item])


def test_a_folder_without_a_template_is_named_with_the_file_it_lacks(tmp_path):
    with pytest.raises(ValueError, match=r"line 1: .* has no chat_template.jinja; put the model's"):
        encode(make_chat_folder(tmp_path, None), [TWO])


def test_what_a_template_refuses_is_named_by_its_line(tmp_path):
    folder = make_chat_folder(tmp_path, "{{ raise_exception('roles must alternate') }}")
    with pytest.raises(ValueError, match=r"line 1: .* \(roles must alternate\); change the chat, or the template"):
        encode(folder, [TWO])


@pytest.mark.parametrize(
    ("columns", "item", "usual"),
    [
        ("body", {"body": "a fox", "text": "no"}, {"text": "a fox"}),
        ("q, a", {"q": "What?", "a": " It."}, {"prompt": "What?", "completion": " It."}),
        ("talk", {"talk": TWO["messages"]}, TWO),
    ],
)
def test_columns_map_other_names(folder, columns, item, usual):
    (one,), _ = encode(folder, [item], columns)
    (other,), _ = encode(folder, [usual])
    assert np.array_equal(one.ids, other.ids)
    assert np.array_equal(one.counts, other.counts)


def test_columns_that_are_not_there_or_too_many_are_refused(folder):
    with pytest.raises(ValueError, match=r"line 1: expected a key 'body', as data.columns says, received 'text'"):
        encode(folder, [{"text": "a"}], "body")
    with pytest.raises(ValueError, match=r"data.columns: expected one name"):
        encode(folder, [{"text": "a"}], "a,b,c")
