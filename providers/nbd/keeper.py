"""The worker's side of the guardian process: freeze and thaw, stop and resume, with somebody else holding the clock."""

from __future__ import annotations

import contextlib
import json
import os
import select
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from farshore.providers.nbd import guardian

HELD = guardian.HELD
SLACK = 5.0  # seconds that a reply may take longer than what it reports on


class KeeperFailed(Exception):
    """Agent or monitor refused, did not answer, or was too late."""


class Keeper:
    """One guardian process. Not for two threads at once. `close` undoes what is still to be undone."""

    def __init__(self, kind: Literal["agent", "monitor"], path: Path) -> None:
        self._kind: Literal["agent", "monitor"] = kind
        self._path = path
        self._armed = False
        self._rest = b""
        self._process = subprocess.Popen(
            [sys.executable, "-I", "-S", guardian.__file__, kind, str(path)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,  # a Ctrl-C at the worker's terminal must not reach it
            env={},  # it needs nothing of what the worker knows
        )

    @property
    def pid(self) -> int:
        return self._process.pid

    def arm(self, within: float) -> None:
        """From now on everything is undone at the latest after `within` seconds. KeeperFailed: then it is not."""
        self._ask({"arm": within}, SLACK)
        self._armed = True

    def run(self, command: str, arguments: Mapping[str, Any] | None = None, *, answer: float = 10.0) -> Any:
        """Pass a command on. KeeperFailed."""
        reply = self._ask({"run": command, "arguments": arguments or {}, "answer": answer}, answer + SLACK)
        return reply["return"]

    def undo(self, patience: float = 15.0) -> tuple[Any, bool]:
        """Thaw or resume now: (what the other side said, whether it was in time). KeeperFailed.

        If the guardian itself was killed, another one does it; that counts as late. If the other side does not answer,
        the guardian goes on trying after this has failed.
        """
        armed, self._armed = self._armed, False
        try:
            reply = self._ask({"undo": True}, patience)
            return reply["undone"], not reply["late"]
        except KeeperFailed:
            if self._process.poll() is None or not armed:
                raise
        other = Keeper(self._kind, self._path)
        try:
            return other._ask({"undo": True}, patience)["undone"], False
        finally:
            other.close()

    def close(self) -> None:
        """Undo if armed, and end the process. Idempotent."""
        if self._armed:
            with contextlib.suppress(KeeperFailed):
                self.undo()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                with contextlib.suppress(OSError):
                    pipe.close()
        # At the end of its input it undoes what it must and ends; it is never killed.
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(SLACK)

    def _ask(self, message: Mapping[str, Any], patience: float) -> dict[str, Any]:
        stdin, stdout = self._process.stdin, self._process.stdout
        if stdin is None or stdout is None or stdin.closed:
            raise KeeperFailed("the guardian was sent away")
        try:
            stdin.write(json.dumps(message).encode() + b"\n")
            stdin.flush()
            until = time.monotonic() + patience
            waiter = select.poll()  # select() takes no descriptor above 1023
            waiter.register(stdout, select.POLLIN)
            while b"\n" not in self._rest:
                if not waiter.poll(max(0.0, until - time.monotonic()) * 1000):
                    raise KeeperFailed("the guardian does not answer")
                data = os.read(stdout.fileno(), 1 << 16)
                if not data:
                    self._process.wait(SLACK)
                    raise KeeperFailed("the guardian ended")
                self._rest += data
        except (OSError, subprocess.TimeoutExpired) as exc:
            raise KeeperFailed(f"the guardian cannot be reached: {exc}") from exc
        line, _, self._rest = self._rest.partition(b"\n")
        reply: dict[str, Any] = json.loads(line)
        for kind in ("refused", "failed"):
            if kind in reply:
                raise KeeperFailed(str(reply[kind]))
        return reply
