"""Layer: the pages. Their Python runs, their commands and links are ones that exist, and errors are worded as quoted.

Blocks with Triton functions run a second time in Triton's interpreter, on the Triton backend.
"""

from __future__ import annotations

import argparse
import ast
import functools
import importlib
import importlib.util
import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

import fusemesh
from fusemesh import cli, config
from fusemesh.commands.options import overrides
from fusemesh.hybrid.layout import Layout
from fusemesh.kernels import aot, backends, env
from fusemesh.run.settings import Settings, load_config
from fusemesh.tasks.names import TASKS
from fusemesh.tasks.registry import task_class
from tests.support.pretrained.folders import make_folder

ROOT = Path(__file__).resolve().parents[2]
ENGLISH, CHINESE = "README.md", "README.zh-CN.md"
PAGES = {page.relative_to(ROOT).as_posix(): page.read_text() for page in sorted(ROOT.glob("docs/*.md"))}
PAGES = {name: (ROOT / name).read_text() for name in (ENGLISH, CHINESE)} | PAGES
_FENCED = re.compile(r"^```(\w*)\n(.*?)^```", re.DOTALL | re.MULTILINE)
BLOCKS = {name: _FENCED.findall(text) for name, text in PAGES.items()}
# By page and number. Those of the Chinese page are the English one's, which a test shows.
PYTHON = {
    f"{name}-{number}": text
    for name, blocks in BLOCKS.items()
    if name != CHINESE
    for number, text in enumerate(text for language, text in blocks if language == "python")
}
COMMANDS = sorted(
    {
        line.strip()
        for blocks in BLOCKS.values()
        for language, text in blocks
        if not language
        for line in text.splitlines()
        if re.match(r"(\w+=\S+ )*(fusemesh|make|python|echo|printf) \S", line)
    }
)


def of(program: str) -> list[list[str]]:
    """The arguments of each call of a program in the pages: what stands between it and a pipe or a comment."""
    found = []
    for line in COMMANDS:
        words = shlex.shlex(line, posix=True, punctuation_chars=True)
        words.whitespace_split = True
        parts: list[list[str]] = [[]]
        for word in words:
            if word == "|":
                parts.append([])
            elif "=" not in word or parts[-1]:
                parts[-1].append(word)
        found += [part[1:] for part in parts if part[:1] == [program]]
    return found


def test_there_are_some_of_each() -> None:
    assert len(PYTHON) >= 13 and len([key for key in PYTHON if key.startswith(ENGLISH)]) >= 8
    assert len(of("fusemesh")) >= 25 and len(of("make")) >= 2 and len(of("python")) >= 3
    assert {arguments[0] for arguments in of("fusemesh")} >= {"train", "eval", "predict", "generate", "merge", "plan"}


def imported(code: str, folder: Path) -> ModuleType:
    """The module that a block is, from a file, where Triton looks for the source of its functions."""
    path = folder / "block.py"
    path.write_text(code)
    spec = importlib.util.spec_from_file_location(f"block_of_the_pages_{abs(hash(code))}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.skipif(env.INTERPRET, reason="run it without TRITON_INTERPRET")
@pytest.mark.parametrize("block", PYTHON)
def test_python(block: str, tmp_path: Path) -> None:
    if "integrations.flash_attn " in PYTHON[block] and _is_absent("fusemesh.integrations.flash_attn"):
        pytest.skip("fusemesh.integrations.flash_attn is not there yet")
    imported(PYTHON[block], tmp_path)


def _is_absent(module: str) -> bool:
    return importlib.util.find_spec(module) is None


@pytest.mark.interpreter
@pytest.mark.parametrize(
    "block", [block for block, code in PYTHON.items() if "@triton.jit" in code and "emulate(" not in code]
)
def test_python_in_the_interpreter(block: str, tmp_path: Path) -> None:
    backends.reset_call_counts()
    with fusemesh.use_backend("triton"):
        imported(PYTHON[block], tmp_path)
    assert "flash_attention(" not in PYTHON[block] or backends.call_counts() == {
        ("attention_forward", "triton"): 1,
        ("attention_backward", "triton"): 1,
    }


def test_a_wrong_block_is_noticed(tmp_path: Path) -> None:
    with pytest.raises(AssertionError):
        imported("assert 1 + 1 == 3\n", tmp_path)


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder in the place of one that the pages name."""
    return str(make_folder(tmp_path_factory.mktemp("pretrained"), "qwen3"))


@pytest.mark.parametrize("arguments", of("fusemesh"), ids=" ".join)
def test_commands(arguments: list[str], request: pytest.FixtureRequest) -> None:
    options = parsed(arguments)
    if options.name not in ("train", "eval", "predict", "generate", "scaling"):
        return
    options.layout = None if options.layout == "auto" else options.layout
    given = overrides(options)
    if "model.pretrained" in given:
        given["model.pretrained"] = request.getfixturevalue("pretrained")
    found = load_config(_in_the_clone(getattr(options, "config", None)), given)
    if found.model.pretrained:
        Settings.of(found).check(Layout.parse(found.layout).world_size)
        return
    Layout.parse(found.layout).validate(
        num_layers=found.model.num_layers,
        num_heads=found.model.num_heads,
        num_kv_heads=found.model.num_kv_heads,
        intermediate_size=found.model.intermediate_size,
        sequence_length=found.data.sequence_length,
        global_batch=found.training.global_batch_size,
    )


def parsed(arguments: list[str]) -> argparse.Namespace:
    return cli.parse(arguments)


def _in_the_clone(path: str | None) -> Path | None:
    return None if path is None else ROOT / path


@pytest.mark.parametrize("arguments", [["trian"], ["train", "--steps"], ["train", "--training.stepz", "3"]])
def test_a_wrong_command_is_noticed(arguments: list[str]) -> None:
    with pytest.raises(ValueError, match=r"did you mean|expected a value"):
        parsed(arguments)


@pytest.mark.parametrize("arguments", of("python"), ids=" ".join)
def test_scripts(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    if arguments[:2] == ["-m", "fusemesh.kernels.aot"]:
        monkeypatch.setattr(aot, "_refuse_interpreter", lambda: sys.exit("parsed"))
        with pytest.raises(SystemExit, match="parsed"):
            aot.main(arguments[2:])
    elif arguments[0] != "your_script.py":
        text = (ROOT / arguments[0]).read_text()
        assert all(option in text for option in arguments[1:])


@pytest.mark.parametrize("target", [arguments[0] for arguments in of("make")])
def test_make_targets(target: str) -> None:
    assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.MULTILINE)


def _anchors(text: str) -> set[str]:
    """Of the headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", _FENCED.sub("", text), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("name", PAGES)
def test_links(name: str) -> None:
    for target, anchor in re.findall(r"\]\(([^)#:]*)(?:#([^)]*))?\)", _FENCED.sub("", PAGES[name])):
        path = (ROOT / name).parent / target if target else ROOT / name
        assert path.is_file(), target
        assert not anchor or anchor in _anchors(path.read_text()), (target, anchor)


def test_every_page_is_linked() -> None:
    for readme in (ENGLISH, CHINESE):
        missing = [name for name in PAGES if name != readme and f"]({name})" not in PAGES[readme]]
        assert not missing
    for readme, other in ((ENGLISH, CHINESE), (CHINESE, ENGLISH)):
        assert f"]({other})" in "".join(PAGES[readme].splitlines()[:4])


def test_names_in_the_text_exist() -> None:
    """Options by their key, and what is in fusemesh."""
    for page, text in PAGES.items():
        for key in re.findall(r"--(\w+\.\w+)", text):
            assert key in config.fields_of(config.Config), (page, key)
        for name in re.findall(r"`(fusemesh\.[\w.]*\w)", _FENCED.sub("", text)):
            assert resolved(name) is not None, (page, name)


def resolved(name: str) -> object:
    """What a dotted name stands for, or None."""
    found: object = fusemesh
    for number, part in enumerate(name.split(".")[1:], 2):
        found = getattr(found, part, None) or _module(".".join(name.split(".")[:number]))
    return found


def _module(name: str) -> ModuleType | None:
    try:
        return importlib.import_module(name)
    except ImportError:
        return None


def test_files_that_are_named_exist() -> None:
    for name, text in PAGES.items():
        for path in re.findall(r"`((?:src|hybrid|kernels|tests|bench|examples|docs)/[\w./-]*)`", text):
            assert (ROOT / path).exists(), (name, path)


def test_tests_that_are_named_exist() -> None:
    """In the tables of the README; a name may begin with folders and end with a star."""
    for readme in (ENGLISH, CHINESE):
        for row in re.findall(r"^\|.*\|$", PAGES[readme], re.MULTILINE):
            for name in re.findall(r"(?:[\w-]+/)*test_\w+\*?", row.split("|")[-2]):
                inside = name.removeprefix("tests/")
                assert any(ROOT.glob(f"tests/**/{inside}.py")), (readme, name)


def test_the_chinese_page_says_the_same() -> None:
    """The same blocks, sections and rows; what they say in words is for people to compare."""
    english, chinese = PAGES[ENGLISH], PAGES[CHINESE]
    assert BLOCKS[CHINESE] == BLOCKS[ENGLISH]
    for pattern in (r"^#+ ", r"^\|", r"^- "):
        assert len(re.findall(pattern, chinese, re.MULTILINE)) == len(re.findall(pattern, english, re.MULTILINE))
    # Names in code of the tables, and figures.
    rows = [re.findall(r"^\|.*\|$", page, re.MULTILINE) for page in (english, chinese)]
    for row, other in zip(*rows, strict=True):
        assert re.findall(r"`[^`]*`|test_\w+|\d+", row) == re.findall(r"`[^`]*`|test_\w+|\d+", other)


@pytest.mark.parametrize("readme", [ENGLISH, CHINESE])
def test_the_table_of_environment_variables_is_whole(readme: str) -> None:
    assert set(re.findall(r"FUSEMESH_[A-Z]+", PAGES[readme])) >= set(re.findall(r"FUSEMESH_[A-Z]+", env.__doc__ or ""))


def test_defaults_and_fields_of_the_tasks() -> None:
    """The README's table of tasks: their fields, and the sequence lengths in brackets."""
    for name in TASKS:
        (row,) = re.findall(rf"^\| {name} \|.*$", PAGES[ENGLISH], re.MULTILINE)
        length = load_config(None, {"task": name}).data.sequence_length
        assert f"({length})" in row
        fields = getattr(sys.modules[task_class(name).__module__], "FIELDS", ())
        assert not fields or row.split("|")[2].strip() == ", ".join(fields)


# Errors


def _texts(tree: ast.AST) -> Iterator[str]:
    """The strings of a module that are no docstrings, and the whole message of a call of wrong(); NUL is a value."""
    inner: set[ast.AST] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            inner.add(node.value)
        elif isinstance(node, ast.Call) and getattr(node.func, "id", "") == "wrong" and len(node.args) == 4:
            name, expected, received, remedy = map(_text, node.args)
            yield f"{name}: expected {expected}, received {received}; {remedy}"
        elif isinstance(node, ast.JoinedStr):
            inner.update(node.values)
            yield _text(node)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and node not in inner:
            yield node.value


def _text(node: ast.AST) -> str:
    if isinstance(node, ast.JoinedStr):
        return "".join(_text(part) for part in node.values)
    return node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else "\0"


@functools.cache
def messages() -> list[str]:
    files = [path for folder in ("src/fusemesh", "hybrid", "kernels") for path in (ROOT / folder).rglob("*.py")]
    theirs = importlib.util.find_spec("transformers")  # what it says of an implementation that is not registered
    assert theirs is not None and theirs.origin is not None
    files.append(Path(theirs.origin).parent / "modeling_utils.py")
    return [text for path in files for text in _texts(ast.parse(path.read_text()))]


def is_said(quote: str) -> bool:
    """Whether a message holds the parts of the quote that stand between ``...``, in their order."""
    pattern = re.compile(".*".join(re.escape(part) for part in quote.split("...")), re.DOTALL)
    return any(pattern.search(message) for message in messages())


ROWS = re.findall(r"^\| (`.*?) \|", PAGES["docs/troubleshooting.md"], re.MULTILINE)
QUOTES = [quote for row in ROWS for quote in re.findall(r"`([^`]+)`", row)]


@pytest.mark.parametrize("quote", QUOTES)
def test_errors_are_worded_so(quote: str) -> None:
    assert is_said(quote)


def test_a_wrong_quote_is_noticed() -> None:
    assert len(QUOTES) >= 20
    # That of a docstring alone, parts in another order, a value where the message has its own.
    for quote in ("Fused attention and parallel matmuls", "were started ... layout:", "layout: dp4 needs 4 ranks"):
        assert not is_said(quote)
