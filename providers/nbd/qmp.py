"""QEMU's machine protocol and its guest agent: one JSON object a line, over a unix socket.

A monitor serves one client at a time, so a connection is opened for a few commands and closed again: a dead or sleeping
worker must not lock out its successor.
"""

from __future__ import annotations

import itertools
import json
import socket
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

from farshore.domain.errors import Code, FarshoreError
from farshore.providers.nbd.errors import Malformed, unreachable
from farshore.providers.nbd.wire import connect

LONGEST_LINE = 64 << 20  # bytes; a description of QEMU's own interface has about 200 KiB


class Refused(FarshoreError):
    """QEMU answered with an error: SnapshotFailed in its own words; SourceBusy when another worker was faster."""

    def __init__(self, command: str, text: str, subject: str) -> None:
        busy = "already exists" in text.lower() or "in use" in text.lower()
        super().__init__(
            Code.SOURCE_BUSY if busy else Code.SNAPSHOT_FAILED,
            f"QEMU refuses {command}: {text.rstrip('.')}.",
            subject=subject,
        )
        self.text = text.rstrip(".")


def action(kind: str, **data: Any) -> dict[str, Any]:
    """One action of a transaction. Underscores become hyphens."""
    return {"type": kind, "data": _hyphens(data)}


class Channel:
    """Lines of JSON, with a deadline for each. Raises OSError and Malformed."""

    def __init__(self, path: Path, timeout: float) -> None:
        self._socket = connect(str(path), timeout)
        self._rest = bytearray()

    def send(self, message: Mapping[str, Any], until: float, descriptor: int | None = None) -> None:
        self._socket.settimeout(_left(until))
        data = json.dumps(message).encode() + b"\n"
        if descriptor is None:
            self._socket.sendall(data)
        else:
            sent = socket.send_fds(self._socket, [data], [descriptor])
            self._socket.sendall(data[sent:])

    def receive(self, until: float) -> dict[str, Any]:
        while True:
            end = self._rest.find(b"\n")
            if end >= 0:
                line = bytes(self._rest[:end])
                del self._rest[: end + 1]
                break
            if len(self._rest) > LONGEST_LINE:
                raise Malformed("a line without an end")
            self._socket.settimeout(_left(until))
            data = self._socket.recv(1 << 16)
            if not data:
                raise ConnectionError("the other side closed the connection")
            self._rest += data
        try:
            message: Any = json.loads(line)
        except ValueError as exc:
            raise Malformed(f"a line that is not JSON: {line[:80]!r}") from exc
        if not isinstance(message, dict):
            raise Malformed(f"a line that is no object: {line[:80]!r}")
        return message

    def close(self) -> None:
        self._socket.close()


class Monitor:
    """A QMP session. Thread-safe: one command at a time. Use as a context manager."""

    def __init__(self, path: Path, *, subject: str, timeout: float = 5.0, answer: float = 20.0) -> None:
        """Connect and greet. SourceUnreachable, also when another client holds the monitor."""
        self._where = f"QEMU's monitor {path}"
        self._subject = subject
        self._answer = answer
        self._ids = itertools.count(1)
        self._lock = threading.Lock()
        self._channel: Channel | None = None
        until = time.monotonic() + timeout
        try:
            self._channel = Channel(path, timeout)
            greeting = self._channel.receive(until)
            if "QMP" not in greeting:
                raise Malformed(f"a greeting without QMP: {str(greeting)[:80]}")
        except (OSError, Malformed) as exc:
            self.close()
            raise unreachable(self._where, "connecting", exc) from exc
        try:
            self("qmp_capabilities")
        except BaseException:
            self.close()
            raise

    def __call__(self, command: str, *, descriptor: int | None = None, **arguments: Any) -> Any:
        """Run a command and return its result. Refused when QEMU says no; SourceUnreachable when it says nothing.

        Underscores in argument names become hyphens. Events that come before the reply are of no interest.
        """
        with self._lock:
            if self._channel is None:
                raise unreachable(self._where, f"running {command}", "the connection is closed")
            number = next(self._ids)
            until = time.monotonic() + self._answer
            try:
                message: dict[str, Any] = {"execute": command, "id": number}
                if arguments:
                    message["arguments"] = _hyphens(arguments)
                self._channel.send(message, until, descriptor)
                while True:
                    reply = self._channel.receive(until)
                    if "event" in reply:
                        continue
                    # An error about a line that QEMU could not read carries no id.
                    if reply.get("id", number) != number or ("return" not in reply and "error" not in reply):
                        raise Malformed(f"an answer to something else: {str(reply)[:80]}")
                    break
            except (OSError, Malformed) as exc:
                self._drop()
                raise unreachable(self._where, f"running {command}", exc) from exc
        if "error" in reply:
            raise Refused(command, str(reply["error"].get("desc", "")), self._subject)
        return reply["return"]

    def wait_until(self, done: Callable[[], bool], timeout: float, what: str) -> None:
        """Ask again and again until `done`. SourceBusy after `timeout` seconds."""
        until = time.monotonic() + timeout
        pause = 0.002
        while not done():
            if time.monotonic() > until:
                raise FarshoreError(
                    Code.SOURCE_BUSY, f"{what} did not end within {timeout:g} s.", subject=self._subject
                )
            time.sleep(pause)  # QEMU tells no event for everything that is waited for here
            pause = min(pause * 2, 0.2)

    def transaction(self, actions: Sequence[Mapping[str, Any]]) -> None:
        """All of `actions` in one instant, or none of them."""
        self("transaction", actions=list(actions))

    def close(self) -> None:
        with self._lock:
            self._drop()

    def _drop(self) -> None:
        if self._channel is not None:
            self._channel.close()
            self._channel = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _hyphens(arguments: Mapping[str, Any]) -> dict[str, Any]:
    return {name.replace("_", "-"): value for name, value in arguments.items()}


def _left(until: float) -> float:
    left = until - time.monotonic()
    if left <= 0:
        raise TimeoutError("no answer in time")
    return left
