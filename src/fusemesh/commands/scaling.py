"""``fusemesh scaling``: time the same training job on more and more local processes."""

from __future__ import annotations

import argparse

from fusemesh import config

from .options import Outcome, add_config_file, add_configuration, add_task, overrides

NAME = "scaling"
SUMMARY = "the same training job on 1, 2, 4 ... local processes"
USAGE = "[TASK] [options]"
_DEFAULTS = {"training.steps": "8", "run.directory": "runs/scaling"}


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of the command."""
    add_task(parser)
    add_config_file(parser)
    parser.add_argument("--nproc", default="1,2,4", metavar="N,N", help="numbers of processes; default: 1,2,4")
    parser.add_argument("--axis", default="dp", help="the layout's axis for the processes: dp (default), fsdp, tp, pp")
    parser.add_argument("--runs", type=int, default=3, metavar="N", help="of each row, of which the median counts")
    add_configuration(parser, short=config.SHORT_NAMES, defaults=_DEFAULTS)


def run(options: argparse.Namespace) -> Outcome:
    """Measure, write and draw the speed-up."""
    from fusemesh.run import scaling
    from fusemesh.run.settings import load_config

    try:
        numbers = [int(part) for part in options.nproc.split(",")]
    except ValueError:
        raise ValueError(f"--nproc: expected numbers such as 1,2,4, received {options.nproc!r}") from None
    given = {**_DEFAULTS, **overrides(options)}
    result = scaling.measure(load_config(options.config, given), numbers, axis=options.axis, runs=options.runs)
    return Outcome(result, scaling.table(result))
