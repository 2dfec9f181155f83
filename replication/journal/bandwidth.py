"""The bandwidth of a site: one token bucket for all threads, with a rate by time of day and priorities.

Never more than rate x time + burst. Whoever has the better priority is served first, among equals whoever came first; large
amounts are taken in parts of 1 MiB, so that a final cycle never waits for the rest of a first copy.
"""

from __future__ import annotations

import heapq
import itertools
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from enum import IntEnum

PART = 1 << 20
_SLICE = 0.25  # the longest wait between two looks at whether it is still wanted, seconds


class Priority(IntEnum):
    """Who goes first."""

    FINAL = 0  # the last cycle of a failover
    DELTA = 1
    RESYNC = 2
    INITIAL = 3
    SCRUB = 4


@dataclass(frozen=True, slots=True)
class Window:
    """From this minute of the day on (local time, 0 to 1439) this many bytes a second."""

    minute: int
    rate: float


class Schedule:
    """A rate that depends on the time of day."""

    def __init__(
        self, windows: Sequence[Window], *, now: Callable[[], datetime] = lambda: datetime.now().astimezone()
    ) -> None:
        ordered = sorted(windows, key=lambda window: window.minute)
        if not ordered or any(w.rate <= 0 or not 0 <= w.minute < 1440 for w in ordered):
            raise ValueError("a schedule needs windows with minutes of a day and positive rates")
        self._windows = ordered
        self._now = now

    def __call__(self) -> float:
        moment = self._now()
        minute = moment.hour * 60 + moment.minute
        rate = self._windows[-1].rate  # since yesterday
        for window in self._windows:
            if window.minute <= minute:
                rate = window.rate
        return rate


class Bandwidth:
    """See the module. `rate` is bytes a second, or what tells it (`Schedule`); `burst` in bytes."""

    def __init__(
        self,
        rate: float | Callable[[], float],
        burst: float = PART,
        *,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._rate = rate if callable(rate) else (lambda: rate)
        if self._rate() <= 0 or burst <= 0:
            raise ValueError("rate and burst are positive numbers of bytes")
        self._burst = burst
        self._monotonic = monotonic
        self._state = threading.Condition()
        self._tokens = burst
        self._at = monotonic()
        self._queue: list[tuple[int, int]] = []
        self._arrivals = itertools.count()

    def take(
        self, amount: int, priority: Priority = Priority.DELTA, given_up: Callable[[], bool] = lambda: False
    ) -> None:
        """Wait until `amount` bytes may be sent, or until it is given up."""
        while amount > 0 and not given_up():
            part = min(amount, PART)
            self._take_part(part, priority, given_up)
            amount -= part

    def _take_part(self, part: int, priority: Priority, given_up: Callable[[], bool]) -> None:
        with self._state:
            ticket = (int(priority), next(self._arrivals))
            heapq.heappush(self._queue, ticket)
            try:
                while True:
                    wait = self._missing()
                    if self._queue[0] == ticket and wait <= 0:
                        # A part larger than the burst goes into debt, which the next one waits for.
                        self._tokens -= part
                        return
                    if given_up():
                        return
                    self._state.wait(min(_SLICE, wait) if self._queue[0] == ticket else _SLICE)
            finally:
                self._queue.remove(ticket)
                heapq.heapify(self._queue)
                self._state.notify_all()

    def _missing(self) -> float:
        """Seconds until there are tokens for anything."""
        now, rate = self._monotonic(), self._rate()
        self._tokens = min(self._burst, self._tokens + (now - self._at) * rate)
        self._at = now
        return 0.0 if self._tokens > 0 else max(0.001, -self._tokens / rate)
