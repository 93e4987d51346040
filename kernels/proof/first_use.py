"""A compiled kernel is proven before its first result is handed out.

Calls are told apart by a cheap key (numbers, sizes, strides and alignments). For a key seen for the first time every
launch is compiled and not run. Compiled kernels that no verdict exists on run in trials: small calls of the same
specialisation, compared with the reference on that device. After each call the hashes of what ran are looked up once
more, so that a key that is too coarse hands out nothing unproven.
"""

from __future__ import annotations

import contextlib
import contextvars
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from .. import env
from ..runtime import launch
from . import report, store
from .trial import Trial, Wrong

OFF, ON, ALWAYS = "off", "on", "always"
MOST_KEYS = 1 << 16  # of one device; beyond them all are forgotten and asked for again

if env.PROOF not in (OFF, ON, ALWAYS):
    raise ValueError(f"FUSEMESH_PROOF: expected off, on or always, received {env.PROOF!r}; unset it for on")
_mode = env.PROOF


@contextlib.contextmanager
def mode(name: str) -> Iterator[None]:
    """Within the block proofs are ``off``, ``on`` or ``always`` made, in every thread, whatever FUSEMESH_PROOF says."""
    global _mode
    before, _mode = _mode, name
    try:
        yield
    finally:
        _mode = before


@dataclass(frozen=True)
class Refused:
    """The reason why the kernels of a call are not used on a device."""

    why: str
    is_wrong: bool  # a trial's results were wrong; else the kernels could not be proven
    error: Exception | None = None  # that ended the attempt


class NotProven(RuntimeError):
    """Triton was asked for by name, and its kernels are not proven on the device.

    Args:
        is_wrong: whether their results were wrong; else they could not be proven.
    """

    def __init__(self, message: str, is_wrong: bool) -> None:
        super().__init__(message)
        self.is_wrong = is_wrong


class Call(Protocol):
    """One call of an op that Triton's kernels are to compute."""

    @property
    def operation(self) -> str:
        """``attention_forward``: for messages and keys."""
        ...

    @property
    def arguments(self) -> tuple[Any, ...]:
        """Those of the op, which tell calls apart."""
        ...

    @property
    def device(self) -> torch.device:
        """Where the tensors are."""
        ...

    def compute(self) -> Any:
        """Return the op's results by Triton's kernels."""
        ...

    def trials(self, exactly: bool) -> Iterable[Trial]:
        """Yield small calls of the same specialisation; ``exactly``: see :func:`attention.trials`."""
        ...

    @property
    def limit(self) -> str:
        """What the trials' sizes are limited by beyond the compiled kernel: part of a verdict's key, mostly empty."""
        ...


class Device:
    """What is known of the kernels of one kind of device."""

    def __init__(self, executor: launch.Executor) -> None:
        self.executor = executor
        self.proven: set[str] = set()  # compiled hashes
        self.calls: dict[Any, Refused | None] = {}  # by key
        self.refused: dict[str, Refused] = {}  # by compiled hash


_devices: dict[str, Device] = {}
_said: set[tuple[str, str]] = set()
_proving = threading.RLock()
_UNKNOWN = Refused("", False)
_PLAIN = frozenset((int, float, bool, str, type(None)))


def forget() -> None:
    """Forget what this process knows, and what it has said; the store is another matter."""
    _devices.clear()
    _said.clear()


def device_of(executor: launch.Executor) -> Device:
    """Return what is known of an executor's device."""
    name = f"{executor.name} {executor.target.name}"
    found = _devices.get(name)
    if found is None:
        found = _devices.setdefault(name, Device(executor))
    return found


def run(call: Call, by_name: bool) -> Any:
    """Return the results of a call by Triton's kernels, or None where they are not to be used.

    Args:
        by_name: whether the caller asked for Triton, and is told by an error in place of None.

    Raises:
        NotProven: the call asked for the kernels by name.
        RuntimeError: a CUDA graph is being captured, and the kernels have not been tried yet.
    """
    if call.device.type == "cuda" and call.device.index not in (None, torch.cuda.current_device()):
        # Triton launches on the current GPU, whatever the tensors are on.
        with torch.cuda.device(call.device):
            return run(call, by_name)
    executor = launch.executor_of(call.device)
    if executor is None or not executor.proves or _mode == OFF:
        return call.compute()
    device = device_of(executor)
    key = key_of(call)
    refused = device.calls.get(key, _UNKNOWN)
    if refused is None:
        with launch.Observed() as seen:
            results = call.compute()
        if not call.limit and device.proven.issuperset(seen.kernels):
            return results
        # The key was too coarse for this call, or its trials are good for these sizes alone.
        refused = settle(device, call, seen.kernels)
        if refused is None:
            return results
    elif refused is _UNKNOWN:
        refused = settle(device, call)
        if len(device.calls) >= MOST_KEYS:
            device.calls.clear()
        device.calls[key] = refused
        if refused is None:
            return run(call, by_name)
    if not by_name:
        return None
    if refused.error is not None:
        raise refused.error
    raise NotProven(
        f"backend='triton': the kernels of this call are not proven on {executor.name}: {refused.why}; use "
        "backend='auto', which takes another, or FUSEMESH_PROOF=off to trust them",
        refused.is_wrong,
    )


def key_of(call: Call) -> tuple[Any, ...]:
    """Return what tells a call from others: its numbers, and dtypes, sizes, strides and alignment of its tensors."""
    key: list[Any] = [call.operation]
    for x in call.arguments:
        # isinstance of a tensor costs ten times as much where x is none.
        if type(x) in _PLAIN:
            key.append(x)
        elif type(x) is list:
            key.append(tuple((t.dtype, t.shape, t.data_ptr() & 15) if isinstance(t, torch.Tensor) else t for t in x))
        else:
            key += (x.dtype, x.shape, x.stride(), x.data_ptr() & 15)
    return tuple(key)


def settle(device: Device, call: Call, real: dict[str, launch.Seen] | None = None) -> Refused | None:
    """Find out whether the kernels of a call are proven, and prove those that are not; None: all are.

    Args:
        real: the kernels of the call by compiled hash, where they are known.
    """
    if _is_capturing(call.device):
        raise RuntimeError(
            f"{call.operation}: this call's kernels are not proven on {device.executor.name} yet, which a CUDA graph "
            "that is being captured cannot do; run the call once before the capture (warm up), or set "
            "FUSEMESH_PROOF=off"
        )
    start = time.perf_counter()
    if real is None:
        try:
            with launch.Observed(prepares_only=True) as prepared:
                call.compute()
        except Exception as error:
            return _cannot(
                device, call, f"{type(error).__name__} while they were compiled: {_first_line(error)}", error
            )
        real = prepared.kernels
    compiled = time.perf_counter() - start
    kept = store.default()
    missing = {h: seen for h, seen in real.items() if not _is_known(device, call, kept, h)}
    if missing and not any(h + call.limit in device.refused for h in real):
        name = "trials of " + " ".join(sorted(missing)) + call.limit
        with _proving, kept.proving(report.key(device.executor, name)):
            missing = {h: seen for h, seen in missing.items() if not _is_known(device, call, kept, h)}
            if missing:
                why = _prove(device, call, missing, compiled)
                if why is not None:
                    return why
    for h in real:
        if h + call.limit in device.refused:
            _say(device, call, h + call.limit)
            return device.refused[h + call.limit]
    return None


def _is_capturing(device: torch.device) -> bool:
    """Return whether a CUDA graph is being captured, in which nothing can be compared."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def _is_known(device: Device, call: Call, kept: store.Store, compiled_hash: str) -> bool:
    """Return whether there is a verdict on a compiled kernel, of this process or stored."""
    name = compiled_hash + call.limit
    if name in device.proven or name in device.refused:
        return True
    verdict = None if _mode == ALWAYS else kept.read(report.key(device.executor, name))
    if verdict is None:
        return False
    if verdict.passed:
        device.proven.add(name)
    else:
        device.refused[name] = Refused(verdict.reason, True)
    return True


def _prove(device: Device, call: Call, missing: dict[str, launch.Seen], compiled: float) -> Refused | None:
    """Run trials until each of the ``missing`` kernels has a verdict, which is stored; None: each has one.

    Args:
        compiled: seconds that the compilation took.
    """
    start = time.perf_counter()
    try:
        left = isolated(lambda: _trials(device, call, missing), call.device)
    except Exception as error:
        what = "out of memory" if isinstance(error, (torch.OutOfMemoryError, MemoryError)) else _first_line(error)
        return _cannot(device, call, f"their proof ended with {type(error).__name__}: {what}")
    seconds = time.perf_counter() - start
    names = ", ".join(sorted({seen.name for seen in missing.values()}))
    if left:
        some = ", ".join(sorted({missing[h].name for h in left}))
        return _cannot(device, call, f"no small call compiles to the same code of {some}")
    env.logger.info(
        "%s: tried %s on %s, %.0f ms beside %.0f ms of compilation",
        call.operation,
        names,
        device.executor.name,
        1e3 * seconds,
        1e3 * compiled,
    )
    return None


def _trials(device: Device, call: Call, missing: dict[str, launch.Seen]) -> list[str]:
    """Run the trials that cover the missing kernels, until one is wrong; return those that none covers."""
    passed: dict[str, launch.Seen] = {}
    for exactly in (False, True):
        for trial in call.trials(exactly):
            with launch.Observed(prepares_only=True) as prepared:
                trial.run()
            if not any(h in prepared.kernels for h in missing if h not in passed or not exactly):
                continue
            with launch.Observed() as ran:
                results = trial.run()
            here = {h: seen for h, seen in missing.items() if h in ran.kernels}
            wrong = trial.check(results)
            if wrong:
                # Beyond suspicion is what was right before; where that is all of it, nothing of the call is used.
                right = device.proven.union(passed)
                asked = {h: seen for h, seen in ran.kernels.items() if h + call.limit not in right} or missing
                guilty = _guilty(trial, wrong, asked)
                if missing.keys() & guilty.keys():
                    _condemn(device, call, wrong, {h: seen for h, seen in guilty.items() if h in missing})
                    return []
                # A kernel that the call itself does not run.
                continue
            passed.update(here)
        if len(passed) == len(missing):
            break
    for h, seen in passed.items():
        device.proven.add(h + call.limit)
        found = store.Verdict(True, "", report.details(device.executor, call, seen))
        store.default().write(report.key(device.executor, h + call.limit), found)
    return [h for h in missing if h not in passed]


def _guilty(trial: Trial, wrong: list[Wrong], kernels: dict[str, launch.Seen]) -> dict[str, launch.Seen]:
    """Return those of the kernels that may have made a trial's results wrong."""
    suspects = trial.suspects([x.name for x in wrong], sorted({seen.name for seen in kernels.values()}))
    return {h: seen for h, seen in kernels.items() if seen.name in suspects}


def _condemn(device: Device, call: Call, wrong: list[Wrong], guilty: dict[str, launch.Seen]) -> None:
    """Keep the verdict on kernels that made results wrong."""
    names = ", ".join(sorted({seen.name for seen in guilty.values()}))
    why = f"{names}: " + "; ".join(dict.fromkeys(x.text for x in wrong))
    for h, seen in guilty.items():
        device.refused[h + call.limit] = Refused(why, True)
        found = store.Verdict(False, why, report.details(device.executor, call, seen))
        store.default().write(report.key(device.executor, h + call.limit), found)


def _cannot(device: Device, call: Call, why: str, error: Exception | None = None) -> Refused:
    """Say once that a call's kernels could not be proven, and return the reason."""
    key = (call.operation, why)
    if key not in _said:
        _said.add(key)
        env.logger.info("%s: Triton's kernels are not used on %s: %s", call.operation, device.executor.name, why)
    return Refused(why, False, error)


def _say(device: Device, call: Call, name: str) -> None:
    """Warn once of a kernel whose results were wrong, with what a bug report needs."""
    if (device.executor.name, name) not in _said:
        _said.add((device.executor.name, name))
        verdict = store.default().read(report.key(device.executor, name))
        report.warn(device.executor, call, device.refused[name].why, verdict)


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [""])[0][:300]


def isolated(function: Callable[[], Any], device: torch.device) -> Any:
    """Return ``function()``, called in a thread of its own.

    Autocast, grad mode, dispatch modes, transforms, inference mode, the current stream and whatever else torch keeps
    for each thread are therefore those of a program that has just begun, and the caller's stay as they are.
    """
    results: list[Any] = []
    errors: list[BaseException] = []
    context = contextvars.copy_context()

    def body() -> None:
        try:
            if device.type == "cuda":
                torch.cuda.set_device(device)
            results.append(context.run(function))
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=body, name="fusemesh proof", daemon=True)
    thread.start()
    thread.join()
    if errors:
        raise errors[0]
    return results[0]
