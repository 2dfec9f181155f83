"""MachineFailover: one machine in one run, with its own timeline.

It waits for its parent's word at each stage, does the stage's steps in order, reports, and in the end always settles
the machine's state, whatever happened: done, failed, stopped or cancelled.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from datetime import datetime
from typing import Any, ClassVar, TypeVar

from temporalio import workflow
from temporalio.exceptions import ActivityError, ApplicationError

with workflow.unsafe.imports_passed_through():
    from pydantic import BaseModel

    from farshore.activities import messages as m
    from farshore.activities import signatures as s
    from farshore.contract import names
    from farshore.contract.errors import error_view, to_application_error
    from farshore.contract.machine import (
        Advance,
        Begin,
        FenceKind,
        FenceToken,
        Halt,
        MachineStatus,
        Settle,
        SettleOutcome,
    )
    from farshore.contract.runs import (
        ErrorView,
        MachineResult,
        Outcome,
        PointView,
        ResourceView,
        RunKind,
    )
    from farshore.domain.errors import Code, FarshoreError
    from farshore.workflows.details import bullets, clock, link, many, page, plain, size
    from farshore.workflows.messages import MachineReport, MachineRun, Proceed, StageOutcome
    from farshore.workflows.stages import COURSES, Work
    from farshore.workflows.steps import run_step

In = TypeVar("In")
Out = TypeVar("Out")
_HOLDER_TEST, _HOLDER_FAILOVER = "test", "failover"
# What the timeline says of the changes of a machine's state; the keys are part of update ids.
_RECORDS = {
    "begin": "Taking the machine's lock",
    "halt": "Stopping the replication loop",
    "promote": "Promoting the replica with the proof that the source is off",
    "advance": "Recording that the recovery site's part is done",
    "settle success": "Recording the new state and releasing the lock",
    "settle failure": "Recording the failure and releasing the lock",
    "settle cancelled": "Recording the stop and releasing the lock",
}


class _Skip(Exception):
    """The machine needs nothing from this run."""


class _Stopped(Exception):
    """The run stops before this machine is done."""


@workflow.defn(name=names.MACHINE_FAILOVER)
class MachineFailover:
    """Child of a FailoverGroup."""

    @workflow.init
    def __init__(self, given: MachineRun) -> None:
        self._in = given
        self._course = COURSES[given.kind]
        self._spec = given.spec
        self._queue = ""  # of the step that runs
        self._proceed: dict[str, Proceed] = {}
        self._stop = ""
        self._begun = False
        self._doing = "waiting for the run to begin"
        self._done: list[str] = []
        # what the steps find out
        self._began_at = workflow.now()
        self._reachable = True
        self._source_stopped = False  # from the moment in which it may have been
        self._final: PointView | None = None
        self._fence: FenceToken | None = None
        self._point: PointView | None = None
        self._disks: tuple[m.PointDisk, ...] = ()
        self._made_disks: tuple[ResourceView, ...] = ()
        self._made_nics: tuple[ResourceView, ...] = ()
        self._made: tuple[ResourceView, ...] = ()
        self._deleted: tuple[ResourceView, ...] = ()
        self._leftovers: tuple[str, ...] = ()
        self._addresses: tuple[str, ...] = ()
        self._running_at: datetime | None = None
        self._network = given.network
        self._state = ""
        self._note = ""
        self._source_may_lack = False

    @workflow.signal(description="Enter a stage")
    def proceed(self, word: Proceed) -> None:
        self._proceed[word.stage] = word

    @workflow.signal(description="Stop before the next step")
    def stop(self, reason: str) -> None:
        self._stop = self._stop or reason

    # -- course ---------------------------------------------------------------------------------------------------

    @workflow.run
    async def run(self, given: MachineRun) -> MachineResult:
        """All stages of the run's kind, for this machine."""
        self._show()
        outcome, error = Outcome.SUCCEEDED, None
        stage_name = self._course.stages[0].name
        try:
            for stage in self._course.stages:
                stage_name = stage.name
                await workflow.wait_condition(
                    lambda name=stage_name: name in self._proceed or bool(self._stop)
                )
                if self._stop:
                    raise _Stopped
                word = self._proceed[stage.name]
                self._network = word.network or self._network
                for token in word.fences:
                    if token.machine == given.machine:
                        self._fence = token
                for work in stage.work:
                    # A machine that runs is recorded as running, whatever else has happened meanwhile.
                    if self._must_stop() and work is not Work.SETTLE:
                        raise _Stopped
                    await self._steps[work](self)
                last = stage is self._course.stages[-1]
                if not last:
                    self._doing = "waiting for the next stage of the run"
                    self._show()
                await self._report(stage.name, StageOutcome.DONE, needs_fence=self._needs_fence(stage.name))
        except _Skip as reason:
            outcome, self._note = Outcome.SKIPPED, str(reason)
        except _Stopped:
            outcome, self._note = Outcome.STOPPED, self._stop
            error = await self._settle_badly(SettleOutcome.CANCELLED, _aborted(given.machine, self._stop))
        except asyncio.CancelledError:
            outcome, self._note = Outcome.STOPPED, "cancelled by a person"
            error = await self._settle_badly(SettleOutcome.CANCELLED, _aborted(given.machine, self._note))
        except (ActivityError, ApplicationError, FarshoreError) as caught:
            outcome = Outcome.FAILED
            error = error_view(caught, subject=given.machine, unreachable=self._side())
            error = await self._settle_badly(SettleOutcome.FAILURE, error)
        result = self._result(outcome, error)
        self._doing = {Outcome.SUCCEEDED: "done", Outcome.SKIPPED: f"left out: {self._note}"}.get(
            outcome, f"{outcome.value}: {error.message if error else self._note}"
        )
        self._show(error)
        if outcome is not Outcome.SUCCEEDED:
            ended = {Outcome.SKIPPED: StageOutcome.SKIPPED, Outcome.STOPPED: StageOutcome.STOPPED}
            await self._report(stage_name, ended.get(outcome, StageOutcome.FAILED), error=error)
        return result

    def _must_stop(self) -> bool:
        if not self._stop and workflow.cancellation_reason() is not None:
            self._stop = "cancelled by a person"
        return bool(self._stop)

    async def _settle_badly(self, outcome: SettleOutcome, error: ErrorView) -> ErrorView:
        """Leave the machine in a named state. If even that fails, the next run breaks the lock and does it."""
        if not self._begun:
            return error
        self._doing = "recording the machine's state"
        self._show(error)
        try:
            status = await asyncio.shield(
                asyncio.ensure_future(
                    self._update(
                        "settle",
                        Settle(
                            run=self._in.run,
                            outcome=outcome,
                            error=error,
                            source_stopped=self._source_stopped,
                        ),
                        f"settle {outcome.value}",
                    )
                )
            )
            self._state = status.state.main.value
        except (ActivityError, ApplicationError) as second:
            workflow.logger.error("could not settle %s: %s", self._in.machine, second)
        return error

    # -- steps ----------------------------------------------------------------------------------------------------

    async def _begin(self) -> None:
        self._say("taking the machine's lock")
        try:
            status = await self._update(
                "begin",
                Begin(
                    operation=self._course.operation,
                    run=self._in.run,
                    accept_data_loss=self._in.accept_data_loss,
                    source_site=self._spec.source_site,
                    target_site=self._spec.target_site,
                ),
                "begin",
            )
        except ActivityError as error:
            view = error_view(error, subject=self._in.machine)
            self._state = str(view.details.get("state", ""))
            now = {self._state, str(view.details.get("test_state", ""))}
            if view.code == Code.OPERATION_NOT_ALLOWED and now & self._course.skips_in and not self._in.named:
                raise _Skip(self._course.skip_note) from None
            raise
        self._begun = True
        self._state = status.state.main.value
        self._point = status.point_in_use
        if self._in.kind is RunKind.CHANGE_POINT:
            self._fence = status.fence  # the instant at which the source was cut off
        if status.source:
            self._spec = self._spec.model_copy(update={"source": status.source})

    async def _seek_point(self) -> None:
        """A wrong choice of point is found before anything is touched."""
        if self._in.choice == "latest":
            return
        await self._step(
            s.CHOOSE_POINT,
            m.ChoosePointCall(**self._owned(), choice=self._in.choice, hold=False),
            queue=self._spec.target_queue,
            summary=self._say(f"looking for the recovery point ({self._in.choice})"),
        )

    async def _check_source(self) -> None:
        seen = await self._step(
            s.INSPECT_SOURCE,
            self._source_call(),
            queue=self._spec.source_queue,
            summary=self._say("looking at the source machine"),
        )
        if seen.errors:
            raise FarshoreError(
                Code.NOT_READY,
                f"{self._in.machine} is not ready: {'; '.join(seen.errors)}",
                subject=self._in.machine,
            )

    async def _shut_down(self) -> None:
        await self._power_off(None)

    async def _power_off(self, rules: s.Rules | None) -> None:
        self._source_stopped = True
        down = await self._step(
            s.SHUT_DOWN_SOURCE,
            m.ShutDownCall(
                site=self._spec.source_site,
                machine=self._in.machine,
                source=self._spec.source,
                guest_timeout=self._in.guest_timeout,
                force=self._in.force_off,
            ),
            queue=self._spec.source_queue,
            summary=self._say("shutting down the source machine"),
            rules=rules,
            longer_by=self._in.guest_timeout,
        )
        how = "was off" if down.already_off else "shut itself down" if down.graceful else "was powered off"
        self._done.append(f"source {how} at {down.at:%H:%M:%S} UTC")

    async def _try_shut_down(self) -> None:
        if not self._in.try_shutdown:
            self._done.append("shutdown of the source was not wanted")
            return
        await self._attempt(self._power_off(s.SOURCE_BEST_EFFORT), "the source was not shut down")

    async def _halt(self) -> None:
        self._say("stopping the replication loop")
        await self._update("halt", Halt(run=self._in.run, wait=self._in.kind is RunKind.PLANNED), "halt")

    async def _final_cycle(self, rules: s.Rules | None = None, patience: float = 3600.0) -> None:
        self._final = await self._step(
            s.FINAL_CYCLE,
            m.FinalCycleCall(spec=self._spec, owner=self._in.run, patience=patience),
            queue=self._spec.source_queue,
            summary=self._say("copying the last changes"),
            rules=rules,
        )
        self._done.append(f"last changes are in point {self._final.id}")

    async def _try_final_cycle(self) -> None:
        if self._fence is None or self._in.choice != "latest" or not self._reachable:
            return  # a machine that may still write gives no last point; the newest one is as good
        await self._attempt(
            self._final_cycle(s.SOURCE_BEST_EFFORT, patience=60.0), "the last changes could not be copied"
        )

    async def _prove(self, rules: s.Rules | None = None) -> None:
        proof = await self._step(
            s.PROVE_SOURCE_OFF,
            self._source_call(),
            queue=self._spec.source_queue,
            summary=self._say("proving that the source can't write"),
            rules=rules,
        )
        self._fence = FenceToken(
            machine=self._in.machine,
            run=self._in.run,
            kind=FenceKind(proof.kind),
            evidence=proof.evidence,
            at=proof.at,
        )
        self._done.append(f"fence: {proof.evidence}")

    async def _try_fence(self) -> None:
        if self._reachable:
            await self._attempt(self._prove(s.SOURCE_BEST_EFFORT), "the source is not proven off")

    async def _promote(self) -> None:
        fence = self._fence
        if fence is None:
            raise FarshoreError(
                Code.FENCE_NOT_PROVEN,
                f"Nothing proves that {self._in.machine} is off.",
                subject=self._in.machine,
            )
        if fence.kind is FenceKind.POWERED_OFF:
            # Minutes may have passed since the proof: somebody, or high availability, may have started it again.
            if self._in.kind is RunKind.PLANNED:
                await self._prove()
            else:
                again = self._prove(s.SOURCE_BEST_EFFORT)
                await self._attempt(again, "the proof could not be repeated", but=(Code.FENCE_NOT_PROVEN,))
            fence = self._fence or fence
        self._say("closing the replica to the source")
        await self._step(
            s.FENCE_REPLICA,
            m.StoreCall(site=self._spec.target_site, machine=self._in.machine, holder=self._in.run),
            queue=self._spec.target_queue,
            summary=f"Closing the replica to the source: {self._in.machine}",
        )
        status = await self._update("advance", Advance(run=self._in.run, fence=fence), "promote")
        self._state = status.state.main.value

    async def _choose_point(self) -> None:
        choice = (
            self._final.id if self._final is not None and self._in.choice == "latest" else self._in.choice
        )
        chosen = await self._step(
            s.CHOOSE_POINT,
            m.ChoosePointCall(**self._owned(), choice=choice),
            queue=self._spec.target_queue,
            summary=self._say(f"choosing the recovery point ({choice})"),
        )
        self._point, self._disks = chosen.point, chosen.disks
        self._done.append(
            f"point {chosen.point.id} of {chosen.point.taken_at:%H:%M:%S} UTC, {chosen.point.consistency}"
        )

    async def _remove_former(self) -> None:
        """A rerun or a change of point replaces what an earlier run of this machine made."""
        gone = await self._step(
            s.REMOVE_RESOURCES,
            m.RemoveCall(**self._owned(plan="", run=""), except_run=self._in.run),
            queue=self._spec.target_queue,
            summary=self._say("removing what an earlier run left"),
        )
        self._must_be_gone(gone)

    async def _make_disks(self) -> None:
        self._say(f"making {many(len(self._disks), 'disk')}")
        point = self._the_point()
        # All are waited for even if one fails: nothing may still be in the making when the machine has settled.
        made = await asyncio.gather(
            *(
                self._step(
                    s.CREATE_DISK,
                    m.DiskCall(
                        **self._owned(),
                        settings=self._in.settings,
                        network=self._network,
                        point=point.id,
                        disk=disk,
                    ),
                    queue=self._spec.target_queue,
                    summary=f"Making disk {disk.label} ({size(disk.size)}): {self._in.machine}",
                )
                for disk in self._disks
            ),
            return_exceptions=True,
        )
        self._made_disks = tuple(one for one in made if isinstance(one, ResourceView))
        for one in made:
            if isinstance(one, BaseException):
                raise one
        self._done.append(f"{many(len(made), 'disk')} made")

    async def _make_nics(self) -> None:
        made = await self._step(
            s.CREATE_NIC,
            m.NicCall(**self._owned(), settings=self._in.settings, network=self._network),
            queue=self._spec.target_queue,
            summary=self._say("making the network interface"),
        )
        self._made_nics = tuple(made)

    async def _boot(self) -> None:
        vm = await self._step(
            s.CREATE_MACHINE,
            m.MachineCall(
                **self._owned(),
                settings=self._in.settings,
                network=self._network,
                disks=self._made_disks,
                nics=tuple(n for n in self._made_nics if n.kind == "network-interface"),
            ),
            queue=self._spec.target_queue,
            summary=self._say("creating the machine"),
        )
        self._made = (*self._made_disks, *self._made_nics, vm)
        up = await self._step(
            s.WAIT_UNTIL_RUNNING,
            m.WaitRunningCall(**self._owned(), resource=vm),
            queue=self._spec.target_queue,
            summary=self._say("waiting until the machine runs"),
        )
        self._addresses, self._running_at = up.addresses, up.at
        self._done.append(f"runs since {up.at:%H:%M:%S} UTC at {', '.join(up.addresses) or 'no address'}")

    async def _settle(self) -> None:
        self._say("recording the machine's state")
        status = await self._update(
            "settle",
            Settle(
                run=self._in.run,
                outcome=SettleOutcome.SUCCESS,
                point=self._point,
                made=self._made,
                source_may_lack_changes=self._source_may_lack,
            ),
            "settle success",
        )
        self._begun = False
        self._state = status.state.main.value

    async def _remove_test(self) -> None:
        await self._remove("removing the test machine", run_test=True)
        await self._release(_HOLDER_TEST)

    async def _remove_replica_machine(self) -> None:
        await self._remove("removing the recovered machine", run_test=False)
        await self._release(_HOLDER_FAILOVER)
        await self._second_half()

    async def _second_half(self) -> None:
        """The recovery side is done; what is left is the primary side's."""
        status = await self._update("advance", Advance(run=self._in.run), "advance")
        self._state = status.state.main.value

    async def _remove(self, what: str, *, run_test: bool) -> None:
        owned = self._owned(plan="", run="", test=run_test)
        gone = await self._step(
            s.REMOVE_RESOURCES,
            m.RemoveCall(**owned),
            queue=self._spec.target_queue,
            summary=self._say(what),
        )
        self._must_be_gone(gone)
        self._done.append(f"{many(len(gone.deleted), 'resource')} deleted")

    async def _start_source(self) -> None:
        await self._step(
            s.POWER_ON_SOURCE,
            self._source_call(),
            queue=self._spec.source_queue,
            summary=self._say("starting the source machine"),
        )
        self._done.append("source machine started")

    async def _commit(self) -> None:
        point = self._point
        if point is not None:
            gone = await self._step(
                s.KEEP_ONLY_POINT,
                m.StoreCall(site=self._spec.target_site, machine=self._in.machine, point=point.id),
                queue=self._spec.target_queue,
                summary=self._say(f"keeping only point {point.id}"),
            )
            self._done.append(f"{many(len(gone.ids), 'other point')} deleted")
            await self._release(_HOLDER_FAILOVER)
        await self._attempt(self._reap(), "its source could not be asked for left-over snapshots")
        await self._second_half()

    async def _reap(self) -> None:
        gone = await self._step(
            s.REAP_SOURCE,
            self._source_call(),
            queue=self._spec.source_queue,
            summary=self._say("removing Farshore's snapshots at the source"),
            rules=s.SOURCE_BEST_EFFORT,
        )
        if gone.ids:
            self._done.append(f"{many(len(gone.ids), 'left-over snapshot')} removed at the source")

    _steps: ClassVar[dict[Work, Callable[[MachineFailover], Awaitable[None]]]] = {
        Work.SEEK_POINT: _seek_point,
        Work.BEGIN: _begin,
        Work.CHECK_SOURCE: _check_source,
        Work.SHUT_DOWN: _shut_down,
        Work.TRY_SHUT_DOWN: _try_shut_down,
        Work.HALT: _halt,
        Work.FINAL_CYCLE: _final_cycle,
        Work.TRY_FINAL_CYCLE: _try_final_cycle,
        Work.FENCE: _prove,
        Work.TRY_FENCE: _try_fence,
        Work.PROMOTE: _promote,
        Work.CHOOSE_POINT: _choose_point,
        Work.REMOVE_FORMER: _remove_former,
        Work.DISKS: _make_disks,
        Work.NICS: _make_nics,
        Work.BOOT: _boot,
        Work.SETTLE: _settle,
        Work.REMOVE_TEST: _remove_test,
        Work.REMOVE_REPLICA_MACHINE: _remove_replica_machine,
        Work.START_SOURCE: _start_source,
        Work.COMMIT: _commit,
    }

    async def _step(
        self,
        step: s.Step[In, Out],
        given: In,
        *,
        queue: str,
        summary: str,
        rules: s.Rules | None = None,
        longer_by: float = 0.0,
    ) -> Out:
        self._queue = queue
        return await run_step(step, given, queue=queue, summary=summary, rules=rules, longer_by=longer_by)

    # -- help -----------------------------------------------------------------------------------------------------

    async def _attempt(self, step: Awaitable[None], failed: str, *, but: tuple[Code, ...] = ()) -> None:
        """Best effort: a dead site is noted and never waited for again in this run."""
        try:
            await step
        except ActivityError as error:
            view = error_view(error, subject=self._in.machine)
            if view.code in but:
                raise
            if view.code == Code.SOURCE_UNREACHABLE:
                self._reachable = False
            self._done.append(f"{failed}: {view.message}")
            self._show()

    async def _update(self, update: str, payload: BaseModel, purpose: str) -> MachineStatus:
        run = workflow.info().parent
        return await self._step(
            s.UPDATE_MACHINE,
            m.UpdateCall(
                machine=self._in.machine,
                update=update,
                payload=payload.model_dump(mode="json"),
                update_id=f"{purpose} {run.run_id if run else workflow.info().run_id}",
            ),
            queue=names.CONTROL_QUEUE,
            summary=f"{_RECORDS.get(purpose, f'Record: {purpose}')}: {self._in.machine}",
        )

    async def _release(self, holder: str) -> None:
        await self._step(
            s.RELEASE_HOLDS,
            m.StoreCall(site=self._spec.target_site, machine=self._in.machine, holder=holder),
            queue=self._spec.target_queue,
            summary=f"Releasing the held point: {self._in.machine}",
        )

    def _must_be_gone(self, report: m.RemoveReport) -> None:
        self._deleted += report.deleted
        self._leftovers = report.leftovers
        if report.leftovers:
            raise FarshoreError(
                Code.CLEANUP_LEFTOVERS,
                f"{self._in.machine}: could not delete {'; '.join(report.leftovers)}",
                subject=self._in.machine,
                details={"leftovers": list(report.leftovers)},
            )

    def _the_point(self) -> PointView:
        if self._point is None:
            raise FarshoreError(
                Code.NO_RECOVERY_POINT,
                f"No recovery point was chosen for {self._in.machine}.",
                subject=self._in.machine,
            )
        return self._point

    def _source_call(self) -> m.SourceCall:
        return m.SourceCall(site=self._spec.source_site, machine=self._in.machine, source=self._spec.source)

    def _owned(self, **other: Any) -> dict[str, Any]:
        return {
            "site": self._spec.target_site,
            "plan": self._in.plan,
            "run": self._in.run,
            "machine": self._in.machine,
            "test": self._course.is_test,
        } | other

    def _needs_fence(self, stage: str) -> bool:
        return self._in.kind is RunKind.UNPLANNED and stage == "shutdown" and self._fence is None

    def _side(self) -> Code:
        """Whose worker was awaited when a step found none."""
        return {
            self._spec.source_queue: Code.SOURCE_UNREACHABLE,
            self._spec.target_queue: Code.TARGET_UNREACHABLE,
        }.get(self._queue, Code.TEMPORAL_UNREACHABLE)

    def _say(self, doing: str) -> str:
        """Show what is being done; returns the text for the step's label."""
        self._doing = doing
        self._show()
        return f"{doing[:1].upper()}{doing[1:]}: {self._in.machine}"

    def _show(self, error: ErrorView | None = None) -> None:
        run, namespace = names.holder_id(self._in.run), workflow.info().namespace
        lines = [f"**Problem**: {plain(error.text(), 1000)}"] if error is not None else []
        lines += [f"✓ {plain(line)}" for line in self._done]
        lines.append(f"Part of {link(run, run, namespace)}; this text is of {clock(workflow.now())}")
        title = f"**{plain(self._in.machine)}** ({self._course.title.lower()}): {plain(self._doing)}"
        workflow.set_current_details(page(title, bullets(lines)))

    async def _report(
        self, stage: str, outcome: StageOutcome, *, needs_fence: bool = False, error: ErrorView | None = None
    ) -> None:
        parent = workflow.info().parent
        if parent is None:
            return
        await workflow.get_external_workflow_handle(parent.workflow_id, run_id=parent.run_id).signal(
            "machine_report",
            MachineReport(
                machine=self._in.machine,
                stage=stage,
                outcome=outcome,
                note=self._note or (self._done[-1] if self._done else ""),
                needs_fence=needs_fence,
                error=error,
            ),
        )

    def _loss(self) -> float | None:
        if self._point is None or self._in.kind in (RunKind.CLEANUP, RunKind.COMMIT, RunKind.CANCEL):
            return None
        if self._final is not None and self._point.id == self._final.id:
            return 0.0
        proven = self._fence is not None and self._fence.kind is not FenceKind.BREAK_GLASS
        cut_off = self._fence.at if self._fence is not None and proven else self._began_at
        return max(0.0, (cut_off - self._point.taken_at).total_seconds())

    def _result(self, outcome: Outcome, error: ErrorView | None) -> MachineResult:
        return MachineResult(
            machine=self._in.machine,
            outcome=outcome,
            state=self._state,
            note=self._note,
            point=self._point,
            data_loss_seconds=self._loss() if outcome is Outcome.SUCCEEDED else None,
            fence=self._fence.evidence if self._fence else "",
            made=self._made or (*self._made_disks, *self._made_nics),
            deleted=self._deleted,
            leftovers=self._leftovers,
            addresses=self._addresses,
            running_at=self._running_at,
            error=error,
        )


def _aborted(machine: str, reason: str) -> ErrorView:
    return error_view(
        to_application_error(FarshoreError(Code.RUN_ABORTED, f"{machine}: {reason}", subject=machine))
    )
