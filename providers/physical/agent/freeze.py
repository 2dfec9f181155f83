"""Freezing mounted file systems for a moment, and never for longer.

The ioctls FIFREEZE and FITHAW work on descriptors that are opened beforehand: while the root is frozen nothing may be
executed, created or logged. The watchdog (a process of its own) holds the same descriptors and is armed before the first
freeze, so that a killed or hung agent leaves nothing frozen. A watchdog that fired is reported: what was promised about
the frozen time does not hold then.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import json
import os
import pkgutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Generator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from farshore.providers.physical.agent import watchdog
from farshore.providers.physical.agent.disks import Mount

FIFREEZE = 0xC0045877
_NEVER = {errno.EOPNOTSUPP, errno.ENOTTY}  # file systems without freezing, vfat for instance


class FreezeFailed(Exception):
    """Nothing is frozen (any more). The text is for a person."""


@dataclass(slots=True)
class Frozen:
    """What a freeze achieved; `late` and `seconds` are known after the thaw."""

    frozen: list[str] = field(default_factory=list[str])  # mount points
    unfreezable: list[str] = field(default_factory=list[str])
    late: bool = False  # the watchdog thawed first
    seconds: float = 0.0


class Watchdog:
    """The owner's side of `watchdog`. One process for the agent's whole life."""

    def __init__(self) -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._channel = ours
        ours.settimeout(10.0)
        self._process = subprocess.Popen(
            # By its text: the agent may be one zipped file, and nothing has to be opened later.
            [sys.executable, "-I", "-S", "-c", _source(), str(theirs.fileno())],
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )
        theirs.close()
        self._ask({"disarm": True}, [])  # it is up, with everything imported, before anything depends on it

    def _ask(self, order: dict[str, object], descriptors: Sequence[int]) -> dict[str, object]:
        try:
            socket.send_fds(self._channel, [json.dumps(order).encode()], list(descriptors))
            answer = self._channel.recv(4096)
        except OSError as error:
            raise FreezeFailed(f"the thaw watchdog does not answer: {error}") from error
        if not answer:
            raise FreezeFailed("the thaw watchdog ended")
        return json.loads(answer)

    def arm(self, descriptors: Sequence[int], seconds: float) -> None:
        """FreezeFailed when it is not certain that the watchdog would thaw."""
        if len(descriptors) > watchdog.MOST:
            raise FreezeFailed(f"{len(descriptors)} file systems are more than one barrier can hold")
        if self._ask({"arm": seconds}, descriptors).get("armed") != len(descriptors):
            raise FreezeFailed("the thaw watchdog did not take all descriptors")

    def disarm(self) -> bool:
        """Whether it had fired."""
        return bool(self._ask({"disarm": True}, []).get("fired"))

    @property
    def pid(self) -> int:
        return self._process.pid

    def close(self) -> None:
        self._channel.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(timeout=30)


class Freezer:
    """Freezes the file systems of one machine, one barrier at a time."""

    def __init__(self, note: Path) -> None:
        """`note`: a file on a file system that is never frozen (tmpfs), naming what may be frozen right now."""
        self._note = note
        self._dog = Watchdog()
        self._lock = threading.Lock()

    @property
    def watchdog_pid(self) -> int:
        return self._dog.pid

    @contextlib.contextmanager
    def frozen(self, mounts: Sequence[Mount], limit: float) -> Generator[Frozen]:
        """Freeze all (innermost first), yield, thaw all in reverse. At most `limit` seconds, whatever happens inside.

        FreezeFailed when a file system that can be frozen was not; then nothing is.
        """
        with self._lock, contextlib.ExitStack() as stack:
            result = Frozen()
            opened: list[tuple[str, int]] = []
            for mount in mounts:
                if mount.read_only:
                    continue
                try:
                    descriptor = os.open(mount.path, os.O_RDONLY | os.O_DIRECTORY)
                except OSError as error:
                    raise FreezeFailed(f"{mount.path} cannot be opened: {error.strerror}") from error
                stack.callback(os.close, descriptor)
                opened.append((mount.path, descriptor))
            for _, descriptor in opened:
                _syncfs(descriptor)  # what is written out now does not have to be inside the freeze
            self._restart_if_dead()
            self._write_note([path for path, _ in opened])
            self._dog.arm([descriptor for _, descriptor in opened], limit)
            begun = time.monotonic()
            held: list[int] = []
            try:
                for path, descriptor in opened:
                    self._freeze(path, descriptor, result, held)
                yield result
            finally:
                watchdog.thaw(held[::-1])
                result.seconds = time.monotonic() - begun
                # In doubt the label is void: a watchdog that is gone cannot say that it kept still.
                try:
                    result.late = self._dog.disarm()
                except FreezeFailed:
                    result.late = True
                self._write_note([])

    def _freeze(self, path: str, descriptor: int, result: Frozen, held: list[int]) -> None:
        try:
            fcntl.ioctl(descriptor, FIFREEZE, 0)
        except OSError as error:
            if error.errno in _NEVER:
                result.unfreezable.append(path)
                return
            why = "somebody else froze it" if error.errno == errno.EBUSY else error.strerror
            raise FreezeFailed(f"{path} cannot be frozen: {why}") from error
        held.append(descriptor)
        result.frozen.append(path)

    def _restart_if_dead(self) -> None:
        try:
            self._dog.disarm()
        except FreezeFailed:
            self._dog.close()
            self._dog = Watchdog()

    def _write_note(self, paths: Sequence[str]) -> None:
        if paths:
            self._note.write_text(json.dumps(list(paths)))
        else:
            self._note.unlink(missing_ok=True)

    def close(self) -> None:
        self._dog.close()


def thaw_noted(note: Path) -> list[str]:
    """Thaw what a dead agent *and* its dead watchdog may have left frozen. Run before and after every run of the agent."""
    try:
        paths = [str(path) for path in json.loads(note.read_text())]
    except (OSError, ValueError):
        return []
    for path in reversed(paths):
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
        except OSError:
            continue
        try:
            watchdog.thaw([descriptor])
        finally:
            os.close(descriptor)
    note.unlink(missing_ok=True)
    return paths


def _source() -> str:
    text = pkgutil.get_data(watchdog.__package__ or "", "watchdog.py")
    if text is None:
        raise FreezeFailed("the watchdog's program is missing")
    return text.decode()


def _syncfs(descriptor: int) -> None:
    """Write dirty data out; an error shows again when freezing."""
    library = ctypes.CDLL(None, use_errno=True)
    if hasattr(library, "syncfs"):
        library.syncfs(descriptor)
