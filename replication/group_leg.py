"""A leg of a group: many cycles of several machines, in one call, whose points are of one instant.

Every interval is a round: all members are cut together (`barrier`), one thread a member copies and commits its part, and
when the last one is done the group point is made (`journal.groups`). Each member has an epoch, a replica that follows
behind, retention, sweep and scrub of its own, exactly as in a leg of one machine (`loop.Leg`).

A member that misses the barrier costs the round its group point, and nothing else: the others (and it, if it can) make
points of their own, so that no machine's RPO suffers from another machine. A member misses it when its source or its part
of the store fails (then it is left alone for 1, 2, 4 … seconds), when it is still copying (a first copy may take hours), and
for the rest of the leg when it failed for good. A round without a group point is counted, told to `progress` with names and
reasons, and never replaced by a point of fewer members. The leg itself ends with an error when another leg took over the
group, when a source cannot be held at all (NoCommonInstant, before anything is opened), and when no member is left.
"""

from __future__ import annotations

import contextlib
import secrets
import threading
import time
import uuid
from collections.abc import Callable, Mapping
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from dataclasses import replace
from datetime import datetime

from farshore.domain.errors import Code, FarshoreError
from farshore.domain.points import Consistency
from farshore.replication.barrier import (
    BarrierMissed,
    BarrierSource,
    CommonCut,
    Member,
    cut_together,
    refuse_loners,
)
from farshore.replication.journal.cycle import CycleResult, Stopped, cut_name, never, utc_now
from farshore.replication.journal.groups import BARRIER, TAG, GroupLog, GroupPoint, log_name, unusable
from farshore.replication.journal.writer import Writer
from farshore.replication.legs import LegPlan, Part, backoff, clock_doubt
from farshore.replication.loop import Leg
from farshore.replication.ports import Progress, ProgressSink, ReplicaStore
from farshore.replication.seats import GroupResult, Pending, Seat

__all__ = ["GroupResult", "run_group_leg"]

_POLL = 0.5  # the longest sleep between two looks at `should_stop`, seconds
_TIDYING = 5.0  # seconds that a round waits for members that sweep or scrub


def run_group_leg(
    sources: Mapping[str, BarrierSource],
    store: ReplicaStore,
    plan: LegPlan,
    *,
    deadline_s: float = 2.0,
    progress: ProgressSink | None = None,
    should_stop: Callable[[], bool] = never,
    clock: Callable[[], datetime] = utc_now,
    monotonic: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
) -> GroupResult:
    """Replicate machines as a group for a while. Blocking. `sources` by machine; closes neither them nor the store.

    `plan` is that of a leg, with the group's name as its machine; its first point is the first *group* point. No member is
    held longer than `deadline_s` and the time in which its source resumes it. ReplicaFenced when another leg took over the
    group; NoCommonInstant; what the last member failed with, when none is left. `should_stop` and `progress` as in
    `run_leg`; `progress` is called by one thread at a time, stages begin with the machine's name.
    """
    refuse_loners(sources)
    return _GroupLeg(sources, store, plan, deadline_s, progress, should_stop, clock, monotonic, sleep).run()


class _GroupLeg:
    def __init__(
        self,
        sources: Mapping[str, BarrierSource],
        store: ReplicaStore,
        plan: LegPlan,
        deadline_s: float,
        progress: ProgressSink | None,
        should_stop: Callable[[], bool],
        clock: Callable[[], datetime],
        monotonic: Callable[[], float],
        sleep: Callable[[float], None],
    ) -> None:
        if not sources:
            raise ValueError("a group has members")
        self._store, self._plan, self._deadline = store, plan, deadline_s
        self._label = log_name(plan.machine)  # a machine may have the group's name
        self._sink, self._asked = progress, should_stop
        self._clock, self._monotonic, self._sleep = clock, monotonic, sleep
        self._sink_lock = threading.Lock()
        self._halt = threading.Event()
        self._token = f"{plan.owner}#{uuid.uuid4().hex[:12]}"  # see `loop.Leg`
        self._log: GroupLog | None = None
        self._known: GroupLog | None = None  # the last one that was open: may still be read
        self._log_error = ""
        self._epoch: int | None = None
        # What is the group's business, the members' legs do not do by themselves.
        alone = replace(plan, app_consistent_every_s=None, stop_after_first=False)
        self._seats = {
            machine: Seat(machine, source, self._leg(machine, source, alone))
            for machine, source in sources.items()
        }
        self._pool = ThreadPoolExecutor(len(sources), thread_name_prefix=f"group-{plan.machine}")
        self._pending: Pending | None = None
        self._barriers_failed = 0  # in a row
        self._barrier_after = float("-inf")  # monotonic
        self._newest: GroupPoint | None = None
        self._app_tried_at: datetime | None = None
        self._rounds = self._points = self._missed = self._pruned = 0
        self._missed_by: dict[str, int] = {}
        self._last_missed: dict[str, str] = {}
        self._worst_rpo = 0.0
        self._swept_at: float | None = None

    def _leg(self, machine: str, source: BarrierSource, plan: LegPlan) -> Leg:
        return Leg(
            source,
            self._store,
            replace(plan, machine=machine),
            progress=lambda progress: self._forward(machine, progress),
            should_stop=self._should_stop,
            clock=self._clock,
            monotonic=self._monotonic,
            sleep=self._sleep,
        )

    def run(self) -> GroupResult:
        because = "time"
        try:
            because = self._run()
        except Stopped:
            because = "asked"
        finally:
            self._halt.set()
            self._pool.shutdown(wait=True)
            with contextlib.suppress(FarshoreError):  # the next owner does it as well
                self._give_up()
            for seat in self._seats.values():
                seat.leg.leave()
            self._close_log()
        return self._result(because)

    def _run(self) -> str:
        end = self._monotonic() + self._plan.until_s
        due = self._monotonic()
        while True:
            if self._should_stop():
                return "asked"
            self._collect()
            if self._points and self._plan.stop_after_first and not self._busy():
                self._settle()
                return "first point"
            now = self._monotonic()
            if now >= end and not self._busy():
                return "time"
            if due <= now < end and not (self._tidying() and now < due + _TIDYING):
                due = now + self._plan.interval_s
                self._round(now)
                continue
            due = self._sooner(due)
            self._idle(min(due, end))
            until = min(due, end)
            self._wait(until if until > now else now + _POLL)

    # -- a round -------------------------------------------------------------------------------------------------

    def _round(self, now: float) -> None:
        self._rounds += 1
        why: dict[str, str] = {}
        there: list[Seat] = []
        for seat in self._seats.values():
            reason = self._absent(seat, now)
            if reason:
                why[seat.machine] = reason
            else:
                there.append(seat)
        entered = {seat.machine: self._pool.submit(seat.leg.enter) for seat in there}
        wait(entered.values())
        for seat in list(there):
            error = entered[seat.machine].exception()
            if isinstance(error, FarshoreError):
                self._failed(seat, error)
                why[seat.machine] = str(error)
                there.remove(seat)
            elif error is not None:
                raise error
        self._open(why)
        if self._barrier_after > now:
            # Members that stand still for nothing, round after round, would be worse than a group point less.
            left = self._barrier_after - now
            why[self._label] = f"members are stopped again in {left:.0f} s, after several failures"
        cut = self._cut(there, why) if not why else None
        if cut is not None:
            self._pending = Pending(cut, now, {seat.machine for seat in there})
        else:
            self._miss(why)
        log = self._log
        for seat in there:
            self._begin(seat, "copying", lambda seat=seat: self._copy(seat, cut, log))
            seat.idled = False

    def _absent(self, seat: Seat, now: float) -> str:
        """Why a member cannot be asked now; "" when it can."""
        if seat.out:
            return f"it failed for good: {seat.last}"
        if seat.job is not None:
            return f"it is still {seat.doing}, for {now - seat.since:.0f} s"
        if seat.rest_until > now:
            return f"it is asked again in {seat.rest_until - now:.0f} s, after: {seat.last}"
        return ""

    def _open(self, why: dict[str, str]) -> None:
        """Own the group's log. What cannot be done now is a reason to miss the round."""
        try:
            log = self._log
            if log is None:
                log = GroupLog.open(
                    self._store,
                    self._plan.machine,
                    self._token,
                    succeeding=self._epoch,
                    asked_at=self._plan.asked_at,
                )
                self._log = self._known = log
                self._epoch = log.epoch
                for seat in self._seats.values():
                    seat.tidied = False
                points = log.points()
                self._newest = points[-1] if points else None
                if self._app_tried_at is None:
                    consistent = [p.taken_at for p in points if p.consistency is not Consistency.CRASH]
                    self._app_tried_at = max(consistent) if consistent else None
            else:
                log.check()
            for seat in self._seats.values():
                writer = seat.leg.writer
                # Not while a barrier is under way: what it holds is in no group point yet.
                if writer is not None and seat.job is None and self._pending is None and not seat.tidied:
                    log.tidy(writer)
                    seat.tidied = True
        except FarshoreError as error:
            self._group_failed(error)
            why[self._label] = str(error)

    def _cut(self, there: list[Seat], why: dict[str, str]) -> CommonCut | None:
        log = self._log
        if log is None:
            return None
        members: list[Member] = []
        for seat in there:
            writer = seat.leg.writer
            if writer is None:  # for the type checker: it was entered
                return None
            members.append(Member(seat.source, cut_name(seat.machine, writer), seat.machine))
        tried_at = self._app_tried_at
        want = self._want()
        self._tell("cutting all members")
        for attempt in dict.fromkeys([want, self._plan.want]):
            barrier = f"{log.epoch}-{log.number}-{secrets.token_hex(6)}"
            try:
                cut = cut_together(
                    members, want=attempt, deadline=self._deadline, barrier=barrier, wall=self._clock
                )
                self._barriers_failed = 0
                return cut
            except BarrierMissed as missed:
                failed = {error.code for error in missed.errors.values()}
                if attempt is want is not self._plan.want and failed == {Code.SNAPSHOT_FAILED}:
                    # Guests that cannot be quiesced must not cost the crash-consistent point.
                    self._tell(f"no app-consistent point: {missed}")
                    continue
                why.update({machine: str(error) for machine, error in missed.errors.items()})
                self._app_tried_at = tried_at  # it was not for the applications' sake
                self._barriers_failed += 1
                pause = backoff(self._plan, self._barriers_failed, missed)
                self._barrier_after = self._monotonic() + pause
                return None
        return None

    def _want(self) -> Consistency:
        every, now = self._plan.app_consistent_every_s, self._clock()
        if every is None or self._plan.final:
            return self._plan.want
        if self._app_tried_at is not None and (now - self._app_tried_at).total_seconds() < every:
            return self._plan.want
        self._app_tried_at = now
        return Consistency.APPLICATION

    def _copy(self, seat: Seat, cut: CommonCut | None, log: GroupLog | None) -> CycleResult:
        """In the member's thread."""
        if cut is None or log is None:
            return seat.leg.cycle()
        tags = {TAG: self._plan.machine, BARRIER: cut.barrier}

        def committed(writer: Writer, result: CycleResult) -> None:
            log.keep(cut.barrier, writer, result.point)

        return seat.leg.cycle(Part(cut.cuts[seat.machine], tags, committed))

    # -- what became of it ---------------------------------------------------------------------------------------

    def _collect(self) -> None:
        """Take up what members have finished."""
        for seat in self._seats.values():
            job = seat.job
            if job is None or not job.done():
                continue
            seat.job = None
            error = job.exception()
            result = job.result() if error is None else None
            if error is None:
                if result is not None:
                    seat.failures = 0
            elif isinstance(error, FarshoreError):
                self._failed(seat, error)
            else:
                raise error
            pending = self._pending
            if pending is not None and seat.machine in pending.waiting:
                pending.waiting.discard(seat.machine)
                if result is not None:
                    pending.results[seat.machine] = result
                else:
                    pending.reasons[seat.machine] = str(error)
        pending = self._pending
        if pending is not None and not pending.waiting:
            self._finish(pending)

    def _finish(self, pending: Pending) -> None:
        """The last member is done: the group point, or none."""
        log = self._log
        if pending.reasons or log is None:
            self._give_up()
            self._miss(pending.reasons or {self._label: self._log_error})
            return
        self._pending = None
        try:
            point = log.commit(pending.cut, pending.results, self._clock)
        except FarshoreError as error:
            # Whether it exists is unknown: its parts stay held until the log has been read under a new epoch.
            self._group_failed(error)
            self._miss({self._label: str(error)})
            return
        if self._newest is not None:
            exposed = (point.committed_at - self._newest.taken_at).total_seconds()
            self._worst_rpo = max(self._worst_rpo, exposed)
        self._points += 1
        self._newest, self._last_missed = point, {}
        self._tell(f"point of {len(point.members)} machines committed")
        self._retain(log, point, self._monotonic() - pending.began)

    def _give_up(self) -> None:
        """No group point comes of the barrier under way: its members' points are ordinary ones."""
        pending, self._pending = self._pending, None
        if pending is not None and self._log is not None:
            self._log.give_back(pending.cut.barrier, pending.cut.cuts)

    def _retain(self, log: GroupLog, newest: GroupPoint, took: float) -> None:
        now = self._clock()
        doubt = clock_doubt(newest.as_point(), now, took)
        if doubt:
            self._tell(f"old points stay for now: {doubt}")
            return
        try:
            self._pruned += log.retain(self._plan.retention, now)
            swept = self._swept_at
            if swept is None or self._monotonic() - swept >= self._plan.sweep_every_s:
                self._swept_at = self._monotonic()
                log.sweep()
        except FarshoreError as error:
            self._group_failed(error)
            self._tell(f"old points stay for now: {error.info.message}")

    def _miss(self, why: Mapping[str, str]) -> None:
        self._missed += 1
        self._last_missed = dict(why)
        for name in why:
            self._missed_by[name] = self._missed_by.get(name, 0) + 1
        self._tell("no point of the group: " + " ".join(f"{name}: {text}" for name, text in why.items()))

    def _failed(self, seat: Seat, error: FarshoreError) -> None:
        """A member's cycle failed. Raises when it was the last member that could go on."""
        seat.leg.failed(error)
        seat.last = error
        seat.failures += 1
        seat.rest_until = self._monotonic() + backoff(self._plan, seat.failures, error)
        if not error.retryable:
            seat.out = True
            if all(other.out for other in self._seats.values()):
                raise error
        self._tell(f"{seat.machine} failed: {error.info.message}")

    def _group_failed(self, error: FarshoreError) -> None:
        """Something with the group's log failed: it is opened anew. Raises when that is no use."""
        self._close_log()
        self._log_error = str(error)
        if not error.retryable:
            raise error

    # -- around it -----------------------------------------------------------------------------------------------

    def _busy(self) -> bool:
        return any(seat.job is not None for seat in self._seats.values())

    def _tidying(self) -> bool:
        """Whether sweeps and scrubs are all that a round would have to wait for."""
        busy = [seat for seat in self._seats.values() if seat.job is not None]
        return bool(busy) and all(seat.idled for seat in busy)

    def _begin(self, seat: Seat, doing: str, work: Callable[[], CycleResult | None]) -> None:
        seat.doing, seat.since = doing, self._monotonic()
        seat.job = self._pool.submit(work)

    def _sooner(self, due: float) -> float:
        """When nobody can do anything until then, the round comes when the first rest is over."""
        able = [seat for seat in self._seats.values() if not seat.out]
        now = self._monotonic()
        if any(seat.job is not None or seat.rest_until <= now for seat in able):
            return due
        return min([due, *(seat.rest_until for seat in able)])

    def _idle(self, until: float) -> None:
        """Let members sweep and scrub that have nothing else to do."""
        for seat in self._seats.values():
            if seat.job is None and not seat.idled and seat.leg.writer is not None:
                seat.idled = True

                def work(seat: Seat = seat) -> None:
                    if not seat.leg.idle(until):
                        raise Stopped

                self._begin(seat, "sweeping and scrubbing", work)

    def _settle(self) -> None:
        for done in [self._pool.submit(seat.leg.settle) for seat in self._seats.values()]:
            done.result()

    def _wait(self, until: float) -> None:
        jobs = [seat.job for seat in self._seats.values() if seat.job is not None]
        left = max(0.0, min(until - self._monotonic(), _POLL))
        if jobs:
            wait(jobs, timeout=left, return_when=FIRST_COMPLETED)
        elif left:
            self._sleep(left)

    def _should_stop(self) -> bool:
        return self._halt.is_set() or self._asked()

    def _close_log(self) -> None:
        log, self._log = self._log, None
        if log is not None:
            log.close()

    def _tell(self, stage: str) -> None:
        self._forward(self._label, Progress(stage, "", 0, 0, self._log.number if self._log else 0))

    def _forward(self, name: str, progress: Progress) -> None:
        if self._sink is None:
            return
        if name == self._label:
            newest = self._newest
            progress = replace(
                progress,
                points=self._points,
                newest_point=newest.id if newest is not None else "",
                newest_taken_at=newest.taken_at if newest is not None else None,
            )
        with self._sink_lock:
            self._sink(replace(progress, stage=f"{name}: {progress.stage}"))

    def _result(self, because: str) -> GroupResult:
        points = [self._newest] if self._newest is not None else []
        hurt: dict[str, str] = {}
        try:
            points = self._known.points() if self._known is not None else points
            hurt = unusable(self._store, points)
        except FarshoreError as error:
            # Only what is told would be missing: the leg's own outcome stands.
            self._tell(f"whether all points can be used is not known: {error.info.message}")
        usable = [point for point in points if point.id not in hurt]
        return GroupResult(
            rounds=self._rounds,
            points=self._points,
            newest=self._newest,
            missed=self._missed,
            missed_by=self._missed_by,
            last_missed=self._last_missed,
            pruned=self._pruned,
            unusable=hurt,
            newest_usable=usable[-1] if usable else None,
            worst_rpo_s=self._worst_rpo,
            stopped_because=because,
            members={machine: seat.leg.result(because) for machine, seat in self._seats.items()},
        )
