"""``fusemesh tokenize``: a corpus as a file of tokens, which training maps into memory."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from .options import Outcome

NAME = "tokenize"
SUMMARY = "write a corpus as a file of tokens, for training data that do not fit into memory"
USAGE = "DATA... --model FOLDER -o FILE [options]"


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of the command."""
    parser.add_argument(
        "data", nargs="+", metavar="DATA", help="text files, files of records (.jsonl, also .gz), or folders of them"
    )
    parser.add_argument(
        "--model", "--model.pretrained", metavar="FOLDER", required=True, help="folder with the tokenizer"
    )
    parser.add_argument(
        "--out", "--output", "-o", metavar="FILE", required=True, help="the file, NAME.tokens; or a folder for it"
    )
    parser.add_argument(
        "--workers", type=int, default=os.cpu_count() or 1, metavar="N", help="processes; default: one for each core"
    )
    parser.add_argument("--columns", "--data.columns", metavar="NAMES", default="", help="as data.columns")
    parser.add_argument("--encoding", "--data.encoding", metavar="NAME", default="", help="as data.encoding")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")


def run(options: argparse.Namespace) -> Outcome:
    """Make the tokens; go on where a run was killed."""
    from fusemesh.tokenized.file import ENDING
    from fusemesh.tokenized.tokenizing import Job, say, size_of, tokenize

    if options.workers < 1:
        raise ValueError(f"--workers: expected at least 1, received {options.workers}")
    out = Path(options.out).expanduser()
    if out.is_dir() or options.out.endswith(("/", os.sep)):
        out = out / f"{Path(options.data[0]).name.split('.')[0]}{ENDING}"
    if out.suffix != ENDING:
        raise ValueError(
            f"--out: expected a name that ends in {ENDING}, by which training knows the file, received {str(out)!r}; "
            f"give {str(out.with_suffix(ENDING))!r}"
        )
    job = Job(
        tuple(str(Path(path).expanduser()) for path in options.data), options.model, options.columns, options.encoding
    )
    bar = None
    if not options.quiet:
        from tqdm import tqdm

        bar = tqdm(total=size_of(job), unit="B", unit_scale=True, file=sys.stderr, desc=NAME)
    try:
        header = tokenize(job, out, workers=options.workers, on_bytes=None if bar is None else bar.update)
    finally:
        if bar is not None:
            bar.close()
    result = {"output": str(out), **{key: header[key] for key in header if key != "arrays"}}
    return Outcome(result, f"{say(header)}\nin {out}")
