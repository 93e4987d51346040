"""The training loop: one loss for all layouts, metrics, checkpoints, and resuming to the bit."""

from __future__ import annotations

import contextlib
import json
import logging
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from fusemesh import compat
from fusemesh import config as configuration
from fusemesh.config import Config
from fusemesh.hybrid import checkpoint, consistency
from fusemesh.hybrid.dropout import dropout_of
from fusemesh.hybrid.outputs import OutputError, make_folder, writing
from fusemesh.hybrid.pipeline_parallel import clip_gradients
from fusemesh.kernels import backends
from fusemesh.models.registry import maker_of
from fusemesh.run.agreement import options_entries, own_folder, same_data
from fusemesh.run.checks import Resume, changed_data, check_resumable, checkpoints_of, how_to_resume, order_of
from fusemesh.run.checks import check_run as check_run
from fusemesh.run.checks import prepare as prepare
from fusemesh.run.evaluator import Evaluation, evaluate, on_device
from fusemesh.run.fingerprint import fingerprint, with_absolute_paths
from fusemesh.run.metrics import OUT, MetricsWriter
from fusemesh.run.optimizer import build_optimizer, learning_rate
from fusemesh.run.progress import StepMetrics, StepResult, progress_bar
from fusemesh.run.setup import Run, joined
from fusemesh.tasks.registry import build_task, with_length

logger = logging.getLogger("fusemesh")


class Trainer:
    """One run on this rank.

    Args:
        run: the run's settings and ranks.
        resume: go on from a checkpoint of ``run.directory``; True from the latest.
        quiet: no progress bar and no lines of progress.

    Raises:
        ValueError: the data do not fit the configuration, or the run to resume is another.
    """

    def __init__(self, run: Run, *, resume: bool | Resume | None = None, quiet: bool = False) -> None:
        config, world, how = with_absolute_paths(run.config), run.world, how_to_resume(resume)
        self.config, self.world, self.layout, self.quiet = config, world, run.layout, quiet
        self.folder = Path(config.run.directory)
        source, state = None, {}
        if how is not None:
            source = checkpoint.on_first_rank(lambda: how.checkpoint_in(self.folder / "checkpoints"))
            state = checkpoint.read_state(source)
            check_resumable(config, state, how)
            # The folder of a pretrained model, which the run need not find any more.
            self.config = replace(config, model=configuration.load(base=state["config"]).model)
        # Before a rank reads other data than the others and ends, or takes other samples.
        self.data = same_data(config, lambda config: self._identify(config, how, state))
        self.task = build_task(config, state.get("metadata"))
        if world.is_first:
            for line in filter(None, map(self.task.say_cuts, ("train", "held_out"))):
                logger.warning("%s", line)
            if not quiet and (text := self.task.say_packed()):
                print(text, file=sys.stderr, flush=True)
            if not quiet and (text := self.task.sample_text()):
                print(f"one of the samples, its targets between ⟦ and ⟧: {text}", file=sys.stderr, flush=True)
        self.order = order_of(run.settings, self.task.train)
        self.maker = maker_of(self.task.config)
        if source is None:
            checkpoint.on_first_rank(lambda: self.maker.keep(make_folder(self.folder / "checkpoints", what=OUT)))
        model = self.maker.build(self.task)
        # Counted before a rank of pp gives the other stages' away.
        self.parameters = sum(p.numel() for p in model.parameters())
        self.model, self.mesh = run.place(model)
        if source is None:
            self.maker.begin(self.model)
        else:
            self.maker.give_memory(self.model, world.device)
        self.metadata = {**self.task.metadata, **self.maker.metadata()}
        self.share = run.share(self.mesh)
        self.optimizer = build_optimizer(self.model, config.training)
        # Padding is computed like any other token.
        self.tokens_per_step = config.training.global_batch_size * config.data.sequence_length * self.task.stacks
        self.first_step = 0
        began = [time.time_ns()]
        dist.broadcast_object_list(began, src=0)
        self.attempt = began[0]
        # From the first number that is not finite on, the weights stay as they were before its step, so that the step
        # can be done again.
        self.is_broken = torch.zeros((), dtype=torch.float32, device=world.device)
        compat.skip_steps_where(self.optimizer, self.is_broken)
        if source is not None and how is not None:
            checkpoint.load(source, self.model, self.optimizer, verify=how.verify)
            self.first_step = state["step"]
            if how.from_step is not None:
                checkpoint.on_first_rank(self._set_later_aside)

    def _identify(self, config: Config, how: Resume | None, state: dict[str, Any]) -> dict[str, Any]:
        """Return the fingerprint of the data, which rank 0 compares with that of the run to go on with."""
        found = fingerprint(config)
        if not self.world.is_first or how is None:
            return found
        if message := changed_data(state, found, allowed=how.allow_changed_data):
            if not how.allow_changed_data:
                raise ValueError(message)
            logger.warning("%s", message)
        return found

    def _set_later_aside(self) -> None:
        for path in checkpoint.set_later_aside(self.folder / "checkpoints", self.first_step):
            logger.warning("a checkpoint after step %d is set aside: %s", self.first_step, path)

    def run(self) -> dict[str, Any]:
        """Train to the last step, evaluate and save; return the summary, the same on every rank."""
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
                with self._saving(done if save else None):
                    if done % run.log_every == 0 or save:
                        metrics.flush()
                if last or (self.config.evaluation.every and done % self.config.evaluation.every == 0):
                    evaluation = self._evaluate(done if save else None)
                    evaluating += evaluation.seconds
                    metrics.write_evaluation(done, evaluation)
            training_loss = metrics.last_loss
        seconds = time.perf_counter() - began - evaluating
        tokens = (training.steps - tokens_before) * self.tokens_per_step
        if evaluation is None:
            evaluation = self._evaluate(self.first_step)
        exported = self.maker.export(self.model, self.metadata, self.folder)
        if evaluation.predictions is not None and self.world.is_first:
            try:
                self.task.draw(evaluation.predictions, self.folder)
            except Exception as error:
                # A picture is no reason to lose a run's summary.
                logger.warning("no drawing of the predictions: %s", error)
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
            **({"packed": packed} if (packed := self.task.packed()) else {}),
            "cut": {part: self.task.cuts(part) for part in ("train", "held_out")},
            "tokens": tokens,
            "seconds": round(seconds, 3),
            "tokens_per_s": round(tokens / seconds, 1) if tokens else None,
            "backends": sorted(
                f"{op}: {name}"
                for (op, name), calls in backends.call_counts().items()
                if calls > calls_before.get((op, name), 0)
            ),
            "directory": str(self.folder),
            **({} if exported is None else {"exported": exported}),
        }

    def train_step(self, step: int) -> StepResult:
        """Do one optimizer step on the samples of ``step``, which counts from 0; every rank calls it."""
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
        return StepResult(step, self._targets(step), report, norm)

    def _targets(self, step: int) -> int:
        """Return the number of targets of a step, over all replicas."""
        return self.task.train.targets_in(self.order.step(step))

    def _loss_and_gradients(self, step: int) -> torch.Tensor:
        """Return the loss summed over this replica's targets of a step, fp64; gradients are those of the step alone."""
        self.optimizer.zero_grad(set_to_none=True)
        total = torch.zeros((), dtype=torch.float64, device=self.world.device)
        # The global count, not this rank's: gradients are then summed over replicas and micro-batches, and the step is
        # the same however they are cut.
        count = self._targets(step)
        parts = self.order.micro_batches(step, self.share.replica)
        for number, indices in enumerate(parts, self.share.replica * len(parts)):
            tokens, targets, inputs = on_device(self.task.train.batch(indices), self.world.device)
            dropout_of(self.model).at(step, number * len(indices), self.config.training.seed)
            total += self.model.loss_and_gradients(tokens, targets, count, **inputs).double()
        return total

    def _gradients_are_finite(self, norm: torch.Tensor | None) -> torch.Tensor:
        """Return whether this rank's part of the gradients is finite, as a tensor on the device."""
        if norm is not None:
            # Of a norm that is not reduced yet this rank's part; a clipped gradient is finite if its norm is.
            return torch.isfinite(norm.to_local() if isinstance(norm, DTensor) else norm)
        gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
        local = [g.to_local() if isinstance(g, DTensor) else g for g in gradients]
        return torch.isfinite(torch.stack(compat.norms([g for g in local if g.numel()]))).all()

    def _diagnose(self, step: int) -> str:
        """Say where the first number that is not finite came up; every rank calls it, with the weights of the step."""
        stage = self.mesh.get_local_rank("pp")
        return consistency.find_non_finite(self.model, lambda: self._loss_and_gradients(step), stage=stage)

    def _record(self, step: int) -> None:
        """Append the samples that this rank consumed in a step to ``samples/rank-R.jsonl``.

        A step that is done again after a resume is recorded again; the one with the highest ``attempt`` counts.
        """
        indices = self.order.micro_batches(step, self.share.replica).flatten().tolist()
        line = {"step": step + 1, "attempt": self.attempt, "replica": self.share.replica, "samples": indices}
        path = self.folder / "samples" / f"rank-{self.world.rank}.jsonl"
        with writing(path, what=OUT):
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")

    def _evaluate(self, saved: int | None) -> Evaluation:
        """Return the evaluation; ``saved`` is the step of the checkpoint that holds the same weights, if one does."""
        try:
            return evaluate(self.model, self.task, self.share)
        except Exception as error:
            if saved is None:
                raise
            raise RuntimeError(
                f"step {saved}: the evaluation failed ({type(error).__name__}: {error}); the checkpoint of this step "
                f"is whole: evaluate it by: fusemesh eval {self.folder}"
            ) from error

    @contextlib.contextmanager
    def _saving(self, step: int | None) -> Iterator[None]:
        """Save the checkpoint of ``step``, if one is due, after the block, even if that cannot write metrics."""
        unwritten: OutputError | None = None
        try:
            yield
        except OutputError as error:
            # The other ranks, which write none, are about to save.
            unwritten = error
        if step is not None:
            self._save(step)
        if unwritten is not None:
            raise unwritten

    def _save(self, step: int) -> None:
        checkpoint.save(
            self.folder / "checkpoints",
            self.model,
            self.optimizer,
            {
                "step": step,
                "config": configuration.as_dict(self.config),
                "metadata": self.metadata,
                "data": self.data,
            },
            step=step,
            keep=self.config.run.keep_checkpoints,
        )

    @contextlib.contextmanager
    def _outputs(self) -> Iterator[StepMetrics]:
        if self.world.is_first:
            make_folder(self.folder, what=OUT)
            configuration.save(self.config, self.folder / "config.toml")
        writer = MetricsWriter(self.folder, self.first_step) if self.world.is_first else None
        bar = progress_bar(self.first_step, self.config.training.steps, self.world.is_first and not self.quiet)
        try:
            yield StepMetrics(self.config.training, self.tokens_per_step, writer, bar, self._diagnose, self.folder)
        finally:
            if writer is not None:
                writer.close()
            if bar is not None:
                bar.close()


def train_rank(values: dict[str, Any], resume: bool | Resume | None = None, quiet: bool = False) -> dict[str, Any]:
    """Do one rank's part of a run: join the others and train; return the summary, the same on every rank.

    Args:
        values: the configuration, as ``config.as_dict`` gives it.
        resume, quiet: see :class:`Trainer`.
    """
    config, how = configuration.load(base=values), how_to_resume(resume)
    if how is not None:
        config = maker_of(config).found_in(checkpoints_of(config))
    values = configuration.as_dict(with_length(config))
    decided = {"--resume": how is not None, **({} if how is None else options_entries(how))}
    with joined(values, decided) as run, own_folder(run.config.run.directory):
        trainer = Trainer(run, resume=how, quiet=quiet)
        summary = trainer.run()
        if run.world.is_first:
            path = trainer.folder / "summary.json"
            with writing(path, what=OUT, kept="The last checkpoint is whole"):
                path.write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    return summary
