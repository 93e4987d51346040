"""A trained model's answers: to a user's lines, or as a text that goes on, in one process or any layout."""

from __future__ import annotations

import codecs
import contextlib
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.distributed.device_mesh import DeviceMesh

from fusemesh import config as configuration
from fusemesh.hybrid.layout import Layout
from fusemesh.hybrid.ranks.join import World, distributed
from fusemesh.run.evaluator import check_layout, load_parallel, predict
from fusemesh.tasks import build_task
from fusemesh.tasks.base import Task
from fusemesh.transformer import Transformer
from fusemesh.transformer.generation import Sampling, generate


@dataclass(frozen=True)
class _Loaded:
    """A model on its mesh, ready to answer."""

    task: Task
    model: Transformer
    mesh: DeviceMesh
    world: World
    layout: Layout

    def answers(self, lines: Sequence[str]) -> list[str]:
        """One for each line, the same on every rank; each replica answers its share."""
        samples, replicas = self.task.examples_of(lines), self.layout.replicas
        size = min(self.task.config.evaluation.batch_size, -(-len(lines) // replicas))
        rows = predict(
            self.model,
            self.task,
            samples,
            len(lines),
            size,
            device=self.world.device,
            mesh=self.mesh,
            replica=self.layout.replica_of(self.world.rank),
            replicas=replicas,
        )
        return [self.task.answer(row, line) for row, line in zip(rows, lines, strict=True)]


@contextlib.contextmanager
def _loaded(target: str, values: dict[str, Any]) -> Iterator[_Loaded]:
    config = configuration.load(base=values)
    if config.run.threads:
        torch.set_num_threads(config.run.threads)
    with distributed(config.run.device) as world:
        layout, task = check_layout(config, world.world_size), build_task(config)
        model, mesh, _ = load_parallel(target, task, world)
        model.eval()
        yield _Loaded(task, model, mesh, world, layout)


def answer_rank(target: str, values: dict[str, Any], lines: list[str]) -> list[str]:
    """One rank's part of answering lines; the answers, the same on every rank.

    Args:
        target: see :func:`fusemesh.run.evaluator.config_of`.
        values: the configuration, as ``config.as_dict`` gives it.

    Raises:
        ValueError: a line that the task cannot read, by its number.
    """
    with _loaded(target, values) as loaded:
        return loaded.answers(lines)


def answer_stream(target: str, values: dict[str, Any], lines: Iterable[str], write: Callable[[str], None]) -> list[str]:
    """Each line answered as it comes, by this process alone; raises as :func:`answer_rank` does."""
    found = []
    with _loaded(target, values) as loaded:
        for line in lines:
            found += loaded.answers([line.rstrip("\r\n")])
            write(found[-1])
    return found


def generate_rank(
    target: str,
    values: dict[str, Any],
    prompt: str,
    max_new_tokens: int,
    sampling: Sampling | None,
    num_beams: int,
    seed: int,
    stream: bool,
) -> dict[str, Any]:
    """One rank's part of a language model's going on with a prompt; the same on every rank.

    Args:
        target, values: see :func:`answer_rank`.
        prompt: if it is too long, its end.
        stream: whether the first rank writes to stdout what is known so far.

    Returns:
        ``{"prompt", "text", "tokens"}``: what the model saw, what it added, and how many bytes that is.
    """
    with _loaded(target, values) as loaded:
        limit = loaded.task.config.data.sequence_length - max_new_tokens
        data = prompt.encode()[-max(1, limit) :]
        tokens = torch.tensor(list(data), device=loaded.world.device)
        decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

        def write(_: int, token: int) -> None:
            sys.stdout.write(decoder.decode(bytes([token])))
            sys.stdout.flush()

        added = generate(
            loaded.model,
            [tokens],
            max_new_tokens=max_new_tokens,
            sampling=sampling,
            num_beams=num_beams,
            seed=seed,
            on_token=write if stream and loaded.world.is_first and num_beams == 1 else None,
        )[0]
        if stream and loaded.world.is_first:
            sys.stdout.write(decoder.decode(b"", final=True))
    found = bytes(added.tolist())
    return {"prompt": data.decode(errors="replace"), "text": found.decode(errors="replace"), "tokens": len(found)}
