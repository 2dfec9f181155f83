"""The process that undoes a freeze or a stop whatever happens to the worker.

Run as a script, with the standard library only, in a session of its own: it holds the connection to the guest agent
(kind `agent`) or to QEMU's monitor (kind `monitor`), passes commands on, and once armed it undoes by itself when the
worker dies (its end of the pipe closes) or is late. One JSON object a line on both pipes:

    {"run": command, "arguments": {…}, "answer": seconds}  → {"return": …} or {"refused": text} or {"failed": text}
    {"arm": seconds}                                       → {"armed": true}
    {"undo": true}                                         → {"undone": result, "late": bool} or {"failed": text}
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import socket
import sys
import time
from typing import Any

PATIENCE = 300.0  # seconds for which undoing is tried
HELD = "farshore-held"  # the mark in QEMU that it was us who stopped the machine


class _Refused(Exception):
    pass


class Line:
    """The connection to agent or monitor; opened when needed, dropped after an error."""

    def __init__(self, kind: str, path: str) -> None:
        self.kind, self.path = kind, path
        self.socket: socket.socket | None = None
        self.rest = b""
        self.number = 0

    def run(self, command: str, arguments: dict[str, Any] | None = None, answer: float = 10.0) -> Any:
        """The command's result; _Refused, or OSError after which the connection is opened anew."""
        until = time.monotonic() + answer
        try:
            if self.socket is None:
                self._open(until)
            return self._ask(command, arguments, until)
        except (OSError, ValueError) as exc:
            if self.socket is not None:
                self.socket.close()
            self.socket = None
            if isinstance(exc, OSError):
                raise
            raise OSError(f"not understood: {exc}") from exc

    def _open(self, until: float) -> None:
        self.rest = b""
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.settimeout(max(0.01, until - time.monotonic()))
        self.socket.connect(self.path)
        if self.kind == "monitor":
            self._line(until)
            self._ask("qmp_capabilities", None, until)
        else:
            # What is left of a former client's talk is thrown away: the agent marks the answer with a byte 0xFF.
            self.number = int.from_bytes(os.urandom(4), "big")
            ask = {"execute": "guest-sync-delimited", "arguments": {"id": self.number}}
            self.socket.sendall(b"\xff" + json.dumps(ask).encode() + b"\n")
            while True:
                line = self._line(until)
                if b"\xff" in line:
                    with contextlib.suppress(ValueError):
                        if json.loads(line.rpartition(b"\xff")[2]).get("return") == self.number:
                            return

    def _ask(self, command: str, arguments: dict[str, Any] | None, until: float) -> Any:
        message: dict[str, Any] = {"execute": command}
        if arguments:
            message["arguments"] = arguments
        assert self.socket is not None  # noqa: S101  for the type checker
        self.socket.settimeout(max(0.01, until - time.monotonic()))
        self.socket.sendall(json.dumps(message).encode() + b"\n")
        while True:
            reply = json.loads(self._line(until))
            if "error" in reply:
                raise _Refused(str(reply["error"].get("desc", reply["error"])))
            if "return" in reply:
                return reply["return"]

    def _line(self, until: float) -> bytes:
        assert self.socket is not None  # noqa: S101  for the type checker
        while b"\n" not in self.rest:
            left = until - time.monotonic()
            if left <= 0:
                raise TimeoutError("no answer in time")
            self.socket.settimeout(left)
            data = self.socket.recv(1 << 16)
            if not data:
                raise ConnectionError("the connection was closed")
            self.rest += data
        line, _, self.rest = self.rest.partition(b"\n")
        return line


def undo(line: Line) -> Any:
    """Thaw, or resume, until it is seen to be so. OSError or _Refused when PATIENCE is at its end."""
    until = time.monotonic() + PATIENCE
    while True:
        try:
            return _thaw(line) if line.kind == "agent" else _resume(line)
        except (OSError, _Refused):
            if time.monotonic() > until:
                raise
            time.sleep(0.2)  # between two tries, until PATIENCE ends


def _thaw(line: Line) -> int:
    """How many file systems were thawed; 0 when none was frozen any more."""
    count = 0
    if line.run("guest-fsfreeze-status") != "thawed":
        count = int(line.run("guest-fsfreeze-thaw"))
    if line.run("guest-fsfreeze-status") != "thawed":
        raise OSError("the guest is still frozen")
    return count


def _resume(line: Line) -> bool:
    """Whether the machine was still held by us."""
    held = any(item.get("name") == HELD for item in line.run("qom-list", {"path": "/objects"}))
    if not held:
        return False
    still = line.run("query-status").get("status") == "paused"
    if still:
        line.run("cont")
    line.run("object-del", {"id": HELD})
    return still


class Guardian:
    """Reads commands from the worker and looks at the clock."""

    def __init__(self, line: Line) -> None:
        self.line = line
        self.deadline: float | None = None  # monotonic; None: nothing to be undone
        self.late = False
        self.rest = b""

    def serve(self) -> None:
        while True:
            message = self._next()
            if message is None:
                return
            try:
                reply = self._answer(message)
            except _Refused as exc:
                reply = {"refused": str(exc)}
            except OSError as exc:
                reply = {"failed": str(exc) or type(exc).__name__}
            with contextlib.suppress(OSError):  # a dead worker reads no replies
                os.write(1, json.dumps(reply).encode() + b"\n")

    def _next(self) -> dict[str, Any] | None:
        """The worker's next command. Undoes on the way when the time is up, or at the end of the pipe."""
        while b"\n" not in self.rest:
            wait = None if self.deadline is None else max(0.0, self.deadline - time.monotonic())
            if not select.select([0], [], [], wait)[0]:
                self._give_up()
                continue
            data = os.read(0, 1 << 16)
            if not data:
                if self.deadline is not None:
                    self._give_up()
                return None
            self.rest += data
        line, _, self.rest = self.rest.partition(b"\n")
        return json.loads(line)

    def _give_up(self) -> None:
        self.deadline = None
        self.late = True
        with contextlib.suppress(OSError, _Refused):
            undo(self.line)

    def _answer(self, message: dict[str, Any]) -> dict[str, Any]:
        if "arm" in message:
            self.deadline = time.monotonic() + float(message["arm"])
            self.late = False
            return {"armed": True}
        if "undo" in message:
            late = self.late or (self.deadline is not None and time.monotonic() > self.deadline)
            self.deadline = None
            return {"undone": undo(self.line), "late": late}
        answer = float(message.get("answer", 10.0))
        if self.late:
            raise _Refused("too late: it was undone already")
        if self.deadline is not None:
            answer = min(answer, max(0.01, self.deadline - time.monotonic()))
        return {"return": self.line.run(message["run"], message.get("arguments"), answer)}


if __name__ == "__main__":
    Guardian(Line(sys.argv[1], sys.argv[2])).serve()
