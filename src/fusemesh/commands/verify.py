"""``fusemesh verify``: a Hugging Face folder in a layout against plain transformers."""

from __future__ import annotations

import argparse

from fusemesh.config import DEVICES

from .options import Outcome
from .ranks import add_nproc, find_ranks, say

NAME = "verify"
SUMMARY = "compare a Hugging Face folder in a layout with plain transformers, module by module"
USAGE = "FOLDER [options]"


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of the command."""
    parser.add_argument("folder", metavar="FOLDER", help="a Hugging Face folder: config.json, *.safetensors, tokenizer")
    parser.add_argument("--layout", metavar="LAYOUT", default="single", help='such as "pp2 x tp2"; default: single')
    parser.add_argument("--task", metavar="TASK", help="default: what the folder's architecture was made for")
    parser.add_argument("--device", metavar="DEVICE", default="auto", help=", ".join(DEVICES))
    add_nproc(parser)


def run(options: argparse.Namespace) -> Outcome:
    """Compare, and end with status 1 where something differs."""
    from fusemesh.hybrid.layout import Layout
    from fusemesh.pretrained import folder
    from fusemesh.pretrained.verify import task_of, verify_rank

    if options.device not in DEVICES:
        raise ValueError(f"--device: expected one of {', '.join(DEVICES)}, received {options.device!r}")
    task = options.task or task_of(options.folder)
    if task not in folder.AUTO_CLASSES:
        raise ValueError(f"--task: expected one of {', '.join(folder.AUTO_CLASSES)}, received {task!r}")
    folder.check_task(folder.config_of(options.folder), options.folder, task)
    folder.read(options.folder)
    layout = Layout.parse(options.layout)
    ranks = find_ranks(options, layout)
    say(NAME, f"{options.folder} in {layout} against plain transformers, in fp32", options)
    found = ranks.call(verify_rank, options.folder, task, str(layout), options.device)
    if found is None:
        return Outcome(None)
    largest = found["largest"]
    tokenizer = {None: "no tokenizer", True: "the tokenizer differs", False: "the tokenizer returns to its tokens"}
    lines = [
        f"{found['model']} in {found['layout']}: {found['compared']} of {found['modules']} modules' outputs compared, "
        f"the largest difference is {largest['relative']:.2g} of its norm, at {largest['module']}",
        f"loss {found['loss']:.6f}, in plain transformers {found['plain_loss']:.6f}",
        tokenizer[None if found["tokenizer"] is None else bool(found["tokenizer"])],
    ]
    if found["new"]:
        lines.append(f"not in the folder, and drawn: {', '.join(found['new'])}")
    lines += [f"PROBLEM: {problem}" for problem in found["problems"]]
    return Outcome(found, "\n".join(lines), 1 if found["problems"] else 0)
