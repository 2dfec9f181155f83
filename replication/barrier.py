"""One instant over several machines: all of them, or none.

Machines that write to each other must stand still at the same time: prepare all → quiesce all → hold all → take all →
resume all → finish all. No step begins before the step before it has succeeded for every member. So what happened before
the last member was held is in every cut, and nothing that happened after the first was resumed is in any: the cuts are of
one instant, and any moment between the two may stand for it.

Every member has a thread of its own, in which its steps follow each other; who is late delays nobody. When a member fails,
or the time is over, the others run again at once, and the late one as soon as it answers. What a member promises on its
side: it resumes by itself if nobody tells it to, and its `take` or `resume` fails then.
"""

from __future__ import annotations

import contextlib
import secrets
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ALL_COMPLETED, FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Protocol, TypeVar

from farshore.domain.errors import Code, FarshoreError
from farshore.domain.points import Consistency
from farshore.replication.ports import DiskState, Extent, NoCommonInstant, Source, SourceCut

T = TypeVar("T")

_RANK = (Consistency.CRASH, Consistency.FILE_SYSTEM, Consistency.APPLICATION)


class PreparedCut(Protocol):
    """A cut that lacks only its instant. Steps may block; each is called once, in this order, but for `resume`."""

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

    def finish(self) -> SourceCut:
        """The cut, to be read and released."""
        ...

    def abandon(self) -> None:
        """Resume, and remove what was prepared. Idempotent; does not raise. Nothing to do after `finish`."""
        ...


class BarrierSource(Source, Protocol):
    """A source of which a group may ask for a common instant."""

    @property
    def cannot_hold(self) -> str:
        """Why the source cannot stop its machine's writes while other machines are cut, for a person; "" when it can."""
        ...

    def prepare(self, name: str, *, want: Consistency) -> PreparedCut:
        """Everything slow, while the machine runs. NoCommonInstant when there is a reason above."""
        ...


@dataclass(frozen=True, slots=True)
class Member:
    """A source and the deterministic name of its cut."""

    source: BarrierSource
    name: str
    machine: str = ""  # how it is called in errors and results; "": as the cut

    @property
    def label(self) -> str:
        return self.machine or self.name


class BarrierMissed(FarshoreError):
    """No cut of the group exists, all members run. `errors` by member: those that are known to be the cause."""

    def __init__(self, errors: Mapping[str, FarshoreError], doing: str, members: int) -> None:
        self.errors = dict(errors)
        super().__init__(
            Code.SNAPSHOT_FAILED,
            f"No cut of the group: {len(errors)} of {members} members failed to {doing}. "
            + " ".join(str(error) for error in self.errors.values()),
            subject=", ".join(self.errors),
            retryable=all(error.retryable for error in self.errors.values()),
            details={"codes": {label: error.code.value for label, error in self.errors.items()}},
        )


class HeldCut:
    """A member's cut, dated to the instant that all share. Fills `SourceCut`; its label is what this member achieved."""

    def __init__(self, cut: SourceCut, instant: datetime) -> None:
        self._cut, self._instant = cut, instant

    @property
    def name(self) -> str:
        return self._cut.name

    @property
    def taken_at(self) -> datetime:
        return self._instant

    @property
    def consistency(self) -> Consistency:
        return self._cut.consistency

    @property
    def powered_off(self) -> bool:
        return self._cut.powered_off

    @property
    def disks(self) -> Sequence[DiskState]:
        return self._cut.disks

    @property
    def whole(self) -> bool:
        return self._cut.whole

    @property
    def left_out(self) -> Mapping[str, str]:
        return self._cut.left_out

    def changed(self, disk_key: str, since: DiskState | None) -> Iterator[Extent]:
        """See `SourceCut.changed`."""
        return self._cut.changed(disk_key, since)

    def read(self, disk_key: str, offset: int, length: int) -> bytes:
        """See `SourceCut.read`."""
        return self._cut.read(disk_key, offset, length)

    def confirm(self) -> None:
        """See `SourceCut.confirm`."""
        self._cut.confirm()

    def release(self) -> None:
        """See `SourceCut.release`."""
        self._cut.release()


@dataclass(frozen=True, slots=True)
class CommonCut:
    """Cuts of one instant. Each has to be released, which whoever copies it does."""

    barrier: str  # id
    held_from: datetime  # from here on no member wrote
    held_until: datetime  # until here at least
    consistency: Consistency  # the weakest that a member achieved
    cuts: Mapping[str, HeldCut]  # by member, in the members' order

    def release(self) -> None:
        """All; errors are left to the next owner, who reaps."""
        for cut in self.cuts.values():
            with contextlib.suppress(FarshoreError):
                cut.release()


def refuse_loners(sources: Mapping[str, BarrierSource]) -> None:
    """NoCommonInstant, naming every machine that cannot be held."""
    reasons = {machine: source.cannot_hold for machine, source in sources.items() if source.cannot_hold}
    if reasons:
        raise NoCommonInstant(reasons)


def cut_together(
    members: Sequence[Member],
    *,
    want: Consistency,
    deadline: float = 2.0,
    barrier: str = "",
    clock: Callable[[], float] = time.monotonic,
    wall: Callable[[], datetime] = lambda: datetime.now(UTC),
) -> CommonCut:
    """Cut all members in one instant.

    `deadline` is in seconds from the first hold to the last instant; preparing and quiescing may take their time.
    BarrierMissed names every member that was late or failed; then no cut exists, all members run, and nothing is left
    behind. NoCommonInstant, before anything is done, when a source cannot take part. `barrier` is the id, by default a
    random one.
    """
    labels = [member.label for member in members]
    if not members or len(set(labels)) != len(labels):
        raise ValueError(f"members of a group need names of their own: {labels}")
    refuse_loners({member.label: member.source for member in members})
    return Barrier(members, want, deadline, barrier or secrets.token_hex(8), clock, wall).run()


class Barrier:
    """One attempt."""

    def __init__(
        self,
        members: Sequence[Member],
        want: Consistency,
        deadline: float,
        barrier: str,
        clock: Callable[[], float],
        wall: Callable[[], datetime],
    ) -> None:
        self._members = {member.label: member for member in members}
        self._want, self._deadline, self._barrier = want, deadline, barrier
        self._clock, self._wall = clock, wall
        self._lanes = {
            label: ThreadPoolExecutor(1, thread_name_prefix=f"barrier-{label}") for label in self._members
        }
        self._ready: dict[str, PreparedCut] = {}
        self._begun = 0.0

    def run(self) -> CommonCut:
        """See `cut_together`."""
        done = False
        try:
            self.prepare()
            try:
                self.quiesce()
                self._begun = self._clock()
                self.hold()
                held_from, at = self._wall(), self._clock()
                self.take()
                # By the clock that does not jump.
                held_until = held_from + timedelta(seconds=self._clock() - at)
            finally:
                # Also those that were never held: resuming is idempotent, and nobody stays stopped.
                resumed = self._start(lambda ready: ready.resume())
            self._await(resumed, "stay stopped until all were cut")
            cuts = self.finish()
            done = True
        finally:
            if not done:
                self._abandon()
            for lane in self._lanes.values():
                lane.shutdown(wait=True)
        return CommonCut(
            self._barrier,
            held_from,
            held_until,
            min((cut.consistency for cut in cuts.values()), key=_RANK.index),
            {label: HeldCut(cut, held_from) for label, cut in cuts.items()},
        )

    # -- the steps, each for all members ---------------------------------------------------------------------------

    def prepare(self) -> None:
        """Everything slow."""

        def one(label: str, member: Member) -> None:
            self._ready[label] = member.source.prepare(member.name, want=self._want)

        started = {
            label: self._lanes[label].submit(one, label, member) for label, member in self._members.items()
        }
        self._await(started, "prepare")

    def quiesce(self) -> None:
        """As far as it is wanted and possible."""
        self._await(self._start(lambda ready: ready.quiesce()), "quiesce")

    def hold(self) -> None:
        """Nobody writes any more."""
        self._in_time(self._start(lambda ready: ready.hold()), "stop")

    def take(self) -> None:
        """The instant."""
        self._in_time(self._start(lambda ready: ready.take()), "be cut")

    def finish(self) -> dict[str, SourceCut]:
        """The cuts. After an error those that exist already are released."""
        finished = self._start(lambda ready: ready.finish())
        try:
            return self._await(finished, "be read")
        except BaseException:
            for future in finished.values():
                if future.done() and future.exception() is None:
                    with contextlib.suppress(FarshoreError):  # the next cut reaps it; the first error counts
                        future.result().release()
            raise

    # -- inside ----------------------------------------------------------------------------------------------------

    def _start(self, step: Callable[[PreparedCut], T]) -> dict[str, Future[T]]:
        """In every member's thread, after what it is doing now."""

        def one(label: str) -> T:
            return step(self._ready[label])

        return {label: lane.submit(one, label) for label, lane in self._lanes.items()}

    def _abandon(self) -> None:
        def one(label: str) -> None:
            ready = self._ready.get(label)  # None: it could not even be prepared
            if ready is not None:
                ready.abandon()

        for label, lane in self._lanes.items():
            lane.submit(one, label)

    def _in_time(self, steps: Mapping[str, Future[None]], doing: str) -> None:
        left = max(0.0, self._deadline - (self._clock() - self._begun))
        _, late = wait(steps.values(), timeout=left, return_when=FIRST_EXCEPTION)
        failed = any(future.done() and future.exception() is not None for future in steps.values())
        passed = self._clock() - self._begun
        if not failed and (late or passed > self._deadline):
            slow = [label for label, future in steps.items() if future in late] or list(steps)
            raise BarrierMissed(
                {
                    label: FarshoreError(
                        Code.SNAPSHOT_FAILED,
                        f"{label} was too slow: after {passed:.2f} s not all were stopped and cut, "
                        f"{self._deadline:.2f} s are allowed.",
                        subject=label,
                    )
                    for label in slow
                },
                doing,
                len(self._members),
            )
        self._raise({label: future for label, future in steps.items() if future.done()}, doing)

    def _await(self, steps: Mapping[str, Future[T]], doing: str) -> dict[str, T]:
        wait(steps.values(), return_when=ALL_COMPLETED)
        self._raise(steps, doing)
        return {label: future.result() for label, future in steps.items()}

    def _raise(self, steps: Mapping[str, Future[T]], doing: str) -> None:
        errors: dict[str, FarshoreError] = {}
        for label, future in steps.items():
            error = future.exception()
            if isinstance(error, FarshoreError):
                errors[label] = error
            elif error is not None:  # a defect, or the end of this process
                raise error
        if errors:
            raise BarrierMissed(errors, doing, len(self._members))
