"""Writing to standard output: at once, and with one line where it cannot be written."""

from __future__ import annotations

import contextlib
import json
import os
import sys

from fusemesh.hybrid.outputs import OutputError


def write(text: str, end: str = "\n") -> None:
    """Write a text to standard output at once.

    Raises:
        BrokenPipeError: nobody reads it any longer.
        OutputError: it cannot be written.
        ValueError: its encoding lacks a character.
    """
    try:
        print(text, end=end, flush=True)
    except UnicodeEncodeError as error:
        raise ValueError(
            f"standard output: expected an encoding that has {error.object[error.start]!a}, received {error.encoding}; "
            "set PYTHONIOENCODING=utf-8"
        ) from error
    except OSError as error:
        drop()
        raise cannot_write(error) from error


def as_json(value: object) -> str:
    """Return ``value`` as JSON, in which only characters that standard output's encoding lacks are escaped."""
    text = json.dumps(value, ensure_ascii=False)
    try:
        text.encode(getattr(sys.stdout, "encoding", None) or "utf-8")
    except UnicodeEncodeError:
        return json.dumps(value)
    return text


def cannot_write(error: OSError) -> OSError:
    """Return the error for a standard output that the system refuses to write; a broken pipe's as it is."""
    if isinstance(error, BrokenPipeError):
        return error
    made = OutputError(
        f"standard output: cannot write to it: {error.strerror or error}; make room there, or send it elsewhere"
    )
    made.errno = error.errno
    return made


def drop() -> None:
    """Send what is left in the buffer, and whatever comes, nowhere: Python would complain of it at its end."""
    with contextlib.suppress(OSError, ValueError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)
