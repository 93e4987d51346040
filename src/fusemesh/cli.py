"""The command line: ``fusemesh doctor | train | eval | predict | generate | merge | plan | scaling | bench``.

With ``--json`` a command writes exactly one JSON object to stdout; messages always go to stderr. Every key of the
configuration is an option: what the TOML file calls ``steps`` under ``[training]`` is ``--training.steps``; two that
everybody needs have a short name, too, ``--steps`` and ``--out``.

Exit status: 0; 1 for a run that failed (a rank died, numbers not finite, replicas that drifted, no layout that fits); 2
for a request that cannot work; 130 after an interruption. ``doctor --trace`` keeps the script's.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fusemesh import __version__, config
from fusemesh.commands import options as command_options


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status, see above."""
    words, after_dashes = _cut(list(sys.argv[1:] if arguments is None else arguments))
    options = _parser().parse_args(words, argparse.Namespace(after_dashes=after_dashes))
    try:
        result, text, *status = options.command(options)
    except (ValueError, OSError) as error:
        return _fail(options, 2, str(error))
    except RuntimeError as error:
        return _fail(options, 1, str(error), getattr(error, "result", None))
    except KeyboardInterrupt:
        return _fail(options, 130, "interrupted; go on with --resume if the run has saved a checkpoint")
    if result is not None and (options.json or text is not None):
        print(json.dumps(result) if options.json else text)
    return status[0] if status else 0


def _cut(words: list[str]) -> tuple[list[str], list[str]]:
    """What argparse is to see, and what belongs to the script of ``doctor --trace SCRIPT ... -- ...`` unseen."""
    if words[:1] == ["doctor"] and "--trace" in words and "--" in words:
        cut = words.index("--")
        return words[:cut], words[cut + 1 :]
    return words, []


def _fail(options: argparse.Namespace, status: int, message: str, result: dict[str, Any] | None = None) -> int:
    if options.json:
        print(json.dumps({**(result or {}), "error": message}))
    print(f"fusemesh {options.name}: error: {message}", file=sys.stderr)
    return status


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="fusemesh", description=__doc__, allow_abbrev=False)
    parser.add_argument("--version", action="version", version=f"fusemesh {__version__}")
    commands = parser.add_subparsers(
        dest="name",
        required=True,
        metavar="doctor | train | eval | predict | generate | merge | plan | scaling | bench",
    )

    doctor = _command(commands, "doctor", _doctor, "what this machine has and what auto chooses")
    doctor.add_argument(
        "--trace",
        nargs=argparse.REMAINDER,
        metavar="SCRIPT",
        help="SCRIPT [ARGS]: run a script with PyTorch's attention on FuseMesh, and print which call went where; "
        "its exit status is kept. Everything after it is the script's, --json apart, unless that stands after --",
    )
    train = _command(commands, "train", _train, "train a model for a task in any layout")
    train.add_argument(
        "task_name", nargs="?", metavar="TASK", help=f"{', '.join(config.TASKS)}; default: the configuration's"
    )
    train.add_argument("--config", metavar="FILE", help="TOML file; the options below win over it")
    train.add_argument(
        "--resume", action="store_true", help="go on from the last checkpoint of run.directory, in any layout"
    )
    train.add_argument("--quiet", action="store_true", help="no progress bar")
    evaluation = _command(commands, "eval", _eval, "held-out loss and metrics of a run, a checkpoint or a merged file")
    predict = _command(commands, "predict", _predict, "answer lines of standard input: one in, one out")
    generate = _command(commands, "generate", _generate, "let a trained language model go on with a text")
    command_options.of_generate(generate)
    for command in (evaluation, predict, generate):
        command.add_argument("target", help="run directory, checkpoint folder or .safetensors file")
    merge = _command(commands, "merge", _merge, "write a run's last checkpoint as one safetensors file")
    merge.add_argument("target", help="run directory or checkpoint folder")
    merge.add_argument("--output", "-o", metavar="FILE", help="default: model.safetensors in the target")
    plan = _command(commands, "plan", _plan, "rank the layouts that a model could train in, before paying for them")
    command_options.of_plan(plan)
    scaling = _command(commands, "scaling", _scaling, "the same training job on 1, 2, 4 ... local processes")
    scaling.add_argument("--config", metavar="FILE", help="TOML file; the options below win over it")
    scaling.add_argument("--nproc", default="1,2,4", metavar="N,N", help="numbers of processes; default: 1,2,4")
    scaling.add_argument("--axis", default="dp", help="what the processes are used for: dp (default), fsdp, tp, pp")
    scaling.add_argument("--runs", type=int, default=3, metavar="N", help="of each row, of which the median counts")
    bench = _command(commands, "bench", _bench, "which tiles of the Triton kernels are fastest on this GPU")
    bench.add_argument("--tune", action="store_true", help="time the shipped tiles and their neighbours")
    bench.add_argument("--minutes", type=float, default=7.5, metavar="M", help="no tile starts later; default: 7.5")
    bench.add_argument(
        "--output", "-o", metavar="FILE", help="default: bench/results/<machine>/tune.json in the current folder"
    )
    for command in (doctor, train, evaluation, predict, generate, merge, plan, scaling, bench):
        command.add_argument("--json", action="store_true", help="one JSON object on stdout")
    for command in (train, evaluation, predict, generate):
        command.add_argument(
            "--nproc", type=int, metavar="N", help="local ranks to start; default: as many as the layout has"
        )
    for command in (train, evaluation, predict, generate, plan, scaling):
        command_options.configuration(command, short=command in (train, scaling))
    return parser


def _command(commands: Any, name: str, function: Any, text: str) -> argparse.ArgumentParser:
    command = commands.add_parser(name, help=text, description=text, allow_abbrev=False)
    command.set_defaults(command=function)
    return command


def _overrides(options: argparse.Namespace) -> dict[str, str]:
    given = vars(options)
    found = {key: given[key] for key in config.fields_of(config.Config) if given.get(key) is not None}
    named = given.get("task_name")
    if named is not None and found.setdefault("task", named) != named:
        raise ValueError(f"--task: expected {named}, as named before, received {found['task']}; name it once")
    return found


def _ranks(options: argparse.Namespace, layout: str) -> tuple[int, bool]:
    """How many ranks there will be, and whether this process starts them rather than being one of them."""
    from fusemesh.hybrid.layout import Layout
    from fusemesh.hybrid.ranks.join import find_place

    place = find_place()
    if place is not None:
        if options.nproc is not None:
            raise ValueError(
                f"--nproc: expected to be absent under {place.launcher}, which started {place.world_size} ranks "
                f"already, received {options.nproc}"
            )
        return place.world_size, False
    nproc = options.nproc if options.nproc is not None else Layout.parse(layout).world_size
    if nproc < 1:
        raise ValueError(f"--nproc: expected at least 1, received {nproc}")
    return nproc, nproc > 1


def _choose_layout(configured: config.Config, options: argparse.Namespace) -> config.Config:
    """The configuration with a layout of "auto" decided, before any rank starts."""
    if configured.layout.strip().lower() != "auto":
        return configured
    from fusemesh.hybrid.ranks.join import find_place
    from fusemesh.run.planning import resolve_auto

    place = find_place()
    world = options.nproc if place is None else place.world_size
    chosen, line = resolve_auto(configured, world, launched=place is not None)
    print(f"fusemesh {options.name}: {line}", file=sys.stderr)
    return chosen


def _on_ranks(nproc: int, start: bool, function: Any, *arguments: Any) -> dict[str, Any] | None:
    """The result of rank 0; None in a process that is another rank."""
    from fusemesh.hybrid.ranks.join import find_place, launch_local

    if start:
        return launch_local(nproc, function, *arguments)[0]
    place = find_place()
    result = function(*arguments)
    return result if place is None or place.rank == 0 else None


def _doctor(options: argparse.Namespace) -> tuple[Any, ...]:
    if options.trace is not None:
        return _trace(options)
    from fusemesh.commands import doctor

    findings = doctor.examine()
    return findings, doctor.describe(findings)


def _trace(options: argparse.Namespace) -> tuple[Any, str, int]:
    options.json = options.json or "--json" in options.trace
    words = [word for word in options.trace if word != "--json"] + options.after_dashes
    if not words:
        raise ValueError("--trace: expected SCRIPT [ARGS], received nothing; name a Python script")
    from fusemesh.commands import tracing

    findings = tracing.run(words[0], words[1:], quiet=options.json)
    return findings, tracing.describe(findings), findings["exit_status"]


def _train(options: argparse.Namespace) -> tuple[Any, str | None]:
    overrides = _overrides(options)
    source = options.config
    if options.resume and source is None:
        overrides.setdefault("run.directory", config.fields_of(config.Config)["run.directory"].default)
        saved = Path(overrides["run.directory"], "config.toml")
        source = saved if saved.is_file() else None
    resolved = _choose_layout(config.load(source, overrides), options)
    nproc, start = _ranks(options, resolved.layout)

    from fusemesh.run.trainer import prepare, train_rank

    prepare(resolved, nproc, resume=options.resume)
    summary = _on_ranks(nproc, start, train_rank, config.as_dict(resolved), options.resume, options.quiet)
    if summary is None:
        return None, None
    return summary, (
        f"{summary['steps']} steps in layout {summary['layout']} on {summary['world_size']} {summary['device']} ranks, "
        f"{summary['tokens_per_s'] or 0:.0f} tokens/s\n"
        f"held-out loss {summary['loss']:.4f}, {_metrics(summary['held_out'])}\n"
        f"saved in {summary['directory']}"
    )


def _metrics(evaluation: dict[str, Any]) -> str:
    """The task's numbers for people."""
    known = ("task", "step", "layout", "loss", "targets", "samples", "seconds")
    return ", ".join(f"{name} {value:.4f}" for name, value in evaluation.items() if name not in known)


def _target(options: argparse.Namespace) -> tuple[config.Config, int, bool]:
    """The configuration of what was trained, its layout unless the command line says another, and how many ranks."""
    from fusemesh.run.evaluator import check_layout, config_of

    base, overrides = config_of(options.target), _overrides(options)
    # A merged file is no longer spread over ranks, unless the command line asks for it.
    merged = Path(options.target).is_file()
    resolved = config.load(None, {**({"layout": "single"} if merged else {}), **overrides}, base=base)
    nproc, start = _ranks(options, resolved.layout)
    check_layout(resolved, nproc)
    return resolved, nproc, start


def _eval(options: argparse.Namespace) -> tuple[Any, str | None]:
    from fusemesh.run.evaluator import evaluate_file, evaluate_rank

    resolved, nproc, start = _target(options)
    if Path(options.target).is_file() and nproc == 1:
        result: Any = evaluate_file(options.target, resolved)
    else:
        result = _on_ranks(nproc, start, evaluate_rank, options.target, config.as_dict(resolved))
    if result is None:
        return None, None
    return result, (
        f"step {result['step']}, layout {result['layout']}: held-out loss {result['loss']:.6f}, {_metrics(result)} "
        f"over {result['samples']} samples"
    )


def _predict(options: argparse.Namespace) -> tuple[Any, str | None]:
    from fusemesh.run.predictor import answer_rank, answer_stream

    resolved, nproc, start = _target(options)
    values = config.as_dict(resolved)
    if nproc == 1:

        def write(answer: str) -> None:
            if not options.json:
                print(answer, flush=True)

        answers: Any = answer_stream(options.target, values, sys.stdin, write)
        return {"answers": answers}, None
    lines = sys.stdin.read().splitlines()
    if not lines:
        raise ValueError("standard input: expected a question a line, received nothing")
    answers = _on_ranks(nproc, start, answer_rank, options.target, values, lines)
    return (None, None) if answers is None else ({"answers": answers}, "\n".join(answers))


def _generate(options: argparse.Namespace) -> tuple[Any, str | None]:
    resolved, nproc, start = _target(options)
    if resolved.task != "language_model":
        raise ValueError(f"model: expected one of task language_model, received {resolved.task}; use fusemesh predict")
    limit = resolved.data.sequence_length - 1
    tokens = options.tokens if options.tokens is not None else max(1, resolved.data.sequence_length // 2)
    if not 1 <= tokens <= limit:
        raise ValueError(
            f"--tokens: expected 1 to {limit}, which data.sequence_length leaves beside a prompt, received {tokens}"
        )
    prompt = options.prompt if options.prompt is not None else sys.stdin.read()
    if not prompt:
        raise ValueError("--prompt: expected some text to go on with, received nothing")
    from fusemesh.run.predictor import generate_rank
    from fusemesh.transformer.generation import Sampling

    asked = {"temperature": options.temperature, "top_k": options.top_k, "top_p": options.top_p}
    given = {name: value for name, value in asked.items() if value is not None}
    sampling = Sampling(**given) if given else None
    stream = not options.json and options.beams == 1
    if stream:
        print(prompt, end="", flush=True)
    result = _on_ranks(
        nproc,
        start,
        generate_rank,
        options.target,
        config.as_dict(resolved),
        prompt,
        tokens,
        sampling,
        options.beams,
        options.seed,
        stream,
    )
    if result is None:
        return None, None
    return result, "" if stream else result["prompt"] + result["text"]


def _merge(options: argparse.Namespace) -> tuple[Any, str]:
    from fusemesh.hybrid.checkpoint import merge
    from fusemesh.run.evaluator import checkpoint_of

    output = options.output or Path(options.target, "model.safetensors")
    result = merge(checkpoint_of(options.target), output)
    return result, f"{result['parameters']} parameters of {result['checkpoint']} in {result['output']}"


def _plan(options: argparse.Namespace) -> tuple[Any, str]:
    from fusemesh.hybrid.layout import Layout
    from fusemesh.hybrid.planner import search
    from fusemesh.run import planning

    model, job, hardware, world = planning.request(options, _overrides(options))
    print(f"fusemesh plan: {planning.describe_request(model, job, hardware, world)}", file=sys.stderr)
    if options.explain is not None:
        layout = Layout.parse(options.explain)
        if layout.world_size != world:
            raise ValueError(
                f"--explain: expected a layout of {world} ranks (--world), received {layout}, which has "
                f"{layout.world_size}"
            )
        return planning.explain(search.consider(model, job, hardware, layout), job)
    found = search.plan(model, job, hardware, world)
    planning.require(found, job, f"{world} ranks")
    return planning.as_dict(found, job), planning.table(found, job, hardware)


def _scaling(options: argparse.Namespace) -> tuple[Any, str]:
    from fusemesh.run import scaling

    try:
        numbers = [int(part) for part in options.nproc.split(",")]
    except ValueError:
        raise ValueError(f"--nproc: expected numbers such as 1,2,4, received {options.nproc!r}") from None
    overrides = {"training.steps": "8", "run.directory": "runs/scaling", **_overrides(options)}
    result = scaling.measure(config.load(options.config, overrides), numbers, axis=options.axis, runs=options.runs)
    return result, scaling.table(result)


def _bench(options: argparse.Namespace) -> tuple[Any, str]:
    if not options.tune:
        raise ValueError(
            "--tune: expected it, which is all that this command does; the comparison with other libraries is "
            "`make bench` in a clone"
        )
    if not options.minutes > 0:
        raise ValueError(f"--minutes: expected more than 0, received {options.minutes:g}")
    import torch

    from fusemesh.kernels import measure as benchmark
    from fusemesh.kernels.measure import tune

    reason = tune.why_not_here()
    if reason is not None:
        raise ValueError(reason)
    record = benchmark.machine()
    path = Path(options.output or Path("bench", "results", benchmark.machine_name(record), "tune.json"))
    result = tune.tune_tiles(torch.device("cuda"), benchmark.Clock(options.minutes))
    result = {"stage": "tune", "dry_run": False, "machine": record, **result}
    written = benchmark.write_results(path, result)
    wrong = [
        f"{row['op']} {row['kernel']} {row['entry']}: {row['check']}" for row in result["rows"] if row["check"] != "ok"
    ]
    if wrong:
        raise RuntimeError(f"{len(wrong)} kernels are wrong or did not run; see {written}\n" + "\n".join(wrong))
    left_out = [f"left out for lack of time: {name}" for name in result["left_out"]]
    text = "\n".join([tune.table(result["rows"]), *left_out, f"written to {written}"])
    return {**result, "written": str(written)}, text
