"""One instant over several machines: all of them, or none.

Generic on purpose: it knows nothing of QEMU but the port below, so that other sources can take part. Machines that write
to each other must be stopped at the same time: quiesce all → hold all → take all → resume all. What happened before the
hold of the last member is in every cut, and nothing that happened after the first resume is in any.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

from farshore.domain.errors import Code, FarshoreError
from farshore.domain.points import Consistency
from farshore.replication.ports import SourceCut

C_co = TypeVar("C_co", bound=SourceCut, covariant=True)
C = TypeVar("C", bound=SourceCut)


class PreparedCut(Protocol[C_co]):
    """A cut that lacks only its instant. Steps may block; each is called once, in this order, but for `resume`."""

    @property
    def name(self) -> str: ...
    def quiesce(self) -> None:
        """Make file systems or applications consistent if wanted and possible; never raises for the guest's sake."""
        ...

    def hold(self) -> None:
        """Stop the machine's writes. It must resume by itself soon if the caller dies or is late."""
        ...

    def take(self) -> None:
        """The instant. Raises unless the machine was held before and after it."""
        ...

    def resume(self) -> None:
        """Let it write again. Idempotent. Raises when the machine had not been held until now."""
        ...

    def finish(self) -> C_co:
        """The cut, to be read and released."""
        ...

    def abandon(self) -> None:
        """Resume, and remove what was prepared. Idempotent; does not raise."""
        ...


class BarrierSource(Protocol[C_co]):
    """A source whose machine can be held."""

    def prepare(self, name: str, *, want: Consistency) -> PreparedCut[C_co]:
        """Everything slow, while the machine runs."""
        ...


@dataclass(frozen=True, slots=True)
class Member(Generic[C]):
    """A source and the deterministic name of its cut."""

    source: BarrierSource[C]
    name: str


def cut_together(
    members: Sequence[Member[C]],
    *,
    want: Consistency,
    deadline: float = 2.0,
    clock: Callable[[], float] = time.monotonic,
) -> list[C]:
    """Cut all members in one instant; the cuts are in the members' order and each has to be released.

    `deadline` is in seconds from the first hold to the last instant. SnapshotFailed names every member that missed it or
    failed; then no cut exists, all members run, and nothing is left behind. Preparing may take its time.
    """
    if not members:
        return []
    with ExitStack() as undone, ThreadPoolExecutor(len(members), thread_name_prefix="barrier") as threads:
        prepared: list[PreparedCut[C]] = []

        def prepare(member: Member[C]) -> PreparedCut[C]:
            ready = member.source.prepare(member.name, want=want)
            undone.callback(ready.abandon)  # a list's append: safe from several threads
            return ready

        prepared = _all(threads, [lambda member=member: prepare(member) for member in members], "prepare")
        try:
            _all(threads, [ready.quiesce for ready in prepared], "quiesce")
            begun = clock()
            _all(threads, [ready.hold for ready in prepared], "stop")
            _in_time(clock() - begun, deadline)
            _all(threads, [ready.take for ready in prepared], "cut")
            _in_time(clock() - begun, deadline)
        finally:
            # Also for those that were never held: resuming is idempotent, and nobody stays stopped.
            late = _each(threads, [ready.resume for ready in prepared])
        _raise("resume", late)
        cuts: list[C] = []
        try:
            for ready in prepared:
                cuts.append(ready.finish())
        except BaseException:
            for cut in cuts:
                _quietly(cut.release)
            raise
        undone.pop_all()
        return cuts


T = TypeVar("T")


def _each(threads: ThreadPoolExecutor, steps: Sequence[Callable[[], T]]) -> list[T | FarshoreError]:
    """Run all steps at once and wait for all of them. Errors of ours are returned; others are raised afterwards."""
    running = [threads.submit(step) for step in steps]
    results: list[T | FarshoreError] = []
    fatal: BaseException | None = None
    for future in running:
        try:
            results.append(future.result())
        except FarshoreError as exc:
            results.append(exc)
        except BaseException as exc:  # a defect in one member must not keep the others from being waited for
            fatal = fatal or exc
    if fatal is not None:
        raise fatal
    return results


def _all(threads: ThreadPoolExecutor, steps: Sequence[Callable[[], T]], doing: str) -> list[T]:
    results = _each(threads, steps)
    _raise(doing, results)
    return [result for result in results if not isinstance(result, FarshoreError)]


def _raise(doing: str, results: Sequence[object]) -> None:
    errors = [result for result in results if isinstance(result, FarshoreError)]
    if not errors:
        return
    if len(errors) == 1 and len(results) == 1:
        raise errors[0]
    raise FarshoreError(
        Code.SNAPSHOT_FAILED,
        f"No cut of the group: {len(errors)} of {len(results)} members failed to {doing}. "
        + " ".join(str(error) for error in errors),
        retryable=all(error.retryable for error in errors),
        details={"codes": [error.code.value for error in errors]},
    ) from errors[0]


def _in_time(passed: float, deadline: float) -> None:
    if passed > deadline:
        raise FarshoreError(
            Code.SNAPSHOT_FAILED,
            f"No cut of the group: its members needed {passed:.2f} s to stop and be cut, {deadline:.2f} s are allowed.",
        )


def _quietly(step: Callable[[], None]) -> None:
    try:
        step()
    except FarshoreError:
        return  # what is left is reaped by the next cut; the first error is the one to be told
