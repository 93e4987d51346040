"""The options of commands that have many; :mod:`fusemesh.cli` has the rest."""

from __future__ import annotations

import argparse

from fusemesh import config

_SHORT = {"training.steps": ("--steps",), "run.directory": ("--out",)}


def configuration(command: argparse.ArgumentParser, *, short: bool) -> None:
    """Every key of the configuration; with ``short`` those that everybody needs have a short name, too."""
    keys = command.add_argument_group("configuration")
    for key, spec in config.fields_of(config.Config).items():
        text = spec.doc + (f" ({', '.join(spec.choices)})" if spec.choices else "")
        keys.add_argument(
            f"--{key}",
            *(_SHORT.get(key, ()) if short else ()),
            metavar=spec.type.__name__.upper(),
            help=f"{text}; default {spec.default!r}".replace("%", "%%"),
        )


def of_plan(plan: argparse.ArgumentParser) -> None:
    """What is planned, and on what."""
    plan.add_argument(
        "--model", metavar="NAME", help="such as llama3-8b, or a Hugging Face config.json; default: our run"
    )
    plan.add_argument("--config", metavar="FILE", help="TOML file of our run; the options of its keys win over it")
    plan.add_argument("--world", type=int, metavar="N", help="ranks; default for our run: GPUs, or cores")
    plan.add_argument("--gpu", metavar="NAME", help="a100, h100, h200, a JSON file, or local: measure this machine")
    plan.add_argument("--memory", metavar="SIZE", help="of a rank, such as 80GB; default: the hardware's")
    plan.add_argument("--gpus-per-node", type=int, metavar="N", help="default: the hardware's")
    plan.add_argument(
        "--batch", type=int, metavar="N", help="samples a step over all ranks; default: 4 Mi tokens' worth"
    )
    plan.add_argument("--sequence", type=int, metavar="N", help="tokens a sample; default: what it was trained with")
    plan.add_argument(
        "--microbatches", type=int, metavar="N", help="a replica's samples in N parts; default: the fastest"
    )
    plan.add_argument("--dtype", help="of compute; default: bfloat16")
    plan.add_argument("--schedule", help="of the pipeline: 1f1b (default), gpipe, interleaved1f1b")
    plan.add_argument("--virtual-stages", type=int, metavar="N", help="stages a rank of an interleaved pipeline")
    plan.add_argument("--recompute", help="none (default), selective, full: what backward computes again")
    plan.add_argument("--explain", metavar="LAYOUT", help="where the time and memory of one layout go")


def of_generate(generate: argparse.ArgumentParser) -> None:
    """What a text begins with, and how it goes on."""
    generate.add_argument("--prompt", metavar="TEXT", help="default: standard input")
    generate.add_argument("--tokens", type=int, metavar="N", help="how many to add; default: half of a sample's")
    generate.add_argument(
        "--beams", type=int, default=1, metavar="N", help="more than 1: the best of so many beginnings"
    )
    generate.add_argument("--temperature", type=float, metavar="T", help="sample; default: take the most probable")
    generate.add_argument("--top-k", type=int, metavar="K", help="sample from the K most probable")
    generate.add_argument("--top-p", type=float, metavar="P", help="sample from the fewest that reach P together")
    generate.add_argument("--seed", type=int, default=0, help="of sampling")
