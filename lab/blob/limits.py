"""Rate limits per blob, as token buckets; off until set. Azure's figures: 500 requests/s and 60 MiB/s a page blob."""

from __future__ import annotations

import threading
import time

from .errors import StorageError

AZURE_REQUESTS = 500.0
AZURE_BYTES = 60.0 * 1024 * 1024


class RateLimits:
    """Two buckets per blob, each one second deep; what does not fit is 503 ServerBusy. Monotonic real time."""

    def __init__(self, requests_per_s: float | None = None, bytes_per_s: float | None = None) -> None:
        self.requests_per_s = requests_per_s
        self.bytes_per_s = bytes_per_s
        self._lock = threading.Lock()
        self._buckets: dict[str, tuple[float, float, float]] = {}  # path -> requests left, bytes left, time

    def set(self, requests_per_s: float | None, bytes_per_s: float | None) -> None:
        """New limits; None switches one off. Buckets start full."""
        with self._lock:
            self.requests_per_s, self.bytes_per_s = requests_per_s, bytes_per_s
            self._buckets.clear()

    def take(self, path: str, size: int) -> None:
        """Count one request of `size` bytes; raises ServerBusy when a bucket is empty.

        A bucket may go below zero by one request, so that a request larger than a second's worth can pass.
        """
        if self.requests_per_s is None and self.bytes_per_s is None:
            return
        now = time.monotonic()
        with self._lock:
            rate, volume = self.requests_per_s or 0.0, self.bytes_per_s or 0.0
            requests, left, then = self._buckets.get(path, (rate, volume, now))
            requests = min(rate, requests + (now - then) * rate)
            left = min(volume, left + (now - then) * volume)
            busy = (self.requests_per_s is not None and requests < 1) or (
                self.bytes_per_s is not None and size > 0 and left <= 0
            )
            if not busy:
                requests, left = requests - 1, left - size
            self._buckets[path] = (requests, left, now)
        if busy:
            raise StorageError("ServerBusy", "Operations per second is over the account limit.")
