"""MachineFailover: one machine in one run, with its own timeline.

It waits for its parent's word at each stage, does the stage's steps in order, reports, and in the end always settles
the machine's state, whatever happened: done, failed, stopped or cancelled.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import ClassVar

from temporalio import workflow
from temporalio.exceptions import ActivityError, ApplicationError

with workflow.unsafe.imports_passed_through():
    from farshore.activities import messages as m
    from farshore.activities import signatures as s
    from farshore.contract import names
    from farshore.contract.errors import error_view, to_application_error
    from farshore.contract.machine import Advance, Begin, FenceKind, Settle, SettleOutcome
    from farshore.contract.runs import ErrorView, MachineResult, Outcome, RunKind
    from farshore.domain.errors import Code, FarshoreError
    from farshore.workflows.details import many
    from farshore.workflows.messages import MachineReport, MachineRun, Proceed, StageOutcome
    from farshore.workflows.source_steps import SourceSteps
    from farshore.workflows.stages import Work
    from farshore.workflows.target_steps import TargetSteps

_HOLDER_TEST, _HOLDER_FAILOVER = "test", "failover"


class _Skip(Exception):
    """The machine needs nothing from this run."""


class _Stopped(Exception):
    """The run stops before this machine is done."""


@workflow.defn(name=names.MACHINE_FAILOVER)
class MachineFailover(SourceSteps, TargetSteps):
    """Child of a FailoverGroup."""

    @workflow.init
    def __init__(self, given: MachineRun) -> None:
        super().__init__(given)
        self._proceed: dict[str, Proceed] = {}
        self._stop = ""
        self._begun = False

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
                if stage is self._course.stages[-1]:
                    break  # the result that follows tells the group as much as a report would
                self._doing = "waiting for the next stage of the run"
                self._show()
                await self._report(stage.name, StageOutcome.DONE, needs_fence=self._needs_fence(stage.name))
            self._note = self._done[-1] if self._done else ""
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
        settling = asyncio.ensure_future(
            self._update(
                "settle",
                Settle(run=self._in.run, outcome=outcome, error=error, source_stopped=self._source_stopped),
                f"settle {outcome.value}",
            )
        )
        try:
            try:
                status = await asyncio.shield(settling)
            except asyncio.CancelledError:  # a person's, meanwhile; the next one never comes
                status = await asyncio.shield(settling)
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

    async def _settle(self) -> None:
        self._say("recording the machine's state")
        status = await self._update(
            "settle",
            Settle(
                run=self._in.run,
                outcome=SettleOutcome.SUCCESS,
                point=self._point,
                made=self._made,
                source_stopped=self._source_stopped,
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

    _steps: ClassVar[dict[Work, Callable[[MachineFailover], Awaitable[None]]]] = {
        Work.SEEK_POINT: TargetSteps._seek_point,
        Work.BEGIN: _begin,
        Work.CHECK_SOURCE: SourceSteps._check_source,
        Work.SHUT_DOWN: SourceSteps._shut_down,
        Work.TRY_SHUT_DOWN: SourceSteps._try_shut_down,
        Work.HALT: SourceSteps._halt,
        Work.FINAL_CYCLE: SourceSteps._final_cycle,
        Work.TRY_FINAL_CYCLE: SourceSteps._try_final_cycle,
        Work.FENCE: SourceSteps._prove,
        Work.TRY_FENCE: SourceSteps._try_fence,
        Work.PROMOTE: _promote,
        Work.CHOOSE_POINT: TargetSteps._choose_point,
        Work.REMOVE_FORMER: TargetSteps._remove_former,
        Work.DISKS: TargetSteps._make_disks,
        Work.NICS: TargetSteps._make_nics,
        Work.BOOT: TargetSteps._boot,
        Work.SETTLE: _settle,
        Work.REMOVE_TEST: _remove_test,
        Work.REMOVE_REPLICA_MACHINE: _remove_replica_machine,
        Work.START_SOURCE: SourceSteps._start_source,
        Work.COMMIT: _commit,
    }

    # -- help -----------------------------------------------------------------------------------------------------

    def _needs_fence(self, stage: str) -> bool:
        return self._in.kind is RunKind.UNPLANNED and stage == "shutdown" and self._fence is None

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


def _aborted(machine: str, reason: str) -> ErrorView:
    return error_view(
        to_application_error(FarshoreError(Code.RUN_ABORTED, f"{machine}: {reason}", subject=machine))
    )
