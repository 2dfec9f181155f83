"""MachineProtection: the one writer of a machine's state, its lock, and its replication loop.

Runs change the state by Updates, which only record; the main loop acts: it keeps one leg (an activity of many
replication cycles) going while the state says that the machine replicates. Every handler is safe to repeat, since a
client that lost an answer asks again, and update ids are forgotten when the workflow continues as new.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Generator
from datetime import timedelta
from typing import Any

from temporalio import workflow
from temporalio.exceptions import ActivityError, ApplicationError

with workflow.unsafe.imports_passed_through():
    from farshore.activities import messages as m
    from farshore.activities import signatures as s
    from farshore.contract import names
    from farshore.contract.errors import error_view, to_application_error
    from farshore.contract.machine import (
        Abandon,
        Advance,
        Begin,
        Halt,
        MachineSpec,
        MachineStatus,
        ProtectionState,
        Settle,
        SettleOutcome,
    )
    from farshore.contract.runs import ErrorView
    from farshore.domain import machine as dm
    from farshore.domain.errors import Code, FarshoreError
    from farshore.domain.machine import Health, MainState, ResyncState
    from farshore.workflows import protection_rules as rules
    from farshore.workflows.protection_page import protection_page, short, status
    from farshore.workflows.steps import start_step

_BACKOFF = (1, 2, 4, 8, 10, 30)  # in units of a minute, or of two intervals where those are shorter
_FIRST_COPY = (
    14 * 86400.0
)  # seconds that a first copy or a resynchronisation may take; heartbeats find a dead worker


@workflow.defn(name=names.MACHINE_PROTECTION)
class MachineProtection:
    """One per protected machine, id `machine/<name>`, for as long as the machine is protected."""

    @workflow.init
    def __init__(self, given: ProtectionState) -> None:
        self._s = given
        self._leg: asyncio.Task[Any] | None = None
        self._wake = 0  # raised by every change, so that waiting loops look again

    # -- the loop -------------------------------------------------------------------------------------------------

    @workflow.run
    async def run(self, given: ProtectionState) -> MachineStatus:
        """Replicate while the state says so; end when protection has been disabled."""
        self._show()
        while not self._s.disabled:
            try:
                await self._turn()
            except asyncio.CancelledError:
                # "Request cancellation" on this page would forget a machine that may run at the other site.
                workflow.logger.warning(
                    "cancellation of %s ignored: disable its protection", self._s.spec.machine
                )
            if self._is_old() and not self._s.disabled:
                await workflow.wait_condition(workflow.all_handlers_finished)
                workflow.continue_as_new(self._s)
        gone = FarshoreError(Code.RUN_ABORTED, "Protection was disabled.", subject=self._s.spec.machine)
        await self._tell_watcher(ErrorView.of(gone.info))
        await workflow.wait_condition(workflow.all_handlers_finished)
        return self.status()

    async def _turn(self) -> None:
        if self._replicates():
            await self._run_leg()
        else:
            await workflow.wait_condition(lambda: self._replicates() or self._s.disabled or self._is_old())

    def _is_old(self) -> bool:
        return workflow.info().is_continue_as_new_suggested()

    def _replicates(self) -> bool:
        return dm.replicates(self._s.state) and not self._s.halted and not self._s.disabled

    async def _run_leg(self) -> None:
        state, spec = self._s.state, self._s.spec
        initial = state.main is MainState.INITIAL_REPLICATION_IN_PROGRESS
        repairing = state.resync is ResyncState.INITIATED
        what = "Initial replication" if initial else "Resynchronisation" if repairing else "Replication"
        leg = start_step(
            s.REPLICATE_LEG,
            m.LegCall(
                spec=spec,
                owner=f"{workflow.info().workflow_id} {workflow.info().run_id}",
                until_seconds=spec.policy.leg,
                stop_after_first=initial or repairing,
                force_full=repairing or self._s.force_full,
            ),
            queue=names.legs_queue(spec.source_queue),
            longer_by=_FIRST_COPY if initial or repairing else 0.0,
            summary=f"{what} of {spec.machine} to {spec.target_site}, every {spec.policy.interval:g} s",
        )
        self._leg = leg
        self._show()
        called_off = False
        try:
            await workflow.wait_condition(lambda: leg.done() or self._leg_is_wrong(repairing))
            if not leg.done():
                called_off = True
                leg.cancel()
            report = await leg
        except ActivityError as error:
            if not called_off:
                await self._leg_failed(error_view(error, subject=spec.machine), initial=initial)
            return
        except asyncio.CancelledError:
            if not called_off:
                raise  # the workflow itself is cancelled
            return
        finally:
            self._leg = None
        await self._leg_done(report, initial=initial, repairing=repairing)

    def _leg_is_wrong(self, repairing: bool) -> bool:
        """Nothing is to be replicated any more, or a person has asked for a resynchronisation meanwhile."""
        return not self._replicates() or (self._s.state.resync is ResyncState.INITIATED and not repairing)

    async def _leg_done(self, report: m.LegReport, *, initial: bool, repairing: bool) -> None:
        if report.points == 0 and report.last_error:
            view = ErrorView.of(
                FarshoreError(Code.SOURCE_READ_FAILED, report.last_error, subject=self._s.spec.machine).info
            )
            await self._leg_failed(view, initial=initial)
            return
        state = dm.with_health(self._s.state, Health.NORMAL)
        if initial and report.points and state.main is MainState.INITIAL_REPLICATION_IN_PROGRESS:
            state = dm.succeed(state)
        if repairing and report.points and state.resync is ResyncState.INITIATED:
            state = dm.succeed_resync(state)
        newest = report.newest or self._s.newest_point
        self._set(state=state, newest_point=newest, error=None, failures=0, force_full=False)
        if initial and report.points:
            await self._tell_watcher(None)

    async def _leg_failed(self, view: ErrorView, *, initial: bool) -> None:
        failures = self._s.failures + 1
        final = view.code in (Code.SOURCE_NOT_ELIGIBLE, Code.SOURCE_MACHINE_NOT_FOUND, Code.ACCESS_DENIED)
        health = Health.WARNING if failures < 2 else Health.CRITICAL
        state = dm.with_health(self._s.state, health)
        if initial and final and state.main is MainState.INITIAL_REPLICATION_IN_PROGRESS:
            state = dm.fail(state)
        self._set(state=state, failures=failures, error=view)
        if initial and final:
            await self._tell_watcher(view)
            return
        unit = min(60.0, 2 * self._s.spec.policy.interval)
        pause = unit * _BACKOFF[min(failures, len(_BACKOFF)) - 1]
        seen = self._wake
        try:
            await workflow.wait_condition(
                lambda: self._wake != seen or not self._replicates(),
                timeout=timedelta(seconds=pause),
                timeout_summary=f"Replication of {self._s.spec.machine} is tried again",
            )
        except TimeoutError:
            return

    async def _tell_watcher(self, problem: ErrorView | None) -> None:
        watcher = self._s.watcher
        if not watcher:
            return
        self._set(watcher="")
        try:
            await workflow.get_external_workflow_handle(watcher).signal(
                "machine_ready",
                args=[self._s.spec.machine, problem.model_dump(mode="json") if problem else None],
            )
        except ApplicationError:
            workflow.logger.info("%s no longer waits for %s", watcher, self._s.spec.machine)

    # -- what runs ask for ----------------------------------------------------------------------------------------

    @workflow.update(description="Take the machine's lock and enter an operation (used by runs)")
    def begin(self, ask: Begin) -> MachineStatus:
        if not rules.has_begun(self._s, ask):
            self._apply(lambda st: rules.begin(st, ask))
        return self.status()

    @begin.validator
    def _may_begin(self, ask: Begin) -> None:
        with _refusing():
            rules.may_begin(self._s, ask)

    @workflow.update(description="Go to the second half of the operation; a promotion needs the fence token")
    def advance(self, ask: Advance) -> MachineStatus:
        self._apply(lambda st: rules.advance(st, ask))
        return self.status()

    @advance.validator
    def _may_advance(self, ask: Advance) -> None:
        with _refusing():
            rules.may_advance(self._s, ask)

    @workflow.update(description="End the operation and release the machine's lock (used by runs)")
    def settle(self, ask: Settle) -> MachineStatus:
        if not rules.has_settled(self._s, ask):
            self._apply(lambda st: rules.settle(st, ask, workflow.now()))
        return self.status()

    @settle.validator
    def _may_settle(self, ask: Settle) -> None:
        with _refusing():
            rules.may_settle(self._s, ask)

    @workflow.update(description="Stop the replication loop for the failover that holds the lock")
    async def halt(self, ask: Halt) -> MachineStatus:
        self._set(halted=True)
        if ask.wait:
            await workflow.wait_condition(lambda: self._leg is None)
        return self.status()

    @halt.validator
    def _may_halt(self, ask: Halt) -> None:
        with _refusing():
            rules.must_hold(self._s, ask.run)

    @workflow.update(description="Break the lock of a run that has ended without settling")
    def abandon(self, ask: Abandon) -> MachineStatus:
        if not ask.holder or self._s.holder != ask.holder:
            return self.status()
        entry = FarshoreError(Code.RUN_ABORTED, ask.reason, subject=self._s.spec.machine)
        ending = Settle(
            run=ask.holder,
            outcome=SettleOutcome.CANCELLED,
            error=ErrorView.of(entry.info),
            source_stopped=True,  # nobody is left to tell: a source that may be off is not called protected
        )
        self._apply(lambda st: rules.settle(st, ending, workflow.now()))
        return self.status()

    @workflow.update(description="Use other replication settings from the next leg on")
    def configure(self, spec: MachineSpec) -> MachineStatus:
        self._set(spec=rules.configured(self._s, spec))
        return self.status()

    @configure.validator
    def _may_configure(self, spec: MachineSpec) -> None:
        with _refusing():
            rules.may_configure(self._s, spec)

    @workflow.query
    def status(self) -> MachineStatus:
        """The machine's state, what it allows now, who holds it, its newest known point."""
        return status(self._s, replicating=self._leg is not None)

    # -- help -----------------------------------------------------------------------------------------------------

    def _apply(self, rule: Callable[[ProtectionState], rules.Changes]) -> None:
        with _refusing():  # left to itself an error would fail the task, and be repeated for ever
            changes = rule(self._s)
        if changes:
            self._set(**changes)

    def _set(self, **changes: Any) -> None:
        before = self._s
        self._s = before.model_copy(update=changes)
        self._wake += 1
        if self._s.state != before.state:
            workflow.upsert_search_attributes([names.STATE.value_set(short(self._s.state))])
        self._show()

    def _show(self) -> None:
        workflow.set_current_details(
            protection_page(
                self._s,
                replicating=self._leg is not None,
                namespace=workflow.info().namespace,
                now=workflow.now(),
            )
        )


@contextlib.contextmanager
def _refusing() -> Generator[None]:
    """Our errors in Temporal's form: an update is refused, the workflow goes on."""
    try:
        yield
    except FarshoreError as error:
        raise to_application_error(error) from None
