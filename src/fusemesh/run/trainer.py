"""The training loop: one loss for all layouts, metrics, checkpoints, and resuming to the bit."""

from __future__ import annotations

import contextlib
import json
import logging
import math
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor

from fusemesh import config as configuration
from fusemesh.config import Config, TrainingConfig
from fusemesh.hybrid import checkpoint, consistency
from fusemesh.hybrid.data import BatchOrder
from fusemesh.hybrid.layout import Layout
from fusemesh.hybrid.pipeline_parallel import clip_gradients
from fusemesh.hybrid.ranks.join import World, distributed
from fusemesh.kernels import backends
from fusemesh.run.evaluator import Evaluation, check_layout, evaluate, on_device, pipeline_options, place, plain_model
from fusemesh.run.metrics import MetricsWriter
from fusemesh.tasks import build_task

logger = logging.getLogger("fusemesh")

# What decides which samples a step takes and what the model is. A resumed run must leave these as they were.
_FIXED_ON_RESUME = ("task", "model.", "data.", "training.global_batch_size", "training.seed")


def learning_rate(training: TrainingConfig, step: int) -> float:
    """Of step ``step`` (from 0): linear warm-up to the peak, then a cosine down to the minimum at the last step."""
    if step < training.warmup_steps:
        return training.learning_rate * (step + 1) / training.warmup_steps
    length = max(1, training.steps - 1 - training.warmup_steps)
    progress = min(1.0, (step - training.warmup_steps) / length)
    swing = (training.learning_rate - training.min_learning_rate) / 2
    return training.min_learning_rate + swing * (1 + math.cos(math.pi * progress))


def build_optimizer(model: nn.Module, training: TrainingConfig) -> torch.optim.AdamW:
    """AdamW, whose decay is decoupled from the gradient and spares norms and biases (parameters with one dimension)."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": training.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=training.learning_rate,
        betas=(training.beta1, training.beta2),
        fused=True,
    )


def prepare(config: Config, world_size: int, *, resume: bool) -> None:
    """Everything about a run that can be wrong before it starts, found in one process.

    Raises:
        ValueError: named by the key to change.
    """
    layout = check_layout(config, world_size)
    _order(config, len(build_task(config).train), layout)
    folder = Path(config.run.directory) / "checkpoints"
    if resume:
        _check_resumable(config, checkpoint.read_state(checkpoint.latest(folder))["config"])
    elif checkpoint.all_checkpoints(folder):
        raise ValueError(
            f"run.directory: {config.run.directory!r} holds another run's checkpoints; go on with that run by "
            "--resume, or choose another run.directory"
        )


def _order(config: Config, num_samples: int, layout: Layout) -> BatchOrder:
    training = config.training
    order = BatchOrder(
        num_samples,
        training.global_batch_size,
        replicas=layout.replicas,
        accumulation=training.accumulation,
        seed=training.seed,
    )
    if layout.pp > 1:
        batch = training.global_batch_size // (layout.replicas * training.accumulation)
        key = "training.global_batch_size / (dp * fsdp * training.accumulation)"
        pipeline_options(config).microbatches_of(layout.pp, batch, key)
    return order


def _check_resumable(config: Config, saved: dict[str, Any]) -> None:
    before = configuration.load(base=saved)
    for key in configuration.fields_of(Config):
        old, new = configuration.get(before, key), configuration.get(config, key)
        if key.startswith(_FIXED_ON_RESUME) and old != new:
            raise ValueError(
                f"{key}: expected {old!r}, with which the run began (it decides what the model is and which samples "
                f"each step takes), received {new!r}; leave it, or start a new run in another run.directory"
            )


@dataclass
class _Step:
    """What a step leaves on the device until metrics are due: reading it at once would stall a GPU."""

    step: int
    targets: int  # of all replicas
    report: torch.Tensor  # fp64 [2]: summed loss of all replicas; on how many ranks a number is not finite
    norm: torch.Tensor | None  # of the gradient before clipping


class Trainer:
    """One run on this rank.

    Args:
        config: the resolved configuration.
        world: the ranks; their process group exists.
        resume: go on from the latest checkpoint of ``run.directory``.
        quiet: no progress bar.

    Raises:
        ValueError: the configuration cannot run on these ranks.
    """

    def __init__(self, config: Config, world: World, *, resume: bool = False, quiet: bool = False) -> None:
        self.config, self.world, self.quiet = config, world, quiet
        self.layout = check_layout(config, world.world_size)
        self.folder = Path(config.run.directory)
        self.task = build_task(config)
        self.order = _order(config, len(self.task.train), self.layout)
        self.replica = self.layout.replica_of(world.rank)
        model = plain_model(config, self.task)
        # Counted before a rank of pp gives the other stages' away.
        self.parameters = sum(p.numel() for p in model.parameters())
        self.model, self.mesh = place(model, config, world)
        self.optimizer = build_optimizer(self.model, config.training)
        # Padding is computed like any other token.
        self.tokens_per_step = config.training.global_batch_size * config.data.sequence_length * self.task.stacks
        self.first_step = 0
        began = [time.time_ns()]
        dist.broadcast_object_list(began, src=0)
        self.attempt = began[0]
        # From the first number that is not finite on, the weights stay as they were before its step, so that the step
        # can be done again; the fused optimizer reads this on the device, and nothing waits for it.
        self.is_broken = torch.zeros((), dtype=torch.float32, device=world.device)
        self.optimizer.found_inf = self.is_broken  # type: ignore[attr-defined]
        if resume:
            state = checkpoint.load(self.folder / "checkpoints", self.model, self.optimizer)
            _check_resumable(config, state["config"])
            self.first_step = state["step"]

    def run(self) -> dict[str, Any]:
        """Train to the last step, evaluate, save; the summary, the same on every rank."""
        training, run = self.config.training, self.config.run
        began, tokens_before = time.perf_counter(), self.first_step
        evaluating, evaluation = 0.0, None
        calls_before = backends.call_counts()
        with self._outputs() as metrics:
            for step in range(self.first_step, training.steps):
                metrics.add(self.train_step(step))
                done = step + 1
                if run.check_replicas_every and done % run.check_replicas_every == 0:
                    consistency.check_replicas(self.model, step=done)
                last = done == training.steps
                save = last or (run.checkpoint_every and done % run.checkpoint_every == 0)
                if done % run.log_every == 0 or save:
                    metrics.flush()
                if last or (self.config.evaluation.every and done % self.config.evaluation.every == 0):
                    evaluation = self._evaluate()
                    evaluating += evaluation.seconds
                    metrics.write_evaluation(done, evaluation)
                if save:
                    self._save(done)
            training_loss = metrics.last_loss
        seconds = time.perf_counter() - began - evaluating
        tokens = (training.steps - tokens_before) * self.tokens_per_step
        if evaluation is None:
            evaluation = self._evaluate()
        if evaluation.predictions is not None and self.world.is_first:
            try:
                self.task.draw(evaluation.predictions, self.folder)
            except ValueError as error:
                logger.warning("%s", error)
        return {
            "task": self.config.task,
            "data": self.task.source,
            "layout": str(self.layout),
            "world_size": self.world.world_size,
            "device": self.world.device.type,
            "steps": training.steps,
            "resumed_from": self.first_step or None,
            "parameters": self.parameters,
            "training_loss": training_loss,
            "loss": evaluation.loss,
            "held_out": evaluation.as_dict(),
            "tokens": tokens,
            "seconds": round(seconds, 3),
            "tokens_per_s": round(tokens / seconds, 1) if tokens else None,
            "backends": sorted(
                f"{op}: {name}"
                for (op, name), calls in backends.call_counts().items()
                if calls > calls_before.get((op, name), 0)
            ),
            "directory": str(self.folder),
        }

    def train_step(self, step: int) -> _Step:
        """One optimizer step on the samples of ``step``, which counts from 0; every rank calls it."""
        training, device = self.config.training, self.world.device
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(training, step)
        total = self._loss_and_gradients(step)
        norm = None
        if training.clip_norm > 0:
            norm = clip_gradients(self.model, training.clip_norm)
        report = torch.zeros(2, dtype=torch.float64, device=device)
        # The ranks of one replica hold the same loss; one of them counts.
        report[0] = total / (self.world.world_size // self.layout.replicas)
        report[1] = (~(torch.isfinite(total) & self._gradients_are_finite(norm))).double()
        dist.all_reduce(report)
        self.is_broken.copy_(torch.maximum(self.is_broken, (report[1] > 0).float()))
        self.optimizer.step()
        if self.config.run.record_samples:
            self._record(step)
        return _Step(step, self._targets(step), report, norm)

    def _targets(self, step: int) -> int:
        """How many targets a step has over all replicas."""
        return self.task.train.targets_in(self.order.step(step))

    def _loss_and_gradients(self, step: int) -> torch.Tensor:
        """The loss summed over this replica's targets of a step, fp64; gradients are those of the step alone."""
        self.optimizer.zero_grad(set_to_none=True)
        total = torch.zeros((), dtype=torch.float64, device=self.world.device)
        # The global count, not this rank's: gradients are then summed over replicas and micro-batches, and the step is
        # the same however they are cut.
        count = self._targets(step)
        for indices in self.order.micro_batches(step, self.replica):
            tokens, targets, inputs = on_device(self.task.train.batch(indices), self.world.device)
            total += self.model.loss_and_gradients(tokens, targets, count, **inputs).double()
        return total

    def _gradients_are_finite(self, norm: torch.Tensor | None) -> torch.Tensor:
        """Whether this rank's part of the gradients is, on the device."""
        if norm is not None:
            # Of a norm that is not reduced yet this rank's part; a clipped gradient is finite if its norm is.
            return torch.isfinite(norm.to_local() if isinstance(norm, DTensor) else norm)
        gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
        local = [g.to_local() if isinstance(g, DTensor) else g for g in gradients]
        return torch.isfinite(torch.stack(torch._foreach_norm([g for g in local if g.numel()]))).all()

    def _diagnose(self, step: int) -> str:
        """Where the number that is not finite was born; every rank calls it, and the weights are the step's."""
        stage = self.mesh.get_local_rank("pp")
        return consistency.find_non_finite(self.model, lambda: self._loss_and_gradients(step), stage=stage)

    def _record(self, step: int) -> None:
        """Append the samples that this rank consumed in a step to ``samples/rank-R.jsonl``.

        A step that is done again after a resume is recorded again; the one with the highest ``attempt`` counts.
        """
        indices = self.order.micro_batches(step, self.replica).flatten().tolist()
        line = {"step": step + 1, "attempt": self.attempt, "replica": self.replica, "samples": indices}
        path = self.folder / "samples" / f"rank-{self.world.rank}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    def _evaluate(self) -> Evaluation:
        return evaluate(
            self.model,
            self.task,
            device=self.world.device,
            mesh=self.mesh,
            replica=self.replica,
            replicas=self.layout.replicas,
        )

    def _save(self, step: int) -> None:
        checkpoint.save(
            self.folder / "checkpoints",
            self.model,
            self.optimizer,
            {"step": step, "config": configuration.as_dict(self.config)},
            step=step,
            keep=self.config.run.keep_checkpoints,
        )

    @contextlib.contextmanager
    def _outputs(self) -> Iterator[_Metrics]:
        if self.world.is_first:
            self.folder.mkdir(parents=True, exist_ok=True)
            configuration.save(self.config, self.folder / "config.toml")
        writer = MetricsWriter(self.folder, self.first_step) if self.world.is_first else None
        bar = _progress_bar(self.first_step, self.config.training.steps, self.world.is_first and not self.quiet)
        try:
            yield _Metrics(self.config.training, self.tokens_per_step, writer, bar, self._diagnose)
        finally:
            if writer is not None:
                writer.close()
            if bar is not None:
                bar.close()


class _Metrics:
    """Collects steps, and turns them into numbers where metrics are due."""

    def __init__(
        self,
        training: TrainingConfig,
        tokens_per_step: int,
        writer: MetricsWriter | None,
        bar: Any,
        diagnose: Callable[[int], str],
    ) -> None:
        self.training, self.tokens_per_step, self.writer, self.bar = training, tokens_per_step, writer, bar
        self.diagnose = diagnose
        self.pending: list[_Step] = []
        self.since = time.perf_counter()
        self.last_loss: float | None = None

    def add(self, step: _Step) -> None:
        self.pending.append(step)
        if self.bar is not None:
            self.bar.update(1)

    def flush(self) -> None:
        """Read the pending steps; every rank calls it, at the same steps.

        Raises:
            NonFiniteError: naming the first bad step, and the rank and parameter where it went wrong.
        """
        if not self.pending:
            return
        losses = []
        for item in self.pending:
            report = item.report.tolist()
            if report[1]:
                raise consistency.NonFiniteError(
                    f"step {item.step + 1}: a number is not finite, and was born {self.diagnose(item.step)}. The "
                    "weights are those before the step, and no checkpoint holds it. Go on with --resume from the last "
                    "one, with a lower training.learning_rate, or a training.clip_norm above 0"
                )
            losses.append(report[0] / item.targets)
        last = self.pending[-1]
        norm = last.norm.full_tensor() if isinstance(last.norm, DTensor) else last.norm
        now = time.perf_counter()
        values = {
            "loss": sum(losses) / len(losses),
            "learning_rate": learning_rate(self.training, last.step),
            "gradient_norm": None if norm is None else norm.item(),
            "tokens_per_s": len(losses) * self.tokens_per_step / (now - self.since),
        }
        self.pending, self.last_loss = [], values["loss"]
        if self.writer is not None:
            self.writer.write(last.step + 1, values)
        if self.bar is not None:
            self.bar.set_postfix_str(f"loss {values['loss']:.3f}, {values['tokens_per_s']:.0f} tokens/s")
        self.since = time.perf_counter()

    def write_evaluation(self, step: int, evaluation: Evaluation) -> None:
        if self.writer is not None:
            values = {"loss": evaluation.loss, **evaluation.metrics}
            self.writer.write(step, {f"held_out_{name}": value for name, value in values.items()})
        self.since = time.perf_counter()


def _progress_bar(first: int, steps: int, wanted: bool) -> Any:
    """A bar on a terminal's stderr; None elsewhere, where it would fill a log file."""
    if not wanted or not sys.stderr.isatty():
        return None
    try:
        from tqdm import tqdm
    except ImportError:
        return None
    return tqdm(total=steps, initial=first, unit="step", file=sys.stderr, dynamic_ncols=True)


def train_rank(values: dict[str, Any], resume: bool = False, quiet: bool = False) -> dict[str, Any]:
    """One rank's part of a run: joins the others, trains, and returns the summary, the same on every rank.

    Args:
        values: the configuration, as ``config.as_dict`` gives it.
        resume, quiet: see :class:`Trainer`.
    """
    config = configuration.load(base=values)
    if config.run.threads:
        torch.set_num_threads(config.run.threads)
    with distributed(config.run.device) as world:
        trainer = Trainer(config, world, resume=resume, quiet=quiet)
        summary = trainer.run()
        if world.is_first:
            (trainer.folder / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    return summary
