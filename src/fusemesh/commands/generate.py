"""``fusemesh generate``: continue a text by a trained model, if its task does that."""

from __future__ import annotations

import argparse
import os
import sys
from typing import TYPE_CHECKING

from fusemesh import config, standard_output
from fusemesh.tasks.encodings import check_characters, read_stream
from fusemesh.tasks.names import TASKS

from .options import Outcome
from .ranks import add_target, find_target

if TYPE_CHECKING:
    from fusemesh.models.base import ModelMaker
    from fusemesh.transformer.generation import Sampling

NAME = "generate"
SUMMARY = "continue a text by a trained language model"
USAGE = "TARGET [options]"


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of the command."""
    parser.add_argument("--prompt", metavar="TEXT", help="default: standard input")
    parser.add_argument("--tokens", type=int, metavar="N", help="how many to add; default: half of a sample's")
    parser.add_argument("--beams", type=int, default=1, metavar="N", help="more than 1: beam search with so many")
    parser.add_argument("--temperature", type=float, metavar="T", help="sample; default: take the most probable")
    parser.add_argument("--top-k", type=int, metavar="K", help="sample from the K most probable")
    parser.add_argument("--top-p", type=float, metavar="P", help="sample from the fewest that reach P together")
    parser.add_argument("--seed", type=int, default=0, help="of sampling")
    add_target(parser, shown=("data.encoding",))


def run(options: argparse.Namespace) -> Outcome:
    """Write the prompt and its continuation."""
    from fusemesh.models.registry import maker_of
    from fusemesh.tasks.registry import task_class

    target = find_target(options)
    resolved = target.settings.config
    if not task_class(resolved.task).continues_texts:
        able = " or ".join(name for name in TASKS if task_class(name).continues_texts)
        raise ValueError(f"model: expected one of task {able}, received {resolved.task}; use fusemesh predict")
    maker = maker_of(resolved)
    limit = maker.longest - 1
    tokens = options.tokens if options.tokens is not None else max(1, resolved.data.sequence_length // 2)
    if not 1 <= tokens <= limit:
        raise ValueError(
            f"--tokens: expected 1 to {limit}, which {_bound(maker)} leaves beside a prompt, received {tokens}"
        )
    prompt = options.prompt
    if prompt is None:
        prompt = read_stream(sys.stdin, target.given.get("data.encoding", ""))
    check_characters(prompt, "--prompt")
    sampling = _sampling(options)
    if not prompt:
        source = "standard input" if options.prompt is None else "--prompt"
        raise ValueError(f"{source}: expected a text to continue, received nothing")
    from fusemesh.run.predictor import Continuation, generate_rank

    stream = not options.json and options.beams == 1
    if stream:
        standard_output.write(prompt, end="")
    asked = Continuation(prompt, tokens, sampling, options.beams, options.seed, stream)
    result = target.ranks.call(generate_rank, str(target.path), config.as_dict(resolved), asked, target.verify)
    if result is None:
        return Outcome(None)
    if (lost := result.pop("unwritten", None)) is not None:
        standard_output.drop()
        raise standard_output.cannot_write(OSError(lost, os.strerror(lost)))
    return Outcome(result, "" if stream else result["prompt"] + result["text"])


def _bound(maker: ModelMaker) -> str:
    return "the length of the model's positions" if maker.refines else "data.sequence_length"


def _sampling(options: argparse.Namespace) -> Sampling | None:
    """Return the sampling that the options ask for; raise ValueError by their names."""
    from fusemesh.transformer.generation import Sampling

    chosen = {"temperature": options.temperature, "top_k": options.top_k, "top_p": options.top_p}
    given = {name: value for name, value in chosen.items() if value is not None}
    if options.beams < 1:
        raise ValueError(f"--beams: expected at least 1, received {options.beams}")
    if options.beams > 1 and given:
        name, value = next(iter(given.items()))
        raise ValueError(
            f"{_option(name)}: expected without --beams {options.beams}, which searches and does not sample, received "
            f"{value:g}; leave one of them out"
        )
    try:
        return Sampling(**given) if given else None
    except ValueError as error:
        name, _, message = str(error).partition(":")
        raise ValueError(f"{_option(name)}:{message}") from error


def _option(name: str) -> str:
    return f"--{name.replace('_', '-')}"
