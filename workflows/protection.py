"""Protection: enable or disable replication of a plan's machines. Protect again after an edit: settings are renewed."""

from __future__ import annotations

import asyncio
from typing import Any

from temporalio import workflow
from temporalio.exceptions import ActivityError, ApplicationError

with workflow.unsafe.imports_passed_through():
    from pydantic import BaseModel

    from farshore.activities import messages as m
    from farshore.activities import signatures as s
    from farshore.contract import names
    from farshore.contract.errors import error_view, view_to_application_error
    from farshore.contract.machine import Begin, MachineSpec, MachineStatus, Settle, SettleOutcome
    from farshore.contract.runs import (
        ErrorView,
        MachineProgress,
        MachineResult,
        Outcome,
        ProtectionInput,
        ProtectionKind,
        RunProgress,
        RunResult,
        RunStatus,
    )
    from farshore.domain.errors import Code, FarshoreError
    from farshore.domain.machine import MainState, Operation
    from farshore.workflows.details import bullets, page, plain
    from farshore.workflows.policy import machine_spec
    from farshore.workflows.steps import run_step

_AT_ONCE = 20  # machines worked on at the same time
_LISTED_ERRORS = 50
# EnablingProtection: either another run is at it, which the update says, or one that has ended left its lock.
_ENABLE_FROM = (MainState.UNPROTECTED, MainState.ENABLING_FAILED, MainState.ENABLING_PROTECTION)

# What the timeline says of the changes of a machine's state; the keys are part of update ids.
_RECORDS = {
    "enable": "Taking the machine's lock",
    "enabled": "Recording that it can be protected; initial replication begins",
    "enable failed": "Recording that it can't be protected",
    "repair": "Beginning initial replication anew",
    "configure": "Handing on the plan's settings",
    "disable": "Taking the machine's lock",
    "disabled": "Recording that protection is off",
    "disable failed": "Recording that protection could not be switched off",
}


@workflow.defn(name=names.PROTECTION)
class Protection:
    """Start it with {"plan": "crm"} to protect, {"plan": "crm", "kind": "disable"} to stop."""

    @workflow.init
    def __init__(self, ask: ProtectionInput) -> None:
        self._ask = ask
        self._holder = names.lock_holder(workflow.info().workflow_id, workflow.info().first_execution_run_id)
        self._started = workflow.now()
        self._phase = "loading the plan"
        self._notes: dict[str, str] = {}
        self._ready: dict[str, ErrorView | None] = {}
        self._known = False  # a machine of this run is protected, or was

    @workflow.signal(description="Initial replication of a machine has ended (from its MachineProtection)")
    def machine_ready(self, machine: str, problem: dict[str, Any] | None) -> None:
        self._ready[machine] = ErrorView.model_validate(problem) if problem else None
        self._note(machine, "failed" if problem else "Protected")

    @workflow.query
    def progress(self) -> RunProgress:
        """What each machine is at."""
        return RunProgress(
            plan=self._ask.plan,
            kind=self._ask.kind.value,
            phase=self._phase,
            started_at=self._started,
            machines=tuple(
                MachineProgress(machine=name, group="", stage="", outcome=note)
                for name, note in self._notes.items()
            ),
        )

    @workflow.run
    async def run(self, ask: ProtectionInput) -> RunResult:
        """Protect or disable; fails only if no machine succeeded."""
        workflow.upsert_search_attributes(
            [
                names.PLAN.value_set(ask.plan),
                names.KIND.value_set(ask.kind.value),
                names.STATE.value_set("Running"),
            ]
        )
        try:
            pinned = await run_step(
                s.LOAD_PLAN,
                m.LoadPlan(plan=ask.plan, machines=ask.machines),
                queue=names.CONTROL_QUEUE,
                summary=f"Read and pin plan {ask.plan}",
            )
        except ActivityError as error:
            workflow.upsert_search_attributes([names.STATE.value_set(RunStatus.FAILED.value)])
            raise view_to_application_error(error_view(error, subject=ask.plan)) from None
        workflow.upsert_search_attributes([names.SITE.value_set(pinned.plan.sites.source)])
        wanted = [name for name in pinned.plan.machines if not ask.machines or name in ask.machines]
        self._phase = "protecting" if ask.kind is ProtectionKind.PROTECT else "disabling protection"
        for name in wanted:
            self._note(name, "waiting")
        slots = asyncio.Semaphore(_AT_ONCE)

        async def one(name: str) -> MachineResult:
            async with slots:
                return await self._one(machine_spec(pinned, name))

        machines = await asyncio.gather(*(one(name) for name in wanted))
        if ask.kind is ProtectionKind.DISABLE and not self._known:
            machines = [
                _unknown(r) for r in machines
            ]  # a plan that nobody ever protected: rather a wrong name
        return await self._end(pinned, machines)

    async def _end(self, pinned: m.PinnedPlan, machines: list[MachineResult]) -> RunResult:
        errors = tuple(r.error for r in machines if r.error is not None)
        good = [r for r in machines if r.outcome in (Outcome.SUCCEEDED, Outcome.SKIPPED)]
        status = (
            RunStatus.SUCCEEDED if not errors else RunStatus.PARTIALLY_SUCCEEDED if good else RunStatus.FAILED
        )
        self._phase = f"ended: {status.value}"
        self._show()
        workflow.upsert_search_attributes([names.STATE.value_set(status.value)])
        await workflow.wait_condition(workflow.all_handlers_finished)
        result = RunResult(
            plan=self._ask.plan,
            kind=self._ask.kind.value,
            status=status,
            plan_sha256=pinned.sha256,
            started_at=self._started,
            finished_at=workflow.now(),
            machines=tuple(machines),
            errors=errors[:_LISTED_ERRORS],  # each stands with its machine too
        )
        if status is RunStatus.FAILED:
            base = view_to_application_error(errors[0])
            raise ApplicationError(
                base.message,
                *base.details,
                result.model_dump(mode="json"),
                type=base.type,
                non_retryable=True,
            )
        return result

    async def _one(self, spec: MachineSpec) -> MachineResult:
        work = self._protect if self._ask.kind is ProtectionKind.PROTECT else self._disable
        try:
            result = await work(spec)
        except (ActivityError, FarshoreError) as error:
            view = error_view(error, subject=spec.machine)
            self._note(spec.machine, f"failed: {view.message}")
            return MachineResult(machine=spec.machine, outcome=Outcome.FAILED, error=view)
        self._note(spec.machine, result.note or result.state)
        return result

    async def _protect(self, spec: MachineSpec) -> MachineResult:
        self._note(spec.machine, "checking the source machine")
        status = await run_step(
            s.START_PROTECTION,
            m.StartProtection(spec=spec),
            queue=names.CONTROL_QUEUE,
            summary=f"Start the protection workflow of {spec.machine}",
        )
        main = status.state.main
        if main in _ENABLE_FROM:
            await self._enable(spec)
        elif main is MainState.INITIAL_REPLICATION_FAILED:
            await self._update(spec, "begin", Begin(operation=Operation.REPAIR, run=self._holder), "repair")
        else:
            await self._update(spec, "configure", spec, "configure")
            return MachineResult(
                machine=spec.machine,
                outcome=Outcome.SKIPPED,
                state=main.value,
                note=f"is {main.value} already; its settings are those of the plan now",
            )
        if not self._ask.wait:
            return MachineResult(
                machine=spec.machine,
                outcome=Outcome.SUCCEEDED,
                state=MainState.INITIAL_REPLICATION_IN_PROGRESS.value,
                note="initial replication is under way",
            )
        self._note(spec.machine, "initial replication")
        await workflow.wait_condition(lambda: spec.machine in self._ready)
        problem = self._ready[spec.machine]
        return MachineResult(
            machine=spec.machine,
            outcome=Outcome.FAILED if problem else Outcome.SUCCEEDED,
            state=(MainState.INITIAL_REPLICATION_FAILED if problem else MainState.PROTECTED).value,
            error=problem,
        )

    async def _enable(self, spec: MachineSpec) -> None:
        await self._update(spec, "begin", Begin(operation=Operation.ENABLE, run=self._holder), "enable")
        try:
            seen = await run_step(
                s.ENABLE_TRACKING,
                m.SourceCall(site=spec.source_site, machine=spec.machine, source=spec.source),
                queue=spec.source_queue,
                summary=f"Check {spec.machine} and switch on its change tracking",
            )
            if seen.errors:
                raise FarshoreError(
                    Code.SOURCE_NOT_ELIGIBLE,
                    f"{spec.machine} can't be protected: {'; '.join(seen.errors)}",
                    subject=spec.machine,
                )
        except (ActivityError, FarshoreError) as error:
            view = error_view(error, subject=spec.machine)
            await self._update(
                spec,
                "settle",
                Settle(run=self._holder, outcome=SettleOutcome.FAILURE, error=view),
                "enable failed",
            )
            raise
        # From now on it is this machine, whatever machine may carry its name one day.
        known = spec.model_copy(update={"source": f"{spec.source}#{seen.id}"}) if seen.id else spec
        await self._update(spec, "configure", known, "configure")
        await self._update(spec, "settle", Settle(run=self._holder, outcome=SettleOutcome.SUCCESS), "enabled")

    async def _disable(self, spec: MachineSpec) -> MachineResult:
        self._note(spec.machine, "stopping replication")
        try:
            status = await self._update(
                spec, "begin", Begin(operation=Operation.DISABLE, run=self._holder), "disable"
            )
        except ActivityError as error:
            view = error_view(error, subject=spec.machine)
            if not _is_off(view):
                raise
            self._known |= view.code != Code.MACHINE_NOT_PROTECTED or view.details["disabled"] is True
            return MachineResult(
                machine=spec.machine,
                outcome=Outcome.SKIPPED,
                state=MainState.UNPROTECTED.value,
                note="is not protected already: there was nothing to switch off",
            )
        self._known = True
        try:
            note = await self._reap(spec, status.source or spec.source)
            self._note(spec.machine, "deleting the replica and its points")
            await run_step(
                s.REMOVE_REPLICA,
                m.StoreCall(site=spec.target_site, machine=spec.machine),
                queue=spec.target_queue,
                summary=f"Delete the replica and all points of {spec.machine}",
            )
        except ActivityError as error:
            view = error_view(error, subject=spec.machine, unreachable=Code.TARGET_UNREACHABLE)
            await self._update(
                spec,
                "settle",
                Settle(run=self._holder, outcome=SettleOutcome.FAILURE, error=view),
                "disable failed",
            )
            raise
        await self._update(
            spec, "settle", Settle(run=self._holder, outcome=SettleOutcome.SUCCESS), "disabled"
        )
        return MachineResult(
            machine=spec.machine, outcome=Outcome.SUCCEEDED, state=MainState.UNPROTECTED.value, note=note
        )

    async def _reap(self, spec: MachineSpec, source: str) -> str:
        """No leg comes any more: snapshots that the last one may have left must not grow for ever."""
        try:
            gone = await run_step(
                s.REAP_SOURCE,
                m.SourceCall(site=spec.source_site, machine=spec.machine, source=source),
                queue=spec.source_queue,
                summary=f"Remove Farshore's snapshots of {spec.machine}",
                rules=s.SOURCE_BEST_EFFORT,
            )
        except ActivityError as error:
            return f"its source could not be asked for left-over snapshots: {error_view(error).message}"
        return f"{len(gone.ids)} left-over snapshots removed at the source" if gone.ids else ""

    async def _update(
        self, spec: MachineSpec, update: str, payload: BaseModel, purpose: str
    ) -> MachineStatus:
        return await run_step(
            s.UPDATE_MACHINE,
            m.UpdateCall(
                machine=spec.machine,
                update=update,
                payload=payload.model_dump(mode="json"),
                update_id=f"{purpose} {workflow.info().run_id}",
            ),
            queue=names.CONTROL_QUEUE,
            summary=f"{_RECORDS.get(purpose, f'Record: {purpose}')}: {spec.machine}",
        )

    def _note(self, machine: str, note: str) -> None:
        self._notes[machine] = note
        self._show()

    def _show(self) -> None:
        title = f"**{self._ask.kind.value.capitalize()} {plain(self._ask.plan)}**: {self._phase}"
        rows = (f"**{plain(name)}**: {plain(note)}" for name, note in self._notes.items())
        workflow.set_current_details(page(title, bullets(rows)))


def _is_off(view: ErrorView) -> bool:
    """Whether a refused disable means that there is nothing to disable."""
    if view.code == Code.MACHINE_NOT_PROTECTED:
        return "disabled" in view.details
    return view.code == Code.OPERATION_NOT_ALLOWED and view.details.get("state") == MainState.UNPROTECTED


def _unknown(result: MachineResult) -> MachineResult:
    if result.outcome is not Outcome.SKIPPED:
        return result
    never = FarshoreError(
        Code.MACHINE_NOT_PROTECTED, f"{result.machine} was never protected.", subject=result.machine
    )
    return MachineResult(machine=result.machine, outcome=Outcome.FAILED, error=ErrorView.of(never.info))
