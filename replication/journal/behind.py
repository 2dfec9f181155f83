"""The thread in which the replica disks follow the journal while cycles go on."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass

from farshore.replication.journal.writer import Frozen, Writer

_POLL = 0.25  # seconds between two looks at `should_stop`


@dataclass(frozen=True, slots=True)
class Reached:
    """How far the replica disks are."""

    cycle: int
    frozen: Frozen | None  # to be made a base by the owner's own thread


class _Ended(Exception):
    """The leg is over; the next redo goes on."""


class Behind:
    """One redo at a time."""

    def __init__(self, writer: Writer, should_stop: Callable[[], bool]) -> None:
        self._writer = writer
        self._should_stop = should_stop
        self._closing = False
        self._pool = ThreadPoolExecutor(1, thread_name_prefix=f"redo-{writer.machine}")
        self._job: Future[Reached | None] | None = None

    @property
    def busy(self) -> bool:
        return self._job is not None and not self._job.done()

    def begin(self, *, freeze: bool) -> None:
        """Bring the replica disks to the newest point, and freeze them if asked."""
        self._job = self._pool.submit(self._work, freeze)

    def result(self) -> Reached | None:
        """Of the last job, once; raises what it raised. None: there was none, or it was ended."""
        job, self._job = self._job, None
        try:
            return job.result() if job is not None else None
        except _Ended:
            return None

    def wait(self) -> None:
        """Until nothing is under way, or it is time to stop."""
        while self._job is not None and not self._should_stop():
            if wait([self._job], timeout=_POLL).done:
                return

    def close(self) -> None:
        """End what is under way; what it did stays done."""
        self._closing = True
        self._pool.shutdown(wait=True, cancel_futures=True)

    def _work(self, freeze: bool) -> Reached | None:
        if freeze:
            frozen = self._writer.cool(self._look)
            return Reached(frozen.cycle, frozen) if frozen is not None else None
        cycle = self._writer.advance(self._look)
        return Reached(cycle, None) if cycle else None

    def _look(self) -> None:
        if self._closing or self._should_stop():
            raise _Ended
