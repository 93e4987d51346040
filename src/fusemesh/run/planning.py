"""``fusemesh plan`` and the layout ``auto``: our run as the planner sees it, its hardware, the answer as text."""

from __future__ import annotations

import argparse
import dataclasses
import os
from typing import Any

from fusemesh.config import Config
from fusemesh.hybrid.layout import Layout
from fusemesh.hybrid.planner import search
from fusemesh.hybrid.planner.hardware import Hardware, bytes_of, find_hardware, named_hardware
from fusemesh.hybrid.planner.job import TrainingJob
from fusemesh.hybrid.planner.model import ModelDescription
from fusemesh.hybrid.planner.published import find_model, named_models
from fusemesh.hybrid.planner.search import Choice, RankedLayouts, Rejected, gib
from fusemesh.models.registry import maker_of
from fusemesh.run.settings import load_config, pipeline_options
from fusemesh.tasks.registry import build_task, with_length

# Tokens of a step where nobody says otherwise: Llama 3's first 4 million (Dubey et al., 2024, section 3.4.1).
DEFAULT_TOKENS = 4 * 2**20
LOCAL = "local"


class NoLayoutError(RuntimeError):
    """No layout fits. ``result`` is what ``--json`` prints all the same."""

    def __init__(self, message: str, result: dict[str, Any]) -> None:
        super().__init__(message)
        self.result = result


def model_of(config: Config) -> ModelDescription:
    """Return the model that a run trains, as its task makes it of the configuration and the data.

    Raises:
        ValueError: the data cannot be used; see :func:`fusemesh.tasks.registry.build_task`.
    """
    return maker_of(config).describe(build_task(config))


def job_of(config: Config) -> TrainingJob:
    """Return a step of a run."""
    training = config.training
    return TrainingJob(
        global_batch=training.global_batch_size,
        sequence_length=config.data.sequence_length,
        accumulation=training.accumulation,
        pipeline=pipeline_options(config),
        dtype=training.dtype,
        sequence_parallel=config.run.sequence_parallel,
        whole_at_start=True,
        clip=training.clip_norm > 0,
        recompute=training.recompute,
    )


def hardware_of(
    name: str, world: int, *, dtype: str, threads: int = 1, memory: str | None = None, per_node: int | None = None
) -> Hardware:
    """Return hardware by name, or this machine measured, with memory and node size of the command line.

    Raises:
        ValueError: see :func:`find_hardware`, :func:`bytes_of` and :func:`fusemesh.hybrid.planner.measure.measure`.
    """
    # Before a measurement, which takes its time.
    changes: dict[str, Any] = {}
    if memory is not None:
        changes["memory"] = bytes_of(memory)
    if per_node is not None:
        if per_node < 1:
            raise ValueError(f"--gpus-per-node: expected at least 1, received {per_node}")
        changes["ranks_per_node"] = per_node
    if name.lower() == LOCAL:
        from fusemesh.hybrid.planner.measure import measure

        found = measure(world, dtype=dtype, threads=threads)
    else:
        found = find_hardware(name)
    return dataclasses.replace(found, **changes)


def request(
    options: argparse.Namespace, overrides: dict[str, str]
) -> tuple[ModelDescription, TrainingJob, Hardware, int, Layout | None]:
    """Return model, job, hardware and ranks that ``fusemesh plan`` was asked for, and the layout to explain.

    Args:
        options: of the command.
        overrides: the configuration's keys on the command line, for our own run.

    Raises:
        ValueError: named by the flag.
    """
    others = {key: value for key, value in overrides.items() if key != "task"}
    if options.model is not None and (options.config is not None or others):
        given = "--config" if options.config is not None else f"--{next(iter(others))}"
        raise ValueError(f"--model: expected it alone, or without it our run's options, received {given} as well")
    if options.world is not None and options.world < 1:
        raise ValueError(f"--world: expected at least 1, received {options.world}")
    if options.model is not None:
        model, world = _model_named(options.model, overrides.get("task")), options.world
        if world is None:
            raise ValueError("--world: expected the number of ranks that --model is to be trained on, received none")
        length = options.sequence or model.sequence_length
        job = TrainingJob(options.batch or default_batch(length, world), length)
        gpu, threads = options.gpu, 1
        if gpu is None:
            raise ValueError(f"--gpu: expected {', '.join(named_hardware())} or {LOCAL} with --model, received none")
    else:
        config = with_length(load_config(options.config, overrides))
        model, job = model_of(config), job_of(config)
        world = options.world or default_world(config)
        gpu, threads = options.gpu or LOCAL, config.run.threads or 1
    changes: dict[str, Any] = {
        "global_batch": options.batch,
        "sequence_length": options.sequence,
        "microbatches": options.microbatches,
        "dtype": options.dtype,
        "recompute": options.recompute,
    }
    if options.model is None and options.microbatches is not None:
        raise ValueError(
            "--microbatches: expected it with --model; our run's keys are --training.accumulation and "
            f"--pipeline.microbatches, received {options.microbatches}"
        )
    stages = {"schedule": options.schedule, "virtual_stages": options.virtual_stages}
    if asked := {key: value for key, value in stages.items() if value is not None}:
        changes["pipeline"] = dataclasses.replace(job.pipeline, **asked)
    job = dataclasses.replace(job, **{key: value for key, value in changes.items() if value is not None})
    layout = _asked_layout(options, world)
    hardware = hardware_of(
        gpu, world, dtype=job.dtype, threads=threads, memory=options.memory, per_node=options.gpus_per_node
    )
    return model, job, hardware, world, layout


def _model_named(name: str, task: str | None) -> ModelDescription:
    """Return a model by its published name, or of a Hugging Face folder or config, for a task.

    Raises:
        ValueError: there is none, or it is not trained for the task.
    """
    from fusemesh.pretrained import description

    if name.lower() not in named_models() and description.is_folder(name):
        return description.describe_folder(name, task)
    if task not in (None, "language_model"):
        raise ValueError(
            f"--task: expected language_model of {name!r}, a decoder by its sizes, received {task}; with another give "
            "a folder of transformers, which must be installed"
        )
    return find_model(name)


def _asked_layout(options: argparse.Namespace, world: int) -> Layout | None:
    """Return the layout to explain, None where none is asked for.

    Raises:
        ValueError: it is none, or of another number of ranks.
    """
    if options.explain is None:
        return None
    layout = Layout.parse(options.explain)
    if layout.world_size != world:
        raise ValueError(
            f"--explain: expected a layout of {world} ranks (--world), received {layout}, which has {layout.world_size}"
        )
    return layout


def describe_request(model: ModelDescription, job: TrainingJob, hardware: Hardware, world: int) -> str:
    """Return the request in a line."""
    memory = f"{gib(hardware.memory)} ({hardware.memory / 1e9:.2f} GB)"
    return (
        f"{model.name}, {model.parameters:,} parameters, {job.global_batch} samples of {job.sequence_length} tokens a "
        f"step in {job.dtype}, on {world} ranks of {hardware.name} with {memory} each"
    )


def default_world(config: Config) -> int:
    """Return the default number of ranks: one for each GPU, or for each core where there is none."""
    import torch

    return (torch.cuda.device_count() if config.run.device != "cpu" else 0) or os.cpu_count() or 1


def default_batch(sequence_length: int, world: int) -> int:
    """Return samples a step, of about :data:`DEFAULT_TOKENS`, a multiple of the ranks."""
    return max(1, round(DEFAULT_TOKENS / sequence_length / world)) * world


def as_dict(plan: RankedLayouts, job: TrainingJob) -> dict[str, Any]:
    """Return the layouts as ``--json`` prints them."""
    return {
        "layouts": [_choice(choice, job) for choice in plan.layouts],
        "rejected": [{"layout": str(r.layout), "why": r.why} for r in plan.rejected],
    }


def _choice(choice: Choice, job: TrainingJob) -> dict[str, Any]:
    tokens = job.global_batch * job.sequence_length
    return {
        "layout": str(choice.layout),
        "step_s": choice.cost.seconds,
        "memory_bytes": choice.memory.total,
        "accumulation": choice.split.accumulation,
        "microbatches": choice.split.microbatches,
        "tokens_per_s_per_rank": tokens / choice.cost.seconds / choice.layout.world_size,
    }


def require(plan: RankedLayouts, job: TrainingJob, what: str) -> Choice:
    """Return the fastest layout.

    Raises:
        NoLayoutError: there is none; it names the nearest miss.
    """
    if plan.layouts:
        return plan.layouts[0]
    miss = plan.nearest_miss
    if miss is not None:
        reason = f"the nearest miss is {miss.layout}: {miss.why}"
        if job.recompute == "none" and "most of it activations" in miss.why:
            # Our own trainer has its number of parts.
            key = "--recompute" if job.accumulation is None else "--training.recompute"
            reason += f"; {key} full keeps fewer (parallelize(..., recompute='full') in a script)"
    else:
        reason = "; ".join(dict.fromkeys(r.why for r in plan.rejected[:3]))
    raise NoLayoutError(f"no layout of {what} can run: {reason}", as_dict(plan, job))


def table(plan: RankedLayouts, job: TrainingJob, hardware: Hardware, *, most: int = 12) -> str:
    """Return the layouts as a table: the fastest, and why others cannot run."""
    lines = [f"{'layout':<24} {'step':>10} {'tokens/s/rank':>14} {'parts':>8} {'memory':>11}"]
    for choice in plan.layouts[:most]:
        row = _choice(choice, job)
        lines.append(
            f"{row['layout']:<24} {row['step_s']:>8.3f} s {row['tokens_per_s_per_rank']:>14.0f} "
            f"{choice.split.parts:>8} {gib(row['memory_bytes']):>11}"
        )
    if len(plan.layouts) > most:
        lines.append(f"... and {len(plan.layouts) - most} slower ones (--json lists all)")
    if plan.rejected:
        lines.append(f"{len(plan.rejected)} cannot run:")
    reasons: dict[str, list[str]] = {}
    for rejected in plan.rejected:
        reasons.setdefault(rejected.why, []).append(str(rejected.layout))
    # What refuses many of them first.
    grouped = sorted(reasons.items(), key=lambda item: -len(item[1]))
    for why, layouts in grouped[:most]:
        others = f" and {len(layouts) - 1} more" if len(layouts) > 1 else ""
        lines.append(f"  {layouts[0] + others:<22} {why}")
    left = sum(len(layouts) for _, layouts in grouped[most:])
    if left:
        lines.append(f"  ... and {left} more (--json lists all)")
    lines.append(f"rates of {hardware.name}: " + "; ".join(f"{k}: {v}" for k, v in hardware.sources.items()))
    return "\n".join(lines)


def explain(choice: Choice | Rejected, job: TrainingJob) -> tuple[dict[str, Any], str]:
    """Return the time and the memory of one layout by their use, for ``--json`` and as text.

    Raises:
        ValueError: the layout cannot run; the message is the reason.
    """
    if isinstance(choice, Rejected):
        raise ValueError(f"--explain: {choice.layout} cannot run: {choice.why}")
    cost, memory = choice.cost, choice.memory
    items = sorted(cost.items, key=lambda item: -item.seconds)
    phase = max(memory.phases, key=lambda name: memory.phases[name])
    result = {
        **_choice(choice, job),
        "time": [dataclasses.asdict(item) for item in items],
        "memory": {
            "stage": memory.stage,
            "parameters": memory.parameters,
            "gradients": memory.gradients,
            "optimizer": memory.optimizer,
            "reserved": memory.reserved,
            "phases": dict(memory.phases),
            "peak": {"phase": phase, **memory.parts},
        },
    }
    lines = [choice.layout.describe(), f"a step of {cost.seconds:.4g} s in {choice.split.parts} parts a replica:"]
    lines += [
        f"  {item.seconds:>9.4f} s {item.seconds / cost.seconds:>5.1%}  {item.kind:<14} {item.name}" for item in items
    ]
    stage = f" on pipeline stage {memory.stage}" if choice.layout.pp > 1 else ""
    lines.append(f"{gib(memory.total)} a rank{stage}, most at the end of {phase}:")
    parts = {**memory.parts, "reserved": memory.reserved}
    lines += [f"  {gib(size):>11} {size / memory.total:>5.1%}  {name}" for name, size in parts.items() if size]
    return result, "\n".join(lines)


def choose_layout(config: Config, world: int, hardware: Hardware) -> Choice:
    """Return the fastest layout of a run.

    Raises:
        NoLayoutError: none can run.
    """
    job = job_of(config)
    return require(search.plan(model_of(config), job, hardware, world), job, f"{world} ranks")


def resolve_auto(config: Config, nproc: int | None, launched: bool) -> tuple[Config, str | None]:
    """Return the configuration with ``layout = "auto"`` replaced by the first of the plan, and a line that says so.

    Args:
        config: any configuration; one with another layout is returned as it is.
        nproc: ranks; None takes one for each GPU, or for each core where there is none.
        launched: whether this process is one of several ranks already.

    Raises:
        ValueError: ranks of a CPU are running already, each of which would measure, and perhaps choose, for itself.
    """
    if config.layout.strip().lower() != "auto":
        return config, None
    import torch

    gpus = torch.cuda.device_count() if config.run.device != "cpu" else 0
    world = nproc or default_world(config)
    name = LOCAL
    if gpus:
        known = torch.cuda.get_device_name(0).lower()
        name = next((gpu for gpu in ("h200", "h100", "a100") if gpu in known), "h100")
    elif launched:
        raise ValueError(
            "layout: auto measures this machine before ranks start, and they have been started already; run "
            f"`fusemesh plan --config ... --world {world}` and give its first layout"
        )
    hardware = hardware_of(name, world, dtype=config.training.dtype, threads=config.run.threads or 1)
    if gpus:
        hardware = dataclasses.replace(hardware, memory=torch.cuda.get_device_properties(0).total_memory)
    choice = choose_layout(config, world, hardware)
    line = f"layout: auto chose {choice.layout} for {world} ranks: {choice.cost.seconds:.3f} s a step predicted"
    return dataclasses.replace(config, layout=str(choice.layout)), line
