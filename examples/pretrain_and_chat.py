"""Make a small language model, from text to chat, by the commands that a large one takes.

A tokenizer is trained on the Python standard library's source, then a Llama of random weights pretrained on that in
dp2 x tp2 on four local ranks; the folder that comes out is fine-tuned on questions and answers made of the library's
documentation, in fsdp2 x tp2, evaluated in one process, and asked. --scale 0.1 does a tenth of the steps:

    python examples/pretrain_and_chat.py --out runs/chat
"""

import argparse
import ast
import contextlib
import io
import json
import math
import os
import shlex
import shutil
import sys
import time
from collections import Counter
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from fusemesh import cli
from fusemesh.tasks.corpus import read_documents

VOCABULARY, LENGTH, TOLERANCE = 2048, 128, 1e-5
QUESTIONS = ("What does json.dumps do?", "What does os.path.basename do?", "What does random.shuffle do?")
# Each turn between its role and an end token; the marks say what is trained.
TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>\n"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] }}<|end|>{% endgeneration %}"
    "{% else %}{{ message['content'] }}<|end|>{% endif %}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", default="runs/chat", help="a folder; that of an earlier run is replaced")
    parser.add_argument("--text", default="", help="Python files to learn from; default: the standard library's")
    parser.add_argument("--scale", type=float, default=1.0, help="of the numbers of steps")
    options = parser.parse_args(arguments)
    began, out = time.perf_counter(), Path(options.out)
    if (out / "base" / "config.json").is_file() and (out / "library.jsonl").is_file():
        shutil.rmtree(out)
    elif out.is_dir() and any(out.iterdir()):
        sys.exit(f"--out: {options.out!r} holds files, but no run of this script; choose a new folder")
    out.mkdir(parents=True, exist_ok=True)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")

    documents, _ = read_documents(options.text, "--text", "")
    make_model(out / "base", list(documents.values()))
    write_texts(out / "library.jsonl", documents)
    records = write_chats(out / "chats.jsonl", documents)
    print(f"{len(documents)} files; {len(records):,} questions and answers of their documentation", flush=True)

    steps = [str(max(2, round(options.scale * steps))) for steps in (160, 120)]
    same = ["--data.sequence_length", str(LENGTH), "--evaluation.samples", "128", "--evaluation.batch_size", "32"]
    shared = [*same, "--batch-size", "32", "--quiet"]
    library = out / "library.tokens"
    fusemesh("tokenize", out / "library.jsonl", "--model", out / "base", "-o", library, "--quiet")
    pretrained = fusemesh(
        *("train", "language_model", "--model.pretrained", out / "base", "--data.path", library),
        *("--layout", "dp2 x tp2"),
        *("--out", out / "pretrain", "--steps", steps[0], "--lr", "4e-3", *shared),
    )
    chats = ["--data.path", out / "chats.jsonl"]
    before = fusemesh("eval", out / "pretrain" / "model", *chats, *same)
    tuned = fusemesh(
        *("train", "language_model", "--model.pretrained", out / "pretrain" / "model", *chats),
        *("--layout", "fsdp2 x tp2", "--out", out / "tuned", "--steps", steps[1], "--lr", "2e-3", *shared),
    )
    alone = fusemesh("eval", out / "tuned" / "model", *chats, *same)
    answers = fusemesh("predict", out / "tuned" / "model", "--chat", lines=QUESTIONS)["answers"]

    together = tuned["held_out"]["loss"]
    difference = abs(alone["loss"] - together) / together
    report = {
        "pretrained": pretrained["held_out"],
        "answers_loss": {
            "unigram": unigram(out, records),
            "untuned": before["loss"],
            "tuned": together,
            "alone": alone["loss"],
        },
        "relative_difference": difference,
        "answers": dict(zip(QUESTIONS, answers, strict=True)),
        "seconds": round(time.perf_counter() - began, 1),
    }
    (out / "report.json").write_text(json.dumps(report, indent=2) + "\n")
    print(f"\nheld-out source: perplexity {pretrained['held_out']['perplexity']:.1f} of {VOCABULARY} tokens")
    print("held-out answers, nats per token:")
    for name, value in report["answers_loss"].items():
        print(f"  {LABELS[name]:<42}{value:8.4f}")
    for question, answer in report["answers"].items():
        print(f"{question}\n  {answer}")
    print(f"relative difference {difference:.1e}; report.json and models in {out}; {report['seconds']} s")
    if not difference <= TOLERANCE:
        print(f"FAILED: the two losses differ by more than {TOLERANCE:.0e}", file=sys.stderr)
        return 1
    if not together < min(before["loss"], report["answers_loss"]["unigram"]):
        print("FAILED: fine-tuning has taught the model nothing", file=sys.stderr)
        return 1
    return 0


LABELS = {
    "unigram": "frequencies of the answers' tokens",
    "untuned": "the pretrained model",
    "tuned": "the fine-tuned model, on four ranks",
    "alone": "its folder, in one process",
}


def fusemesh(*command, lines=()):
    """Run a command of FuseMesh, as a shell would, and return what it says as JSON."""
    command = [str(part) for part in command]
    print(f"\n$ fusemesh {shlex.join(command)}", flush=True)
    said, asked = io.StringIO(), sys.stdin
    sys.stdin = io.StringIO("".join(f"{line}\n" for line in lines))
    try:
        with contextlib.redirect_stdout(said):
            status = cli.main([*command, "--json"])
    finally:
        sys.stdin = asked
    if status:
        sys.exit(f"fusemesh {command[0]} failed: {said.getvalue()}")
    return json.loads(said.getvalue().splitlines()[-1])


def make_model(folder, texts):
    """Write a Llama of random weights, and a tokenizer of bytes and their pairs with a chat template."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|text|>", "<|end|>", "<|user|>", "<|assistant|>"]
    letters = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=special, initial_alphabet=letters, show_progress=False
    )
    tokenizer.train_from_iterator((text.decode("utf-8", "replace") for text in texts), trainer)
    made = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|text|>", additional_special_tokens=special[1:]
    )
    made.chat_template = TEMPLATE
    made.save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(made),
        hidden_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=384,
        max_position_embeddings=LENGTH,
        tie_word_embeddings=True,
        initializer_range=0.05,
        bos_token_id=None,
        eos_token_id=made.eos_token_id,
    )
    LlamaForCausalLM(config).save_pretrained(folder)


def write_texts(path, documents):
    """Write each document as a record."""
    with open(path, "w") as file:
        for text in documents.values():
            file.write(json.dumps({"text": text.decode("utf-8", "replace")}) + "\n")


def write_chats(path, documents):
    """Write a chat for each function that has a documentation: its first sentence answers."""
    records = {}
    for name, content in sorted(documents.items()):
        with contextlib.suppress(SyntaxError, ValueError):
            module = name.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
            for path_of, node in functions(ast.parse(content), module):
                text = " ".join((ast.get_docstring(node) or "").split("\n\n")[0].split())
                if 16 <= len(text) <= 160:
                    records[f"What does {path_of} do?"] = text
    with open(path, "w") as file:
        for question, answer in records.items():
            turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
            file.write(json.dumps({"messages": turns}) + "\n")
    return records


def functions(tree, name):
    """Yield the functions of a module or a class that are not private, each with its dotted name."""
    for node in tree.body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef) and not node.name.startswith("_"):
            if isinstance(node, ast.FunctionDef):
                yield f"{name}.{node.name}", node
            else:
                yield from functions(node, f"{name}.{node.name}")


def unigram(out, records):
    """Return the entropy of the answers' tokens, in nats: the loss of knowing their frequencies alone."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(out / "base")
    rows = tokenizer([f"{answer}<|end|>" for answer in records.values()])["input_ids"]
    counts = Counter(token for row in rows for token in row)
    total = counts.total()
    return -sum(n * math.log(n / total) for n in counts.values()) / total


if __name__ == "__main__":
    sys.exit(main())
