"""A token bucket for bytes: never more than rate x time + burst."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable


class TokenBucket:
    """Shared by threads. `rate` in bytes a second, `burst` in bytes. A request larger than the burst goes into debt and
    makes the next one wait, so no request waits for ever."""

    def __init__(
        self,
        rate: float,
        burst: float,
        *,
        monotonic: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        if rate <= 0 or burst <= 0:
            raise ValueError("rate and burst are positive numbers of bytes")
        self._rate = rate
        self._burst = burst
        self._monotonic = monotonic
        self._sleep = sleep
        self._lock = threading.Lock()
        self._tokens = burst
        self._at = monotonic()

    def take(self, amount: int) -> float:
        """Account for `amount` bytes and wait until they may be sent. Returns the seconds waited."""
        with self._lock:
            now = self._monotonic()
            self._tokens = min(self._burst, self._tokens + (now - self._at) * self._rate)
            self._at = now
            self._tokens -= amount
            wait = max(0.0, -self._tokens / self._rate)
        if wait:
            self._sleep(wait)
        return wait
