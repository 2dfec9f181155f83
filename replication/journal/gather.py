"""Neighbouring runs become one write.

Redo and restores deliver the newest version of every block from the segment that has it, so neighbours of the disk come
from many segments, 64 KiB each. A target that takes a request per run (Put Page) pays for requests rather than for bytes.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

from farshore.replication.journal import lanes

Sink = Callable[[int, bytes | memoryview], None]

MOST = 4 << 20  # bytes of one write
HOLD = 16 << 20  # bytes that wait for neighbours
_LARGE = 512 << 10  # bytes above which a run does not wait


class _Run:
    __slots__ = ("end", "parts", "start")

    def __init__(self, start: int, end: int, parts: list[bytes]) -> None:
        self.start, self.end, self.parts = start, end, parts


class Gather:
    """A sink in front of another. Runs must not overlap; they are handed on in no order, the last ones by `finish`. Safe to
    call from several threads; the one that completes a write makes it."""

    def __init__(self, sink: Sink, *, most: int = MOST, hold: int = HOLD) -> None:
        self._sink = sink
        self._most = most
        self._hold = hold
        self._lock = threading.Lock()
        self._by_start: dict[int, _Run] = {}
        self._by_end: dict[int, _Run] = {}
        self._held = 0

    def __call__(self, offset: int, data: bytes | memoryview) -> None:
        if len(data) >= min(_LARGE, self._most):
            self._sink(offset, data)
            return
        with self._lock:
            ready = self._add(offset, bytes(data))
        for run in ready:
            self._write(run)

    def finish(self, *, workers: int = 0, look: Callable[[], None] = lambda: None) -> None:
        """Hand on what still waits. To be called when no other thread calls any more."""
        runs = sorted(self._by_start.values(), key=lambda run: run.start)
        self._by_start.clear()
        self._by_end.clear()
        self._held = 0
        lanes.run(runs, self._write, workers=workers if len(runs) > 1 else 0, look=look, name="gather")

    def _add(self, offset: int, data: bytes) -> list[_Run]:
        """Book a run; returns what is to be written now."""
        run = _Run(offset, offset + len(data), [data])
        self._held += len(data)
        left = self._by_end.get(run.start)
        if left is not None and run.end - left.start <= self._most:
            self._forget(left)
            run = _Run(left.start, run.end, left.parts + run.parts)
        right = self._by_start.get(run.end)
        if right is not None and right.end - run.start <= self._most:
            self._forget(right)
            run = _Run(run.start, right.end, run.parts + right.parts)
        self._by_start[run.start] = self._by_end[run.end] = run
        ready: list[_Run] = []
        if run.end - run.start >= self._most:
            ready.append(run)
        elif self._held > self._hold:
            ready = sorted(self._by_start.values(), key=lambda one: one.start - one.end)
            ready = ready[: max(1, len(ready) // 2)]  # the longer half
        for one in ready:
            self._forget(one)
            self._held -= one.end - one.start
        return ready

    def _forget(self, run: _Run) -> None:
        del self._by_start[run.start], self._by_end[run.end]

    def _write(self, run: _Run) -> None:
        self._sink(run.start, run.parts[0] if len(run.parts) == 1 else b"".join(run.parts))
