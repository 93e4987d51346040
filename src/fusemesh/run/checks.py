"""Checks of a run before its first step, in one process: configuration, data, folder, and what it goes on from."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import json
import logging
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fusemesh import config as configuration
from fusemesh.config import Config
from fusemesh.hybrid import checkpoint
from fusemesh.hybrid.data import BatchOrder
from fusemesh.hybrid.outputs import make_folder
from fusemesh.models.registry import maker_of
from fusemesh.run.agreement import check_free
from fusemesh.run.fingerprint import changes, fingerprint, with_absolute_paths
from fusemesh.run.settings import Settings, first_change
from fusemesh.tasks.base import Dataset
from fusemesh.tasks.registry import build_task

logger = logging.getLogger("fusemesh")

# Keys that decide the samples of a step and the model: a resumed run must leave them as they were. The files of the
# data may move; their content is compared.
_FIXED_ON_RESUME = ("task", "model.", "data.", "training.global_batch_size", "training.seed")
_FILES = ("data.path", "data.held_out")


@dataclass(frozen=True)
class Resume:
    """How a run goes on: from_step: the checkpoint; None takes the latest. verify: compare it with its checksums.
    allow_changed_data: go on with data that have changed, with a warning."""

    from_step: int | None = None
    verify: bool = True
    allow_changed_data: bool = False

    def checkpoint_in(self, folder: Path) -> Path:
        """Return the checkpoint to go on from."""
        return checkpoint.latest(folder) if self.from_step is None else checkpoint.at_step(folder, self.from_step)


def prepare(config: Config, world_size: int, *, resume: bool | Resume | None) -> int:
    """Check everything about a run that can be wrong before it starts, in one process, and make its folder.

    Returns:
        The steps that are done already.

    Raises:
        ValueError: named by the key to change.
        OSError: the folder cannot be written.
    """
    return check_run(Settings.of(config), world_size, resume=resume)


def check_run(settings: Settings, world_size: int, *, resume: bool | Resume | None) -> int:
    """Check as :func:`prepare` does, given the settings."""
    given, how = with_absolute_paths(settings.config), how_to_resume(resume)
    config = given if how is None else maker_of(given).found_in(checkpoints_of(given))
    settings = dataclasses.replace(settings, config=config)
    settings.check(world_size)
    check_free(config.run.directory)
    folder = checkpoints_of(config)
    state: dict[str, Any] = {}
    if how is not None:
        state = checkpoint.read_state(how.checkpoint_in(folder))
        check_resumable(given, state, how)
    elif checkpoint.all_checkpoints(folder):
        raise ValueError(
            f"run.directory: {config.run.directory!r} holds another run's checkpoints; go on with that run by "
            "--resume, or choose another run.directory"
        )
    if how is not None and not how.allow_changed_data:
        # Files that cannot be read are named below, with the remedy.
        with contextlib.suppress(OSError):
            if message := changed_data(state, fingerprint(config)):
                raise ValueError(message)
    task = build_task(config, state.get("metadata"))
    if how is None:
        maker_of(task.config).check_beginning(task)
    order_of(settings, task.train)
    len(task.held_out)
    task.check_packages()
    if importlib.util.find_spec("matplotlib") is None:
        logger.warning("matplotlib is not installed (pip install 'fusemesh[app]'): the run will draw nothing")
    make_folder(config.run.directory, what="run.directory")
    return int(state.get("step", 0))


def checkpoints_of(config: Config) -> Path:
    """Return the folder of a run's checkpoints."""
    return Path(config.run.directory) / "checkpoints"


def how_to_resume(resume: bool | Resume | None) -> Resume | None:
    """Return how to go on; None for a new run."""
    return (Resume() if resume else None) if isinstance(resume, bool) else resume


def changed_data(state: dict[str, Any], now: dict[str, Any], *, allowed: bool = False) -> str:
    """Return the error about data, now of this fingerprint, that have changed since a checkpoint; "" if they have not,
    or nobody knows. Where they are ``allowed`` to, it is a warning."""
    found = changes(state["data"], now) if "data" in state else []
    if not found:
        return ""
    begin = f"the data have changed since the checkpoint of step {state['step']}: {'; '.join(found)}"
    if allowed:
        return f"{begin}; the run goes on with them: samples may be left out or taken twice, and others are held out"
    return (
        f"{begin}; samples would be left out or taken twice, and others be held out. Bring the data back, start a new "
        "run in another folder, or go on with --allow-changed-data"
    )


def summary_of(directory: str | os.PathLike[str], step: int) -> dict[str, Any] | None:
    """Return the summary that a run which ended at ``step`` left in its folder; None if there is none."""
    try:
        found = json.loads((Path(directory) / "summary.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) and found.get("steps") == step else None


def order_of(settings: Settings, samples: Dataset) -> BatchOrder:
    """Return the order of samples; raise ValueError if the layout cannot deal them out."""
    training, layout = settings.config.training, settings.layout
    order = BatchOrder(
        len(samples),
        training.global_batch_size,
        replicas=layout.replicas,
        accumulation=training.accumulation,
        seed=training.seed,
        sources=getattr(samples, "sources", ()),
    )
    if layout.pp > 1:
        batch = training.global_batch_size // (layout.replicas * training.accumulation)
        key = "training.global_batch_size / (dp * fsdp * training.accumulation)"
        settings.pipeline.microbatches_of(layout.pp, batch, key)
    return order


def check_resumable(config: Config, state: dict[str, Any], how: Resume) -> None:
    """Check that a run can go on from the state of a checkpoint; raise ValueError if it is another's, or is done."""
    saved = configuration.load(base=state["config"])
    if saved.model.pretrained and "packing" not in state["config"]["data"]:
        # Of a version whose samples were windows of all texts.
        saved = dataclasses.replace(saved, data=dataclasses.replace(saved.data, packing=False))
    if config.model == maker_of(saved).found_in(checkpoints_of(config)).model:
        saved = dataclasses.replace(saved, model=config.model)
    if "data" in state or how.allow_changed_data:
        # The files' content is compared, not their places.
        places = {key.partition(".")[2]: configuration.get(config, key) for key in _FILES}
        if config.data.sequence_length == 0:
            # To be chosen from the data, as it was.
            places["sequence_length"] = 0
        saved = dataclasses.replace(saved, data=dataclasses.replace(saved.data, **places))
    if change := first_change(with_absolute_paths(saved), config, _FIXED_ON_RESUME):
        key, old, new = change
        raise ValueError(
            f"{key}: expected {old!r}, with which the run began (it decides what the model is and which samples each "
            f"step takes), received {new!r}; leave it, or start a new run in another run.directory"
        )
    done, steps = state["step"], config.training.steps
    if steps < done:
        raise ValueError(
            f"training.steps: expected more than {done}, the steps that the run has done, received {steps}; give more "
            "to go on, or leave it"
        )
