"""Token buckets that answer 429 with Retry-After, the way Resource Manager and the compute provider do."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass

from farshore.lab.azure.model import ArmError


@dataclass
class _Bucket:
    tokens: float
    at: float
    closed_until: float = 0.0


class Throttle:
    """Buckets by name; the clock is monotonic, so a restart of the laboratory refills them."""

    def __init__(self) -> None:
        self._buckets: dict[str, _Bucket] = {}

    def reset(self) -> None:
        self._buckets.clear()

    def take(self, name: str, rate: float, burst: float) -> int:
        """Take one token and return how many are left. Raises: ArmError 429.

        Asking again before the announced time is over is refused with a new, later one.
        """
        now = time.monotonic()
        bucket = self._buckets.setdefault(name, _Bucket(burst, now))
        bucket.tokens = min(burst, bucket.tokens + (now - bucket.at) * rate)
        bucket.at = now
        if now < bucket.closed_until:
            bucket.closed_until += 1
            raise self._refusal(name, bucket.closed_until - now)
        if bucket.tokens < 1:
            wait = (1 - bucket.tokens) / rate if rate > 0 else 60.0
            bucket.closed_until = now + math.ceil(wait)
            raise self._refusal(name, wait)
        bucket.tokens -= 1
        return int(bucket.tokens)

    def _refusal(self, name: str, wait: float) -> ArmError:
        seconds = str(max(1, math.ceil(wait)))
        if name.startswith("vm-"):
            return ArmError(
                429,
                "OperationNotAllowed",
                "The server rejected the request because too many requests have been received for this subscription.",
                details=[{"code": "TooManyRequests", "target": name, "message": f"Retry after {seconds} s."}],
                headers={"Retry-After": seconds},
            )
        return ArmError(
            429,
            "TooManyRequests",
            f"The number of requests of class '{name}' for the subscription has exceeded its limit. "
            f"Try again after '{seconds}' seconds.",
            headers={"Retry-After": seconds},
        )
