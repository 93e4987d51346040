"""``fusemesh plan``: rank the layouts that a model could train in."""

from __future__ import annotations

import argparse
import sys

from fusemesh import config

from .options import Outcome, add_configuration, overrides

NAME = "plan"
SUMMARY = "rank the layouts that a model could train in, before paying for them"
USAGE = "[options]"


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of the command."""
    parser.add_argument("--model", metavar="NAME", help="such as llama3-8b, or a Hugging Face folder; default: our run")
    parser.add_argument("--config", metavar="FILE", help="TOML file of our run; the options of its keys win over it")
    parser.add_argument("--world", type=int, metavar="N", help="ranks; default for our run: GPUs, or cores")
    parser.add_argument("--gpu", metavar="NAME", help="a100, h100, h200, a JSON file, or local: measure this machine")
    parser.add_argument("--memory", metavar="SIZE", help="of a rank, such as 80GB; default: the hardware's")
    parser.add_argument("--gpus-per-node", type=int, metavar="N", help="default: the hardware's")
    parser.add_argument(
        "--batch", type=int, metavar="N", help="samples a step over all ranks; default: 4 Mi tokens' worth"
    )
    parser.add_argument("--sequence", type=int, metavar="N", help="tokens a sample; default: the model's own")
    parser.add_argument(
        "--microbatches", type=int, metavar="N", help="a replica's samples in N parts; default: the fastest"
    )
    parser.add_argument("--dtype", type=config.dtype_name, help="of compute; default: bfloat16")
    parser.add_argument("--schedule", help="of the pipeline: 1f1b (default), gpipe, interleaved1f1b")
    parser.add_argument("--virtual-stages", type=int, metavar="N", help="stages a rank of an interleaved pipeline")
    parser.add_argument("--recompute", help="none (default), selective, full: activations that backward recomputes")
    parser.add_argument("--explain", metavar="LAYOUT", help="where the time and memory of one layout go")
    add_configuration(parser)


def run(options: argparse.Namespace) -> Outcome:
    """Rank the layouts, or explain one of them."""
    from fusemesh.hybrid.planner import search
    from fusemesh.run import planning

    model, job, hardware, world, layout = planning.request(options, overrides(options))
    print(f"fusemesh {NAME}: {planning.describe_request(model, job, hardware, world)}", file=sys.stderr)
    if layout is not None:
        return Outcome(*planning.explain(search.consider(model, job, hardware, layout), job))
    found = search.plan(model, job, hardware, world)
    planning.require(found, job, f"{world} ranks")
    return Outcome(planning.as_dict(found, job), planning.table(found, job, hardware))
