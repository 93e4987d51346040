"""Train a byte-level language model on the Python standard library's source, on four local ranks in dp2 x tp2.

Then evaluate it over all ranks, merge the ranks' checkpoint into one file, load that in this process alone, and check
that its held-out loss is the same. Settings: train_stdlib.toml beside this file; any key of it is an option:

    python examples/train_stdlib.py --layout "fsdp2 x tp2" --training.steps 100
"""

import argparse
import dataclasses
import json
import shutil
import sys
import time
from pathlib import Path

from fusemesh import config
from fusemesh.hybrid.checkpoint import merge
from fusemesh.hybrid.layout import Layout
from fusemesh.hybrid.ranks.join import launch_local
from fusemesh.run.evaluator import checkpoint_of, evaluate_file
from fusemesh.run.metrics import draw_loss_curve
from fusemesh.run.trainer import prepare, train_rank
from fusemesh.tasks.language_model import baselines, load_corpus

TOLERANCE = 1e-5  # relative, between the held-out loss of all ranks and of the merged model in one process


def main(arguments=None):
    began = time.perf_counter()
    settings = read_settings(arguments)
    folder = Path(settings.run.directory)
    remove_earlier_run(folder)
    ranks = Layout.parse(settings.layout).world_size
    prepare(settings, ranks, resume=False)

    corpus = load_corpus(settings.data.path, settings.data.held_out, encoding=settings.data.encoding)
    length = settings.data.sequence_length
    print(f"{corpus.source}: {len(corpus.train):,} bytes of {corpus.train_documents} documents to train on,", end=" ")
    print(f"{len(corpus.held_out):,} bytes of {corpus.held_out_documents} held out")
    print(f"training in layout {settings.layout} on {ranks} ranks", flush=True)
    summary = launch_local(ranks, train_rank, config.as_dict(settings))[0]

    merged = merge(checkpoint_of(folder), folder / "model.safetensors")
    alone = evaluate_file(merged["output"], dataclasses.replace(settings, layout="single"))
    together = summary["held_out"]
    difference = abs(alone["loss"] - together["loss"]) / together["loss"]

    simple = baselines(corpus, length, range(together["samples"]))
    names = {
        "ngram0": "n-gram, 0 bytes of context",
        "ngram1": "n-gram, 1 byte of context",
        "ngram2": "n-gram, 2 bytes of context",
        "gzip": "gzip -9",
    }
    report = {
        "corpus": corpus.source,
        **{
            key: summary[key] for key in ("layout", "world_size", "device", "backends", "parameters", "steps", "tokens")
        },
        "tokens_per_s": summary["tokens_per_s"],
        "held_out_bytes": together["targets"],
        "bits_per_byte": {"model": together["bits_per_byte"], **simple},
        "loss_all_ranks": together["loss"],
        "loss_merged_one_process": alone["loss"],
        "relative_difference": difference,
        "seconds": round(time.perf_counter() - began, 1),
    }
    (folder / "report.json").write_text(json.dumps(report, indent=2) + "\n")
    draw_loss_curve(
        folder,
        folder / "loss_curve.png",
        baselines={names[key]: value for key, value in simple.items()},
        title=f"Bytes of the {corpus.source}, layout {summary['layout']}",
    )

    print(f"\nbits per byte on the same {together['targets']:,} held-out bytes")
    for label, value in [*((names[key], simple[key]) for key in names), ("this model", together["bits_per_byte"])]:
        print(f"  {label:<28}{value:7.3f}")
    gap = together["bits_per_byte"] - simple["ngram2"]
    print(f"  {abs(gap):.3f} bits {'above' if gap > 0 else 'below'} the n-gram with 2 bytes of context")
    print(f"layout {summary['layout']} on {ranks} {summary['device']} ranks; {', '.join(summary['backends'])}")
    print(f"{summary['parameters']:,} parameters, {summary['tokens']:,} bytes, {summary['tokens_per_s']:,} bytes/s")
    print(f"held-out loss: {together['loss']:.7f} over all ranks, {alone['loss']:.7f} merged, in one process")
    print(
        f"relative difference {difference:.1e}; wrote report.json and loss_curve.png in {folder}; {report['seconds']} s"
    )
    if not difference <= TOLERANCE:
        print(f"FAILED: the two losses differ by more than {TOLERANCE:.0e}", file=sys.stderr)
        return 1
    if not together["bits_per_byte"] < simple["ngram1"]:
        print("FAILED: the model is no better than the n-gram with 1 byte of context", file=sys.stderr)
        return 1
    return 0


def remove_earlier_run(folder):
    """Delete what an earlier run of this script left there, and nothing else."""
    if not folder.exists() or not any(folder.iterdir()):
        return
    if not (folder / "config.toml").is_file() or not (folder / "checkpoints").is_dir():
        sys.exit(f"run.directory: {str(folder)!r} holds files, but no run; choose a new folder")
    shutil.rmtree(folder)


def read_settings(arguments):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    for key in config.fields_of(config.Config):
        parser.add_argument(f"--{key}")
    given = {key: value for key, value in vars(parser.parse_args(arguments)).items() if value is not None}
    return config.load(Path(__file__).with_suffix(".toml"), given)


if __name__ == "__main__":
    sys.exit(main())
