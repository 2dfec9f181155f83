"""MachineProtection: the one writer of a machine's state, its lock, and its replication loop.

Runs change the state by Updates, which only record; the main loop acts: it keeps one leg (an activity of many
replication cycles) going while the state says that the machine replicates. Every handler is safe to repeat, since a
client that lost an answer asks again, and update ids are forgotten when the workflow continues as new.
"""

from __future__ import annotations

import asyncio
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
        FenceKind,
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
    from farshore.domain.machine import Health, MachineState, MainState, Operation, ResyncState, TestState
    from farshore.workflows.details import bullets, instant, link, page, plain
    from farshore.workflows.steps import start_step

_CAPABILITIES = dm.VSPHERE_TO_AZURE
_BACKOFF = (1, 2, 4, 8, 10, 30)  # in units of a minute, or of two intervals where those are shorter
_TESTING = (Operation.TEST_FAILOVER, Operation.TEST_CLEANUP)
_BREAK_GLASS_PEOPLE = 2
_FIRST_COPY = (
    14 * 86400.0
)  # seconds that a first copy or a resynchronisation may take; heartbeats find a dead worker
_SECOND_HALF = (
    MainState.PLANNED_FAILOVER_COMPLETING,
    MainState.UNPLANNED_FAILOVER_COMPLETING,
    MainState.COMMIT_FAILOVER_IN_PROGRESS_ON_PRIMARY,
    MainState.CANCEL_FAILOVER_IN_PROGRESS_ON_PRIMARY,
)


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
        if self._s.holder == ask.run and self._s.operation is ask.operation:
            return self.status()
        state = dm.begin(self._s.state, ask.operation, _CAPABILITIES)
        at_once = ask.operation is Operation.REPAIR
        self._set(
            state=state,
            holder="" if at_once else ask.run,
            operation=None if at_once else ask.operation,
            halted=False,
            force_full=self._s.force_full or at_once,
            watcher=names.holder_id(ask.run)
            if ask.operation in (Operation.ENABLE, Operation.REPAIR)
            else self._s.watcher,
            fence=None
            if ask.operation in (Operation.PLANNED_FAILOVER, Operation.UNPLANNED_FAILOVER)
            else self._s.fence,
        )
        return self.status()

    @begin.validator
    def _may_begin(self, ask: Begin) -> None:
        if self._s.holder and self._s.holder != ask.run:
            raise to_application_error(
                FarshoreError(
                    Code.SCENARIO_IN_PROGRESS,
                    f"{self._s.spec.machine} is held by the run {names.holder_id(self._s.holder)} "
                    f"({self._s.operation}).",
                    subject=self._s.spec.machine,
                    details={"holder": self._s.holder},
                )
            )
        if self._s.holder == ask.run and self._s.operation is ask.operation:
            return
        self._must_have_sites(ask.source_site, ask.target_site)
        point = self._s.point_in_use
        try:
            dm.begin(self._s.state, ask.operation, _CAPABILITIES)
            if ask.operation is Operation.CHANGE_POINT and point is not None and point.final:
                _may_lose(ask)
        except FarshoreError as error:
            named = FarshoreError(
                error.code,
                f"{self._s.spec.machine}: {error.info.message}",
                subject=self._s.spec.machine,
                causes=error.info.possible_causes,
                action=error.info.recommended_action,
                details=error.info.details,
            )
            raise to_application_error(named) from None

    @workflow.update(description="Go to the second half of the operation; a promotion needs the fence token")
    def advance(self, ask: Advance) -> MachineStatus:
        if self._s.fence is not None and ask.fence is not None and self._s.fence.run == ask.fence.run:
            return self.status()  # a repeat
        if self._s.state.main in _SECOND_HALF:
            return self.status()
        try:
            state = dm.advance(self._s.state, fenced=ask.fence is not None)
        except FarshoreError as error:
            raise to_application_error(error) from None
        self._set(state=state, fence=ask.fence or self._s.fence)
        return self.status()

    @advance.validator
    def _may_advance(self, ask: Advance) -> None:
        self._must_hold(ask.run)
        fence = ask.fence
        if fence is None:
            return
        problem = ""
        if fence.machine != self._s.spec.machine:
            problem = f"The fence token is for {fence.machine}."
        elif fence.run != ask.run:
            problem = f"The fence token belongs to the run {fence.run}."
        elif (
            fence.kind is FenceKind.BREAK_GLASS
            and len({p.casefold() for p in fence.approvers}) < _BREAK_GLASS_PEOPLE
        ):
            problem = "Break-glass needs the word of two different people."
        if problem:
            raise to_application_error(
                FarshoreError(
                    Code.FENCE_NOT_PROVEN, f"{self._s.spec.machine}: {problem}", subject=self._s.spec.machine
                )
            )

    @workflow.update(description="End the operation and release the machine's lock (used by runs)")
    def settle(self, ask: Settle) -> MachineStatus:
        if self._s.settled != (ask.run, ask.outcome.value) or self._s.holder == ask.run:
            self._end(ask)
        return self.status()

    def _end(self, ask: Settle) -> None:
        try:
            self._end_operation(ask)
        except FarshoreError as error:  # left to itself it would fail the task, and be repeated for ever
            raise to_application_error(error) from None

    def _end_operation(self, ask: Settle) -> None:
        operation, state = self._s.operation, self._s.state
        changes: dict[str, Any] = {}
        if operation in _TESTING:
            state = _settle_test(state, ask.outcome)
            if ask.outcome is SettleOutcome.SUCCESS:
                testing = operation is Operation.TEST_FAILOVER
                changes |= {"tested": ask.made if testing else (), "last_test_at": workflow.now()}
        else:
            state, changes = self._settle_main(state, operation, ask)
        self._set(
            state=state,
            holder="",
            operation=None,
            halted=False,
            settled=(ask.run, ask.outcome.value),
            error=ask.error,
            **changes,
        )

    def _settle_main(
        self, state: MachineState, operation: Operation | None, ask: Settle
    ) -> tuple[MachineState, dict[str, Any]]:
        changes: dict[str, Any] = {}
        if ask.outcome is SettleOutcome.FAILURE:
            return dm.fail(state), changes
        if ask.outcome is SettleOutcome.CANCELLED:
            try:
                return dm.cancel(state, source_stopped=ask.source_stopped or self._s.halted), changes
            except FarshoreError:
                return dm.fail(state), changes
        if state.main in (
            MainState.COMMIT_FAILOVER_IN_PROGRESS_ON_RECOVERY,
            MainState.CANCEL_FAILOVER_IN_PROGRESS_ON_RECOVERY,
        ):
            state = dm.advance(state)
        state = dm.succeed(state, resync_required=ask.source_may_lack_changes)
        match operation:
            case Operation.PLANNED_FAILOVER | Operation.UNPLANNED_FAILOVER | Operation.CHANGE_POINT:
                newest = self._s.newest_point
                if ask.point is not None and (newest is None or ask.point.cycle > newest.cycle):
                    newest = ask.point
                changes = {
                    "point_in_use": ask.point,
                    "newest_point": newest,
                    "recovered": ask.made,
                    "last_failover_at": workflow.now(),
                }
            case Operation.CANCEL:
                changes = {"point_in_use": None, "recovered": (), "fence": None, "failures": 0}
            case Operation.COMMIT:
                changes = {"newest_point": self._s.point_in_use}
            case Operation.DISABLE:
                changes = {"disabled": True}
            case _:
                pass
        return state, changes

    @settle.validator
    def _may_settle(self, ask: Settle) -> None:
        if self._s.holder != ask.run and self._s.settled == (ask.run, ask.outcome.value):
            return
        self._must_hold(ask.run)
        if ask.outcome is SettleOutcome.SUCCESS and self._s.state.main in (
            MainState.PLANNED_FAILOVER_INITIATED,
            MainState.UNPLANNED_FAILOVER_INITIATED,
        ):
            raise to_application_error(
                FarshoreError(
                    Code.FENCE_NOT_PROVEN,
                    f"{self._s.spec.machine} has not been promoted: no fence token was given.",
                    subject=self._s.spec.machine,
                )
            )

    @workflow.update(description="Stop the replication loop for the failover that holds the lock")
    async def halt(self, ask: Halt) -> MachineStatus:
        self._set(halted=True)
        if ask.wait:
            await workflow.wait_condition(lambda: self._leg is None)
        return self.status()

    @halt.validator
    def _may_halt(self, ask: Halt) -> None:
        self._must_hold(ask.run)

    @workflow.update(description="Break the lock of a run that has ended without settling")
    def abandon(self, ask: Abandon) -> MachineStatus:
        if not ask.holder or self._s.holder != ask.holder:
            return self.status()
        entry = FarshoreError(Code.RUN_ABORTED, ask.reason, subject=self._s.spec.machine)
        self._end(
            Settle(
                run=ask.holder,
                outcome=SettleOutcome.CANCELLED,
                error=ErrorView.of(entry.info),
                source_stopped=True,  # nobody is left to tell: a source that may be off is not called protected
            )
        )
        return self.status()

    @workflow.update(description="Use other replication settings from the next leg on")
    def configure(self, spec: MachineSpec) -> MachineStatus:
        known = self._s.spec.source
        if "#" not in spec.source and known.rpartition("#")[0] == spec.source:
            spec = spec.model_copy(update={"source": known})  # the same machine by name: its id is kept
        self._set(spec=spec)
        return self.status()

    @configure.validator
    def _may_configure(self, spec: MachineSpec) -> None:
        if spec.machine != self._s.spec.machine:
            raise to_application_error(
                FarshoreError(
                    Code.INVALID_INPUT, f"These settings are for {spec.machine}, not {self._s.spec.machine}."
                )
            )
        if self._s.state.main in (
            MainState.UNPROTECTED,
            MainState.ENABLING_PROTECTION,
            MainState.ENABLING_FAILED,
        ):
            return
        self._must_have_sites(spec.source_site, spec.target_site)
        if spec.source.partition("#")[0] != self._s.spec.source.partition("#")[0]:
            raise to_application_error(
                FarshoreError(
                    Code.NOT_READY,
                    f"{spec.machine} is protected from {self._s.spec.source.partition('#')[0]} by plan {self._s.spec.plan}.",
                    subject=spec.machine,
                    causes=(
                        "Two plans give this name to different machines.",
                        "The plan's source was edited.",
                    ),
                    action="Use another name in the plan, or disable protection and protect again.",
                )
            )

    @workflow.query
    def status(self) -> MachineStatus:
        """The machine's state, what it allows now, who holds it, its newest known point."""
        st = self._s
        return MachineStatus(
            machine=st.spec.machine,
            plan=st.spec.plan,
            state=st.state,
            allowed_operations=tuple(o.value for o in dm.allowed_operations(st.state, _CAPABILITIES)),
            holder=names.holder_id(st.holder),
            source=st.spec.source,
            replicating=self._leg is not None,
            newest_point=st.newest_point,
            point_in_use=st.point_in_use,
            recovered=st.recovered,
            last_test_at=st.last_test_at,
            last_failover_at=st.last_failover_at,
            fence=st.fence,
            error=st.error,
            source_site=st.spec.source_site,
            target_site=st.spec.target_site,
        )

    # -- help -----------------------------------------------------------------------------------------------------

    def _must_have_sites(self, source_site: str, target_site: str) -> None:
        """A plan that was edited to other sites would act there, while the machine is here."""
        spec = self._s.spec
        if (source_site or spec.source_site, target_site or spec.target_site) != (
            spec.source_site,
            spec.target_site,
        ):
            raise to_application_error(
                FarshoreError(
                    Code.NOT_READY,
                    f"{spec.machine} is protected {spec.source_site} → {spec.target_site}; the plan says "
                    f"{source_site} → {target_site}.",
                    subject=spec.machine,
                    causes=("The plan's sites were edited after protection was enabled.",),
                    action="Restore the plan's sites, or disable protection and protect again.",
                )
            )

    def _must_hold(self, run: str) -> None:
        if self._s.holder != run:
            held = f"held by {names.holder_id(self._s.holder)}" if self._s.holder else "held by no run"
            raise to_application_error(
                FarshoreError(
                    Code.SCENARIO_IN_PROGRESS,
                    f"{self._s.spec.machine} is {held}, not by {names.holder_id(run)}.",
                    subject=self._s.spec.machine,
                    details={"holder": self._s.holder},
                )
            )

    def _set(self, **changes: Any) -> None:
        before = self._s
        self._s = before.model_copy(update=changes)
        self._wake += 1
        if self._s.state != before.state:
            workflow.upsert_search_attributes([names.STATE.value_set(_short(self._s.state))])
        self._show()

    def _show(self) -> None:
        st, spec, namespace = self._s, self._s.spec, workflow.info().namespace
        site = st.state.active_location.lower()
        lines = [f"**Problem**: {plain(st.error.text(), 1000)}"] if st.error is not None else []
        if st.holder:
            lines.append(
                f"**Held by** {link(names.holder_id(st.holder), names.holder_id(st.holder), namespace)} ({st.operation})"
            )
        if self._leg is not None:
            lines.append(
                f"**Replicating** {plain(spec.source_site)} → {plain(spec.target_site)} every {spec.policy.interval:g} s. "
                f"**RPO now**: `rpo_seconds` in the tab *Pending Activities* (limit {spec.policy.rpo_threshold:g} s)"
            )
        else:
            lines.append("**Not replicating**")
        if st.point_in_use is not None:
            taken = instant(st.point_in_use.taken_at)
            lines.append(f"**Failed over** to point {plain(st.point_in_use.id)}, taken {taken}")
        elif st.newest_point is not None and self._leg is None:  # while it replicates, this one is old
            lines.append(
                f"**Newest point**: {plain(st.newest_point.id)}, taken {instant(st.newest_point.taken_at)}"
            )
        if not st.holder:
            allowed = ", ".join(o.value for o in dm.allowed_operations(st.state, _CAPABILITIES))
            lines.append(f"**Allowed now**: {allowed or 'nothing'}")
        lines.append(
            f"Plan {plain(spec.plan)}; this text is of {instant(workflow.now())} (press R to read it again)"
        )
        title = f"**{plain(spec.machine)}** is **{_short(st.state)}**; it runs at the {site} site"
        workflow.set_current_details(page(title, bullets(lines)))


def _may_lose(ask: Begin) -> None:
    if not ask.accept_data_loss:
        raise FarshoreError(
            Code.DATA_LOSS_NOT_APPROVED,
            "It failed over without loss; another point gives up what was written after it.",
            action="Start it again with accept_data_loss: true.",
        )


def _settle_test(state: MachineState, outcome: SettleOutcome) -> MachineState:
    if outcome is not SettleOutcome.SUCCESS:
        return dm.fail_test(state)
    if state.test in (TestState.INITIATED, TestState.CLEANUP_INITIATED):
        state = dm.advance_test(state)
    state = dm.succeed_test(state)
    if state.test is TestState.MARKED_FOR_DELETION:
        state = dm.succeed_test(state)
    return state


def _short(state: MachineState) -> str:
    parts = [state.main.value]
    if state.test is not TestState.NONE:
        parts.append(f"test {state.test.value}")
    if state.health is not Health.NORMAL:
        parts.append(state.health.value)
    return ", ".join(parts)
