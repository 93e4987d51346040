"""``fusemesh merge``: write a run's last checkpoint as one safetensors file, or as a Hugging Face folder."""

from __future__ import annotations

import argparse
from pathlib import Path

from fusemesh.config import dtype_name

from .options import Outcome
from .ranks import add_checks, run_of

NAME = "merge"
SUMMARY = "write a run's last checkpoint as one safetensors file, a fine-tuned model as a Hugging Face folder"
USAGE = "TARGET [options]"


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of the command."""
    parser.add_argument("target", metavar="TARGET", help="run directory or checkpoint folder")
    add_checks(parser)
    parser.add_argument(
        "--out",
        "--output",
        "-o",
        metavar="PATH",
        help="default: model.safetensors in the run directory; of a pretrained model the folder model there",
    )
    parser.add_argument(
        "--dtype",
        type=dtype_name,
        choices=("bfloat16", "float16", "float32"),
        help="of all tensors of a pretrained model; default: each one's own in the folder that it came from",
    )


def run(options: argparse.Namespace) -> Outcome:
    """Merge the checkpoint."""
    from fusemesh.hybrid.checkpoint import merge, read_state
    from fusemesh.hybrid.hugging_face.merge import is_pretrained
    from fusemesh.run.setup import checkpoint_of

    target = checkpoint_of(options.target, options.from_step)
    if is_pretrained(read_state(target)):
        return _merge_pretrained(options, target)
    if options.dtype is not None:
        raise ValueError(
            f"--dtype: expected none for {options.target!r}, whose model is none of a Hugging Face folder and is "
            f"written as it is, received {options.dtype}; leave it out"
        )
    output = options.out or run_of(Path(options.target)) / "model.safetensors"
    result = merge(target, output, verify=not options.no_verify)
    return Outcome(result, f"{result['parameters']} parameters of {result['checkpoint']} in {result['output']}")


def _merge_pretrained(options: argparse.Namespace, checkpoint: Path) -> Outcome:
    """Write a checkpoint of a pretrained model's training as a Hugging Face folder."""
    import torch

    from fusemesh.hybrid.hugging_face.merge import merge_pretrained

    output = Path(options.out or run_of(Path(options.target)) / "model")
    if output.suffix == ".safetensors":
        raise ValueError(
            f"--out: expected a folder for {options.target!r}, whose model is a pretrained one and is written with its "
            f"config.json and tokenizer, received {str(output)!r}; give {str(output.with_suffix(''))!r}"
        )
    dtype = getattr(torch, options.dtype) if options.dtype else None
    report = merge_pretrained(checkpoint, output, dtype=dtype, verify=not options.no_verify)
    result = {
        "checkpoint": str(checkpoint),
        "output": str(output),
        "files": list(report.files),
        "tensors": report.tensors,
        "parameters": report.parameters,
        "bytes": report.nbytes,
    }
    return Outcome(result, f"{report.parameters} parameters of {checkpoint} in {output}, a Hugging Face folder")
