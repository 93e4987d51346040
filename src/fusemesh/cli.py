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
from typing import Any

from fusemesh import __version__
from fusemesh.commands import bench, doctor, evaluate, generate, merge, plan, predict, scaling, train

COMMANDS = (doctor, train, evaluate, predict, generate, merge, plan, scaling, bench)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status, see above."""
    words, after_dashes = _cut(list(sys.argv[1:] if arguments is None else arguments))
    options = parser().parse_args(words, argparse.Namespace(after_dashes=after_dashes))
    try:
        result, text, status = options.command(options)
    except (ValueError, OSError) as error:
        return _fail(options, 2, str(error))
    except RuntimeError as error:
        return _fail(options, 1, str(error), getattr(error, "result", None))
    except KeyboardInterrupt:
        return _fail(options, 130, "interrupted; go on with --resume if the run has saved a checkpoint")
    if result is not None and (options.json or text is not None):
        print(json.dumps(result) if options.json else text)
    return status


def parser() -> argparse.ArgumentParser:
    """Return the parser of all commands."""
    top = argparse.ArgumentParser(prog="fusemesh", description=__doc__, allow_abbrev=False)
    top.add_argument("--version", action="version", version=f"fusemesh {__version__}")
    names = " | ".join(command.NAME for command in COMMANDS)
    commands = top.add_subparsers(dest="name", required=True, metavar=names)
    for module in COMMANDS:
        command = commands.add_parser(module.NAME, help=module.SUMMARY, description=module.SUMMARY, allow_abbrev=False)
        command.add_argument("--json", action="store_true", help="one JSON object on stdout")
        module.add_options(command)
        command.set_defaults(command=module.run)
    return top


def _cut(words: list[str]) -> tuple[list[str], list[str]]:
    """Return the words for argparse, and those after ``--`` of ``doctor --trace SCRIPT ... -- ...``, for the script."""
    if words[:1] == ["doctor"] and "--trace" in words and "--" in words:
        cut = words.index("--")
        return words[:cut], words[cut + 1 :]
    return words, []


def _fail(options: argparse.Namespace, status: int, message: str, result: dict[str, Any] | None = None) -> int:
    if options.json:
        print(json.dumps({**(result or {}), "error": message}))
    print(f"fusemesh {options.name}: error: {message}", file=sys.stderr)
    return status
