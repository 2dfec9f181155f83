"""The typed client: what another service imports to start and follow runs.

    client = await connect("127.0.0.1:7233")
    run = await client.failover(FailoverInput(plan="crm", kind=RunKind.PLANNED, reason="site maintenance"))
    result = await run.result()

The same JSON works without this client: see docs/contract.md.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Self

from temporalio.client import (
    Client,
    WorkflowExecutionStatus,
    WorkflowFailureError,
    WorkflowHandle,
    WorkflowQueryFailedError,
    WorkflowUpdateFailedError,
)
from temporalio.common import WorkflowIDConflictPolicy
from temporalio.exceptions import ApplicationError, WorkflowAlreadyStartedError
from temporalio.service import RPCError, RPCStatusCode

from farshore.contract import names
from farshore.contract.converter import data_converter
from farshore.contract.errors import error_view
from farshore.contract.machine import MachineStatus
from farshore.contract.runs import (
    Decision,
    ErrorView,
    FailoverInput,
    PointsInput,
    PointView,
    ProtectionInput,
    RunProgress,
    RunResult,
)
from farshore.domain.errors import Code, FarshoreError


class RunFailed(Exception):
    """A run ended without success. `error` says why and what to do; `result` holds what was reached, if anything."""

    def __init__(self, error: ErrorView, result: RunResult | None) -> None:
        super().__init__(error.text())
        self.error = error
        self.result = result


@dataclass(frozen=True, slots=True)
class Run:
    """A started run."""

    id: str
    handle: WorkflowHandle[Any, RunResult]

    async def result(self) -> RunResult:
        """Wait for the end. Raises RunFailed."""
        try:
            return await self.handle.result()
        except WorkflowFailureError as failure:
            raise _run_failed(failure) from None

    async def progress(self) -> RunProgress:
        """What the run does and waits for now."""
        return await self.handle.query("progress", result_type=RunProgress)

    async def decide(self, decision: Decision) -> str:
        """Approve or reject what the run waits for. FarshoreError if that is not pending."""
        return await self._update("decide", decision)

    async def abort(self, decision: Decision) -> str:
        """Stop the run before its next step."""
        return await self._update("abort", decision)

    async def is_running(self) -> bool:
        """Whether the run has not ended."""
        return (await self.handle.describe()).status is WorkflowExecutionStatus.RUNNING

    async def _update(self, name: str, decision: Decision) -> str:
        try:
            return await self.handle.execute_update(name, decision, result_type=str)
        except WorkflowUpdateFailedError as failure:
            raise _as_ours(failure) from None
        except RPCError as error:
            if error.status is RPCStatusCode.NOT_FOUND:
                raise FarshoreError(
                    Code.NO_PENDING_ACTION, f"There is no running run {self.id}; it may have ended."
                ) from None
            raise


class FarshoreClient:
    """Start, follow and answer runs; read the state of machines."""

    def __init__(self, client: Client) -> None:
        self.temporal = client

    @classmethod
    async def connect(cls, address: str, *, namespace: str = "default", **options: Any) -> Self:
        """Connect with our converter. `options` go to temporalio's Client.connect (tls, api_key, …)."""
        return cls(
            await Client.connect(address, namespace=namespace, data_converter=data_converter, **options)
        )

    async def failover(self, ask: FailoverInput, *, id: str | None = None) -> Run:
        """Start a run of a plan. With an `id` of your own the start is idempotent."""
        title = f"{ask.kind.value} of {ask.plan}"
        return await self._start(
            names.FAILOVER, ask, id or names.run_id(ask.plan, ask.kind.value, _stamp()), title
        )

    async def protection(self, ask: ProtectionInput, *, id: str | None = None) -> Run:
        """Protect or disable a plan's machines."""
        title = f"{ask.kind.value} {ask.plan}"
        return await self._start(
            names.PROTECTION, ask, id or names.run_id(ask.plan, ask.kind.value, _stamp()), title
        )

    async def points(self, ask: PointsInput) -> list[PointView]:
        """Recovery points, newest first, machine by machine."""
        try:
            return await self.temporal.execute_workflow(
                names.RECOVERY_POINTS,
                ask,
                id=names.run_id(ask.plan, "points", _stamp()),
                task_queue=names.CONTROL_QUEUE,
                result_type=list[PointView],
            )
        except WorkflowFailureError as failure:
            raise _run_failed(failure) from None

    async def machine(self, machine: str) -> MachineStatus:
        """State of a protected machine. MachineNotProtected if there is none of this name."""
        handle = self.temporal.get_workflow_handle(names.protection_id(machine))
        try:
            return await handle.query("status", result_type=MachineStatus)
        except RPCError as error:
            if error.status is RPCStatusCode.NOT_FOUND:
                raise FarshoreError(
                    Code.MACHINE_NOT_PROTECTED, f"{machine} is not protected.", subject=machine
                ) from None
            raise
        except WorkflowQueryFailedError as error:
            raise FarshoreError(Code.INTERNAL, f"The state of {machine} can't be read: {error}") from None

    async def replication(self, machine: str) -> dict[str, Any]:
        """What the machine's replication loop reports now (stage, newest point, age in seconds); empty if it rests."""
        description = await self.temporal.get_workflow_handle(names.protection_id(machine)).describe()
        for pending in description.raw_description.pending_activities:
            if pending.activity_type.name == "replicate_leg" and pending.HasField("heartbeat_details"):
                values = await self.temporal.data_converter.decode(pending.heartbeat_details.payloads)
                return values[0] if values and isinstance(values[0], dict) else {}
        return {}

    async def machines(self, plan: str = "") -> list[MachineStatus]:
        """All protected machines, or those of a plan."""
        wanted = f"WorkflowType='{names.MACHINE_PROTECTION}' AND ExecutionStatus='Running'"
        if plan:
            wanted += f" AND {names.PLAN.name}={_quoted(plan)}"
        found = [w.id async for w in self.temporal.list_workflows(wanted)]
        return [await self.machine(id.removeprefix(names.protection_id(""))) for id in sorted(found)]

    async def runs(self, plan: str = "", *, running_only: bool = True) -> AsyncIterator[Run]:
        """Runs of plans, newest first."""
        wanted = f"WorkflowType IN ('{names.FAILOVER}', '{names.PROTECTION}')"
        if running_only:
            wanted += " AND ExecutionStatus='Running'"
        if plan:
            wanted += f" AND {names.PLAN.name}={_quoted(plan)}"
        async for found in self.temporal.list_workflows(wanted):
            yield self.run(found.id)

    def run(self, id: str) -> Run:
        """A run by its id."""
        return Run(id, self.temporal.get_workflow_handle(id, result_type=RunResult))

    async def _start(self, workflow: str, ask: Any, id: str, title: str) -> Run:
        reason = f": {ask.reason}" if ask.reason else ""
        try:
            handle = await self.temporal.start_workflow(
                workflow,
                ask,
                id=id,
                task_queue=names.CONTROL_QUEUE,
                id_conflict_policy=WorkflowIDConflictPolicy.FAIL,
                static_summary=f"{title}{reason}"[:200],
                result_type=RunResult,
            )
        except WorkflowAlreadyStartedError:
            raise FarshoreError(
                Code.SCENARIO_IN_PROGRESS, f"A run with the id {id} exists already.", details={"holder": id}
            ) from None
        return Run(id, handle)


def _stamp() -> str:
    now = datetime.now(UTC)
    return f"{now:%Y%m%d-%H%M%S}-{now.microsecond // 1000:03d}"


def _quoted(text: str) -> str:
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"


def _run_failed(failure: WorkflowFailureError) -> RunFailed:
    view = error_view(failure.cause)
    result: RunResult | None = None
    if isinstance(failure.cause, ApplicationError):
        for detail in failure.cause.details:
            if isinstance(detail, dict) and "machines" in detail and "status" in detail:
                result = RunResult.model_validate(detail)
    return RunFailed(view, result)


def _as_ours(failure: WorkflowUpdateFailedError) -> FarshoreError:
    view = error_view(failure.cause)
    return FarshoreError(
        Code(view.code) if view.code in set(Code) else Code.INTERNAL,
        view.message,
        subject=view.subject,
        causes=view.possible_causes or None,
        action=view.recommended_action or None,
        details=view.details,
    )
