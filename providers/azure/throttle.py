"""One pause for everybody when a subscription's request rate is used up.

Azure refuses whoever asks again before Retry-After is over, and names a later time. So after such an answer the calls of
this site are refused here, without asking, until the time has come; each gets a slightly different time, lest all of
them come back at once.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable

from farshore.domain.errors import Code, FarshoreError

# Of all throttling, these speak of the whole subscription; the others of one machine, disk or account.
_WHOLE = frozenset({"toomanyrequests", "subscriptionrequeststhrottled", "requestratetoolarge"})
_LONGEST = 300.0
_SPREAD = 0.2


class Pause:
    """Closed until a moment; belongs to one event loop."""

    def __init__(self, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._until = 0.0

    def heed(self, error: FarshoreError) -> None:
        """Close if `error` is the subscription's throttling and says for how long."""
        code = str(error.info.details.get("azure_code", "")).lower()
        if error.code is Code.TARGET_THROTTLED and error.retry_after and code in _WHOLE:
            self._until = max(self._until, self._clock() + min(error.retry_after, _LONGEST))

    def check(self) -> None:
        """Raises TargetThrottled, with the time to wait, while closed."""
        left = self._until - self._clock()
        if left > 0:
            raise FarshoreError(
                Code.TARGET_THROTTLED,
                f"The subscription's request rate is used up; Azure asked to wait, {left:.0f} s are left.",
                # Not for secrets: it only spreads the callers.
                retry_after=left * (1 + _SPREAD * random.random()),  # noqa: S311
            )
