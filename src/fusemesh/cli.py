"""Train, evaluate, ask and merge models in any layout; rank layouts; measure; see what this machine can run.

With ``--json`` a command writes exactly one JSON object to stdout; messages always go to stderr. Every key of the
configuration is an option: what the TOML file calls ``steps`` under ``[training]`` is ``--training.steps``; the most
used ones have short names, too.

Exit status: 0; 1 for a run that failed (a rank died, numbers not finite, replicas that drifted, what it
writes cannot be written any longer, no layout that fits); 2 for a request that cannot work; 130 after an interruption;
141 where the reader of the output has gone; 143 after SIGTERM. ``doctor --trace`` keeps the script's.
"""

from __future__ import annotations

import argparse
import os
import sys
import traceback
from collections.abc import Sequence
from typing import Any

from fusemesh import __version__, standard_output
from fusemesh.commands import bench, doctor, evaluate, generate, merge, plan, predict, scaling, tokenize, train, verify
from fusemesh.commands.options import Parser
from fusemesh.hybrid.outputs import UserError
from fusemesh.hybrid.ranks.failure import on_end
from fusemesh.spelling import suggestion

COMMANDS = (doctor, tokenize, train, evaluate, predict, generate, merge, verify, plan, scaling, bench)
# As a shell reports a process that SIGPIPE ended.
_NO_READER = 141
# And that SIGTERM ended.
_TERMINATED = 143

_SHORT_HELP = """\
usage: fusemesh COMMAND [options]

{commands}

for example:
  fusemesh train text_classification --data.path reviews.csv --out runs/reviews
  echo "What a film" | fusemesh predict runs/reviews

fusemesh COMMAND --help lists the options of a command"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status, see above."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    shown: SystemExit | None = None
    try:
        try:
            status = _run(words)
        except SystemExit as end:  # of --help and --version
            shown = end
        sys.stdout.flush()
    except BrokenPipeError:
        standard_output.drop()
        return _NO_READER
    except OSError as error:
        standard_output.drop()
        return _fail(_name(words), 2, str(standard_output.cannot_write(error)))
    if shown is not None:
        raise shown
    return status


def _run(words: list[str]) -> int:
    if not words:
        listed = "\n".join(f"  {command.NAME:<10} {command.SUMMARY}" for command in COMMANDS)
        print(_SHORT_HELP.format(commands=listed))
        return 0
    name, as_json = _name(words), "--json" in _cut(words)[0]

    def end(failure: Exception) -> None:
        standard_output.write(standard_output.as_json({"error": str(failure)}))

    # A thread that finds another rank lost ends this process.
    on_end[:] = [end] if as_json and _is_first() else []
    try:
        options = parse(words)
        result, text, status = options.command(options)
        if result is not None and (as_json or text is not None):
            standard_output.write(standard_output.as_json(result) if as_json else str(text))
    except BrokenPipeError:
        raise
    except RuntimeError as error:
        return _fail(name, 1, str(error), as_json=as_json, result=getattr(error, "result", None))
    except (ValueError, OSError, UserError) as error:
        return _fail(name, 2, str(error), as_json=as_json)
    except KeyboardInterrupt as error:
        status = _TERMINATED if isinstance(error, train.Terminated) else 130
        return _fail(name, status, str(error) or "interrupted", as_json=as_json)
    except Exception as error:
        if not as_json:
            _refuse_start(f"{type(error).__name__}: {error}")
            raise
        traceback.print_exc()
        return _fail(name, 1, f"{type(error).__name__}: {error}", as_json=True)
    return status


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Return the options of a command line, its command as ``command``.

    Raises:
        ValueError: there is no such command or option, or an option lacks its value.
    """
    words, after_dashes = _cut(list(arguments))
    known = [command.NAME for command in COMMANDS]
    if words and not words[0].startswith("-") and words[0] not in known:
        raise ValueError(
            f"command: expected one of {', '.join(known)}, received {words[0]!r}{suggestion(words[0], known)}"
        )
    options, unknown = parser(words).parse_known_args(words, argparse.Namespace(after_dashes=after_dashes))
    if unknown:
        raise ValueError(_unknown(unknown[0], options))
    return options


def parser(words: Sequence[str] = ()) -> argparse.ArgumentParser:
    """Return the parser of all commands; the words of the command line say which task's defaults its help shows."""
    top = Parser(prog="fusemesh", usage="%(prog)s COMMAND [options]", description=__doc__, allow_abbrev=False)
    top.add_argument("--version", action="version", version=f"fusemesh {__version__}")
    commands = top.add_subparsers(dest="name", required=True, metavar="COMMAND", prog="fusemesh")
    for module in COMMANDS:
        command = commands.add_parser(module.NAME, help=module.SUMMARY, description=module.SUMMARY, allow_abbrev=False)
        command.usage, command.words = f"%(prog)s {module.USAGE}", words
        command.add_argument("--json", action="store_true", help="one JSON object on stdout")
        module.add_options(command)
        command.set_defaults(command=module.run, parser=command)
    return top


def _unknown(word: str, options: argparse.Namespace) -> str:
    """Return the message for a word that the command does not know."""
    if not word.startswith("-"):
        return f"expected only options from here on, received {word!r}; see fusemesh {options.name} --help"
    name = word.partition("=")[0]
    guess = suggestion(name, options.parser.option_names())
    return f"{name}: no option of fusemesh {options.name}{guess or f'; see fusemesh {options.name} --help'}"


def _cut(words: list[str]) -> tuple[list[str], list[str]]:
    """Return the words for argparse, and those after ``--`` of ``doctor --trace SCRIPT ... -- ...``, for the script."""
    if words[:1] == ["doctor"] and "--trace" in words and "--" in words:
        cut = words.index("--")
        return words[:cut], words[cut + 1 :]
    return words, []


def _name(words: Sequence[str]) -> str:
    """Return the program and its command, as messages begin."""
    known = words and words[0] in [command.NAME for command in COMMANDS]
    return f"fusemesh {words[0]}" if known else "fusemesh"


def _fail(name: str, status: int, message: str, *, as_json: bool = False, result: dict[str, Any] | None = None) -> int:
    print(f"{name}: error: {message}", file=sys.stderr, flush=True)
    if as_json and _is_first():
        print(standard_output.as_json({**(result or {}), "error": message}), flush=True)
    if status not in (130, _TERMINATED):
        _refuse_start(message)
    return status


def _refuse_start(reason: str) -> None:
    """Let the other ranks of a launcher know of an error that came before this one joined them."""
    if _is_launched():
        from fusemesh.hybrid.ranks.join import refuse_start

        refuse_start(reason)


def _is_launched() -> bool:
    """Return whether a launcher's variables are there; without them a wrong option is told without importing torch."""
    return any(name in os.environ for name in ("RANK", "OMPI_COMM_WORLD_RANK", "PMI_RANK", "SLURM_PROCID"))


def _is_first() -> bool:
    """Return whether this process is alone or a launcher's first rank, which prints for all."""
    if not _is_launched():
        return True
    from fusemesh.hybrid.ranks.environment import launcher_of, rank_and_size

    try:
        launcher = launcher_of(os.environ)
        return launcher is None or rank_and_size(os.environ, launcher)[0] == 0
    except ValueError:
        return True
