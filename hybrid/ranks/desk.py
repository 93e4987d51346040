"""Where the ranks of a run learn which port its store has, so that no two runs on a machine meet each other.

Rank 0 answers at the meeting port with the run's name and the store's port, which the system chose; the other ranks go
on past a port that anything else answers. The desk closes when all have come, so that the next run can open its own.
"""

from __future__ import annotations

import contextlib
import errno
import socket
import threading
import time
from collections.abc import Sequence

from .waiting import told

# Seconds for which an answer is waited for, and for which a given port may be taken, or another's, before that is said.
_ANSWER, _TAKEN = 2.0, 5.0
_GREETING = "fusemesh-meeting-1"


class Desk:
    """Answers at the first of ``ports`` that is free, until :meth:`close`."""

    def __init__(self, ports: Sequence[int], run: str) -> None:
        """Bind a port.

        Raises:
            ValueError: none can be had.
        """
        self._run = run
        deadline = time.monotonic() + _TAKEN
        while True:
            found = self._bind(ports)
            if found is not None:
                self._socket = found
                break
            if time.monotonic() > deadline:
                raise ValueError(
                    f"MASTER_PORT: {_ports_text(ports)} of {socket.gethostname()}, rank 0's machine: in use by another "
                    "program; set MASTER_PORT to a free port, another for each run"
                )
            time.sleep(0.1)
        self.port: int = self._socket.getsockname()[1]

    @staticmethod
    def _bind(ports: Sequence[int]) -> socket.socket | None:
        for port in ports:
            try:
                return _listen(port)
            except OSError as error:
                if error.errno != errno.EADDRINUSE:
                    raise ValueError(
                        f"MASTER_PORT: rank 0 cannot listen at port {port} of {socket.gethostname()} "
                        f"({error.strerror}); set MASTER_PORT to another"
                    ) from None
        return None

    def answer(self, store_port: int) -> None:
        """Tell everyone who asks, from now on, the port of the store."""
        self._text = f"{_GREETING} {store_port} {self._run}\n".encode()
        threading.Thread(target=self._serve, daemon=True, name="fusemesh: meeting").start()

    def _serve(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                asking, _ = self._socket.accept()
                with contextlib.suppress(OSError), asking:
                    asking.sendall(self._text)

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()


def ask(host: str, ports: Sequence[int], run: str, who: str, timeout: float) -> int:
    """Return the port of the run's store, as its desk says; wait for the desk.

    Args:
        who: the process that waits, and for whom, for the message after 10 s.
        timeout: seconds after which it has not come.

    Raises:
        ValueError: the only port is answered by something else.
        RuntimeError: nobody has come in time.
    """
    began, foreign_since, last = time.monotonic(), None, "nothing tried yet"

    def waiting() -> str:
        return f"{who} at {host}, {_ports_text(ports)}: {last}"

    with told(waiting):
        while True:
            foreign = None
            for port in ports:
                found, last = _ask_one(host, port, run)
                if found is not None:
                    return found
                if last.startswith("no connection"):
                    # What does not answer one port is unlikely to answer the next.
                    break
                foreign = foreign if last.startswith("nobody") else port
            else:
                if foreign is None:
                    last = f"nobody listens at {_ports_text(ports)}"
            now = time.monotonic()
            foreign_since = (foreign_since or now) if foreign is not None else None
            if len(ports) == 1 and foreign_since is not None and now - foreign_since > 2 * _TAKEN:
                raise ValueError(
                    f"MASTER_PORT: port {ports[0]} of {host} is taken by something else than rank 0 of this run "
                    f"({last}); set MASTER_PORT to a free port, another for each run"
                )
            if now - began > timeout:
                raise RuntimeError(f"nobody came within {timeout:.0f} s: {waiting()}")
            time.sleep(min(0.5, 0.02 + (now - began) / 10))


def _ask_one(host: str, port: int, run: str) -> tuple[int | None, str]:
    """Return the store's port, None if it is not to be had here, and what happened."""
    try:
        connection = socket.create_connection((host, port), _ANSWER)
    except ConnectionRefusedError:
        return None, f"nobody listens at port {port}"
    except OSError as error:
        return None, f"no connection to port {port} ({error.strerror or error})"
    text = b""
    with contextlib.suppress(OSError), connection:
        while not text.endswith(b"\n") and len(text) < 4096:
            part = connection.recv(4096)
            if not part:
                break
            text += part
    words = text.decode(errors="replace").rstrip("\n").split(" ", 2)
    if len(words) != 3 or words[0] != _GREETING:
        return None, f"port {port} is answered by another program"
    if words[2] != run:
        return None, f"port {port} is answered by another run of FuseMesh"
    return int(words[1]), ""


def check_address(host: str, came_from: str) -> None:
    """Check that a name of rank 0's machine resolves.

    Raises:
        ValueError: it does not.
    """
    for attempt in range(3):
        try:
            socket.getaddrinfo(host, None)
            return
        except (socket.gaierror, UnicodeError) as error:
            busy = getattr(error, "errno", None) == socket.EAI_AGAIN
            if busy and attempt < 2:
                time.sleep(0.5)
                continue
            reason = getattr(error, "strerror", None) or error
            raise ValueError(
                f"{came_from}: cannot resolve {host!r}, the machine of rank 0, from {socket.gethostname()} ({reason}); "
                "set MASTER_ADDR to a name or address that every machine of the run knows"
            ) from None


def check_own_address(host: str, came_from: str, port: int, run: str) -> None:
    """Check, on rank 0, that the address at which the others look for it is this machine's.

    Raises:
        ValueError: the desk at ``port`` does not answer there.
    """
    deadline = time.monotonic() + _TAKEN
    while True:
        found, last = _ask_one(host, port, run)
        if found is not None:
            return
        if time.monotonic() > deadline:
            raise ValueError(
                f"{came_from}: {host} is not the machine of rank 0, {socket.gethostname()}: {last}; set MASTER_ADDR to "
                "the address of the machine on which rank 0 runs"
            )
        time.sleep(0.1)


def reach(host: str, port: int) -> socket.socket:
    """Return a connection, if something listens there.

    Raises:
        RuntimeError: nothing does; with the reason alone.
    """
    try:
        return socket.create_connection((host, port), _ANSWER)
    except OSError as error:
        raise RuntimeError(error.strerror or str(error) or "no answer") from None


def _ports_text(ports: Sequence[int]) -> str:
    if len(ports) == 1:
        return f"port {ports[0]}"
    # Those that were drawn may begin again at the lowest.
    turn = next((at for at in range(1, len(ports)) if ports[at] < ports[at - 1]), 0)
    spans = [ports[:turn], ports[turn:]] if turn else [ports]
    return "ports " + " and ".join(f"{span[0]} to {span[-1]}" for span in spans)


def _listen(port: int) -> socket.socket:
    if socket.has_dualstack_ipv6():
        try:
            return socket.create_server(("", port), family=socket.AF_INET6, backlog=1024, dualstack_ipv6=True)
        except OSError as error:
            if error.errno not in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT):
                raise
    return socket.create_server(("", port), backlog=1024)
