"""A leg: many cycles of one machine, in one call.

A leg opens an epoch, reaps what a predecessor left at the source, and makes a point every interval until its time is
over or it is asked to stop. Truth is in the store: a leg that is killed at any moment is continued by the next one from
the newest committed point. Errors that may pass are waited out (1, 2, 4 … seconds): the epoch is opened anew after each,
because the outcome of what failed may be unknown, but never taken from a successor, not even by a leg whose first
opening failed or that wakes late: `LegPlan.asked_at` tells it from one that was asked for afterwards. Other errors end
the leg.

The replica disks follow behind, in a thread of their own (`behind`), so that a slow target costs no points: redo every
`redo_every_s`, which writes a block that changed ten times meanwhile once; a base every `base_every_s` and for every app-consistent and final point. In the time that is left until the next cycle
is due, what retention removed is swept and the store is scrubbed. Damage that any of them finds is shipped again by the next
cycle and costs no point.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable
from dataclasses import replace
from datetime import datetime

from farshore.domain.errors import Code, FarshoreError
from farshore.domain.points import Consistency, RecoveryPoint
from farshore.domain.retention import gently, prune
from farshore.replication.journal.bandwidth import Priority
from farshore.replication.journal.behind import Behind
from farshore.replication.journal.cycle import CycleResult, Pace, Stopped, never, run_cycle, utc_now
from farshore.replication.journal.entries import born
from farshore.replication.journal.writer import Writer
from farshore.replication.legs import LegPlan, LegResult, Part, backoff, clock_doubt
from farshore.replication.ports import Progress, ProgressSink, ReplicaStore, Source

__all__ = ["Leg", "LegPlan", "LegResult", "run_leg"]

_DRIFT = 60.0  # seconds between two epochs that are opened only because redo failed
_SCRUB_ROOM = 0.5  # seconds before the next cycle is due in which no scrub is begun
_SCRUB_ASK = 600.0  # the longest time between two looks whether a scrub is due, seconds
_SCRUB_PART = 32 << 20  # bytes scrubbed between two looks at the clock
_REDO_BYTES = 256 << 20  # bytes of journal that a redo does not let pile up, however recent the last one is
_POLL = 0.5  # the longest sleep between two looks at `should_stop`, seconds


def run_leg(
    source: Source,
    store: ReplicaStore,
    plan: LegPlan,
    *,
    progress: ProgressSink | None = None,
    should_stop: Callable[[], bool] = never,
    clock: Callable[[], datetime] = utc_now,
    monotonic: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
) -> LegResult:
    """Replicate one machine for a while. Blocking. ReplicaFenced when a successor took over. Closes neither source nor
    store.

    `should_stop` is looked at several times a second, also in the middle of a copy; `progress` may raise to end the leg.
    """
    return Leg(
        source,
        store,
        plan,
        progress=progress,
        should_stop=should_stop,
        clock=clock,
        monotonic=monotonic,
        sleep=sleep,
    ).run()


class Leg:
    """The cycles of one machine. `run` is all of a leg; a group calls the parts, one thread at a time."""

    def __init__(
        self,
        source: Source,
        store: ReplicaStore,
        plan: LegPlan,
        *,
        progress: ProgressSink | None,
        should_stop: Callable[[], bool],
        clock: Callable[[], datetime],
        monotonic: Callable[[], float],
        sleep: Callable[[float], None],
    ) -> None:
        self._source = source
        self._store = store
        self._plan = plan
        self._sink = progress
        self._should_stop = should_stop
        self._clock = clock
        self._monotonic = monotonic
        self._sleep = sleep
        # Attempts of one activity share `owner`; the token tells this leg from a former attempt of itself. The store
        # knows its form (`journal.store.same_activity`).
        self._token = f"{plan.owner}#{uuid.uuid4().hex[:12]}"
        self._epoch: int | None = None
        self._writer: Writer | None = None
        self._newest: RecoveryPoint | None = None
        self._app_tried_at: datetime | None = None
        self._resync = plan.resync
        self._cycles = self._points = self._full = self._pruned = self._errors = 0
        self._changed = self._read = self._shipped = 0
        self._last_error = ""
        self._worst_rpo = 0.0
        self._behind: Behind | None = None
        self._drifting_until = 0.0  # monotonic: until then redo that failed is not tried again
        self._redone_at: float | None = None  # monotonic
        self._unapplied = 0  # bytes of journal since the last redo began
        self._base_at: float | None = None  # monotonic
        self._base_wanted = False
        self._freezing = False  # what is under way behind will be a base
        self._swept_at: float | None = None
        self._scrub_done = False
        self._scrub_after = float("-inf")  # monotonic: until then nobody has to look whether a scrub is due
        self._bases = 0
        self._applied: dict[int, datetime] = {}
        self._newest_applied: datetime | None = None

    @property
    def writer(self) -> Writer | None:
        """None while no epoch is open."""
        return self._writer

    def run(self) -> LegResult:
        """See `run_leg`."""
        end = self._monotonic() + self._plan.until_s
        failures = 0
        because = "time"
        try:
            while True:
                if self._should_stop():
                    because = "asked"
                    break
                began = self._monotonic()
                if began >= end:
                    break
                try:
                    self.cycle()
                except Stopped:
                    because = "asked"
                    break
                except FarshoreError as error:
                    self.failed(error)
                    if not error.retryable:
                        raise
                    failures += 1
                    pause = min(backoff(self._plan, failures, error), max(0.0, end - self._monotonic()))
                    self.tell(f"waiting {pause:.0f} s after: {error.info.message}")
                    if not self._pause(self._monotonic() + pause):
                        because = "asked"
                        break
                    continue
                failures = 0
                if self._plan.stop_after_first:
                    because = "first point"
                    self.settle()
                    break
                # A cycle that took longer than the interval is followed by the next at once.
                due = began + self._plan.interval_s
                self.tell("waiting for the next cycle")
                if not self.idle(min(due, end)) or not self._pause(min(due, end)):
                    because = "asked"
                    break
        finally:
            self.leave()
        return self.result(because)

    def result(self, because: str) -> LegResult:
        """What was done so far."""
        taken = self._newest.taken_at if self._newest is not None else None
        hurt, sound = self._damage()
        return LegResult(
            cycles=self._cycles,
            points=self._points,
            newest=self._newest,
            full_copies=self._full,
            bytes_changed=self._changed,
            bytes_read=self._read,
            bytes_shipped=self._shipped,
            pruned=self._pruned,
            errors=self._errors,
            last_error=self._last_error,
            stopped_because=because,
            newest_captured_at=taken,
            newest_recoverable_at=sound,
            newest_applied_at=self._newest_applied,
            bases=self._bases,
            damage=hurt,
            worst_rpo_s=self._worst_rpo,
        )

    def failed(self, error: FarshoreError) -> None:
        """The outcome of something is unknown: the next cycle needs a new epoch."""
        self.leave()
        self._errors += 1
        self._last_error = error.info.text()

    def enter(self) -> Writer:
        """Open the epoch, once a leg and again after each error."""
        if self._writer is not None and self._writer.adrift and self._monotonic() >= self._drifting_until:
            self.leave()
            self._drifting_until = self._monotonic() + _DRIFT
        if self._writer is not None:
            return self._writer
        self.tell("opening the replica")
        writer = self._store.acquire(
            self._plan.machine, self._token, succeeding=self._epoch, asked_at=self._plan.asked_at
        )
        self._writer, self._epoch = writer, writer.epoch
        points = writer.points()
        self._newest = points[-1] if points else None
        self._behind = Behind(writer, self._should_stop)
        bases = writer.view().bases
        if self._base_at is None and bases:
            age = max(0.0, self._clock().timestamp() - bases[-1].made_at.timestamp())
            self._base_at = self._monotonic() - age
        if self._app_tried_at is None:
            consistent = [point.taken_at for point in points if point.consistency is not Consistency.CRASH]
            self._app_tried_at = max(consistent) if consistent else None
        self.tell("clearing what a predecessor left at the source")
        self._source.reap(f"farshore-{self._plan.machine}-{writer.epoch}-0")
        return writer

    def leave(self) -> None:
        """Give back what belongs to the epoch. Idempotent."""
        if self._behind is not None:
            self._behind.close()
            self._behind = None
        if self._writer is not None:
            self._writer.close()
            self._writer = None

    def cycle(self, group: Part | None = None) -> CycleResult:
        """Make one point, and what follows from it."""
        writer = self._writer if group is not None and self._writer is not None else self.enter()
        before = self._newest
        self._cycles += 1
        began = self._monotonic()
        result = self._make_point(writer, group)
        self._resync, self._last_error = False, ""
        if group is not None:
            group.committed(writer, result)
        self._points += 1
        self._newest = result.point
        self._full += result.full
        self._changed += result.bytes_changed
        self._read += result.bytes_read
        self._shipped += result.bytes_shipped
        if before is not None:
            exposed = (result.manifest.committed_at - before.taken_at).total_seconds()
            self._worst_rpo = max(self._worst_rpo, exposed)
        if result.release_error:
            self.tell(f"the source kept a snapshot that will be removed later: {result.release_error}")
        self.tell("point committed")
        self._retain(writer, result.point, self._monotonic() - began)
        if result.point.consistency is Consistency.APPLICATION or result.point.final:
            self._base_wanted = True
        self._unapplied += result.bytes_stored
        self._applied[result.point.cycle] = result.point.taken_at
        self._follow(writer)
        return result

    def _make_point(self, writer: Writer, group: Part | None) -> CycleResult:
        if group is not None:
            return self._run_cycle(writer, self._plan.want, group)
        want = self._plan.want
        now = self._clock()
        every = self._plan.app_consistent_every_s
        if every is not None and not self._plan.final:
            last = self._app_tried_at
            if last is None or (now - last).total_seconds() >= every:
                want = Consistency.APPLICATION
                self._app_tried_at = now
        try:
            return self._run_cycle(writer, want)
        except FarshoreError as error:
            if want is not Consistency.APPLICATION or error.code is not Code.SNAPSHOT_FAILED:
                raise
            # A guest that cannot be quiesced must not cost the crash-consistent point.
            self.tell(f"no app-consistent point: {error.info.message}")
            return self._run_cycle(writer, self._plan.want)

    def _run_cycle(self, writer: Writer, want: Consistency, group: Part | None = None) -> CycleResult:
        return run_cycle(
            self._source,
            writer,
            machine=self._plan.machine,
            want=want,
            cut=group.cut if group is not None else None,
            final=self._plan.final,
            resync=self._resync,
            tags=self._plan.tags if group is None else {**self._plan.tags, **group.tags},
            progress=self._forward,
            should_stop=self._should_stop,
            pace=self._pace(),
            clock=self._clock,
        )

    def _pace(self) -> Pace:
        plan = self._plan
        if plan.audit_every_s is None or plan.final:
            return plan.pace
        return replace(plan.pace, audit_share=min(1.0, plan.interval_s / plan.audit_every_s))

    def _retain(self, writer: Writer, newest: RecoveryPoint, took: float) -> None:
        """Prune, `took` seconds after the cycle of `newest` began. A failure costs nothing but space: the next cycle
        tries again. A clock that jumped must not cost the history, see `_CLOCK_DOUBT` and `gently`."""
        now = self._clock()
        doubt = clock_doubt(newest, now, took)
        if doubt:
            self.tell(f"old points stay for now: {doubt}")
            return
        try:
            points = writer.points()
            victims = gently(points, prune(points, self._plan.retention, now))
            if victims:
                self._pruned += len(writer.remove_points([point.cycle for point in victims]))
        except FarshoreError as error:
            if error.code is Code.REPLICA_FENCED or not error.retryable:
                raise
            self.tell(f"old points stay for now: {error.info.message}")

    def _follow(self, writer: Writer) -> None:
        """Take up what the thread behind has finished, and give it the next work."""
        behind = self._behind
        if behind is None or behind.busy:
            return
        try:
            done = behind.result()
            if done is not None:
                self._newest_applied = self._applied.get(done.cycle, self._newest_applied)
                self._applied = {cycle: at for cycle, at in self._applied.items() if cycle > done.cycle}
                if done.frozen is not None:
                    writer.add_base(done.frozen)
                    self._bases += 1
        except FarshoreError as error:
            if error.code is Code.REPLICA_FENCED and not writer.adrift:
                raise
            # What is damaged has been noted, the next cycle ships it again; what may pass is tried again, in an epoch of
            # its own.
            self.tell(f"the replica stays behind for now: {error.info.message}")
            self._base_wanted |= self._freezing
        now = self._monotonic()
        freeze = self._base_wanted or self._base_at is None or now - self._base_at >= self._plan.base_every_s
        late = self._redone_at is None or now - self._redone_at >= self._plan.redo_every_s
        if writer.adrift or not (freeze or late or self._unapplied > _REDO_BYTES):
            return
        self._redone_at, self._unapplied = now, 0
        if freeze:
            self._base_at, self._base_wanted = now, False
        self._freezing = freeze
        behind.begin(freeze=freeze)

    def settle(self) -> None:
        """A leg that ends with its first point leaves the replica at it, with a base: promotion is next."""
        behind, writer = self._behind, self._writer
        if behind is None or writer is None or not self._plan.final:
            return
        self.tell("bringing the replica to the last point")
        behind.wait()
        self._base_wanted = True
        self._follow(writer)
        behind.wait()
        self._base_wanted = False
        self._follow(writer)

    def idle(self, until: float) -> bool:
        """Sweep and scrub while there is time. False when asked to stop."""
        writer, now = self._writer, self._monotonic()
        if writer is None:
            return True
        try:
            if self._swept_at is None or now - self._swept_at >= self._plan.sweep_every_s:
                first, self._swept_at = self._swept_at is None, now
                writer.sweep(thorough=first, look=self._look)
            while self._scrub_is_due(writer) and self._monotonic() < until - _SCRUB_ROOM:
                done = writer.scrub(budget=_SCRUB_PART, look=self._look, take=self._take_scrub)
                self._scrub_done = done.complete
                for finding in done.findings:
                    self.tell(f"scrub found damage: {finding.text}")
        except Stopped:
            return False
        except FarshoreError as error:
            if error.code is Code.REPLICA_FENCED or not error.retryable:
                raise
            self.tell(f"sweeping and scrubbing wait: {error.info.message}")
        return True

    def _scrub_is_due(self, writer: Writer) -> bool:
        every, behind = self._plan.scrub_every_s, self._behind
        if every is None or self._scrub_done or (behind is not None and behind.busy):
            return False
        if self._monotonic() < self._scrub_after:
            return False
        coverage, now = writer.coverage(), self._clock().timestamp()
        age = coverage.age(now)
        if age is None:
            # Nothing is older than the replica itself: a first copy is not read back as soon as it is there.
            head = writer.head()
            age = (
                now - min((born(disk.life) for disk in head.disks), default=now) if head is not None else 0.0
            )
        left = 0.0 if coverage.cursor else every - age
        if left > 0:
            self._scrub_after = self._monotonic() + min(left, _SCRUB_ASK)
        return left <= 0

    def _take_scrub(self, amount: int) -> None:
        if self._plan.pace.limit is not None:
            self._plan.pace.limit.take(amount, Priority.SCRUB, self._should_stop)

    def _look(self) -> None:
        if self._should_stop():
            raise Stopped

    def _damage(self) -> tuple[tuple[str, ...], datetime | None]:
        """Points that are known to be damaged, and the instant of the newest one that is not."""
        if self._newest is None:
            return (), None
        try:
            hurt = self._store.known_damage(self._plan.machine)
            sound = [p.taken_at for p in self._store.points(self._plan.machine) if p.id not in hurt]
        except FarshoreError:
            # Only what is told would be missing: the leg's own outcome stands.
            return (), self._newest.taken_at
        return tuple(hurt), sound[-1] if sound else None

    def _pause(self, until: float) -> bool:
        """Sleep; False when asked to stop."""
        while True:
            if self._should_stop():
                return False
            left = until - self._monotonic()
            if left <= 0:
                return True
            self._sleep(min(left, _POLL))

    def tell(self, stage: str) -> None:
        """Say what is being done."""
        self._forward(Progress(stage, "", 0, 0, self._writer.cycle if self._writer is not None else 0))

    def _forward(self, progress: Progress) -> None:
        if self._sink is None:
            return
        newest = self._newest
        self._sink(
            Progress(
                stage=progress.stage,
                disk=progress.disk,
                done=progress.done,
                total=progress.total,
                cycle=progress.cycle,
                points=self._points,
                newest_point=newest.id if newest is not None else "",
                newest_taken_at=newest.taken_at if newest is not None else None,
                newest_applied_at=self._newest_applied,
            )
        )
