"""``fusemesh merge``: write a run's last checkpoint as one safetensors file."""

from __future__ import annotations

import argparse
from pathlib import Path

from .options import Outcome
from .ranks import add_checks, run_of

NAME = "merge"
SUMMARY = "write a run's last checkpoint as one safetensors file"
USAGE = "TARGET [options]"


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of the command."""
    parser.add_argument("target", metavar="TARGET", help="run directory or checkpoint folder")
    add_checks(parser)
    parser.add_argument(
        "--out", "--output", "-o", metavar="FILE", help="default: model.safetensors in the run directory"
    )


def run(options: argparse.Namespace) -> Outcome:
    """Merge the checkpoint."""
    from fusemesh.hybrid.checkpoint import merge
    from fusemesh.run.setup import checkpoint_of

    output = options.out or run_of(Path(options.target)) / "model.safetensors"
    result = merge(checkpoint_of(options.target, options.from_step), output, verify=not options.no_verify)
    return Outcome(result, f"{result['parameters']} parameters of {result['checkpoint']} in {result['output']}")
