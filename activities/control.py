"""Steps that touch no site: plans, machine state, scripts on a worker. Run by the control worker."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
from pathlib import Path
from typing import Any, Protocol

from temporalio import activity
from temporalio.client import Client, WorkflowExecutionStatus, WorkflowUpdateFailedError
from temporalio.common import (
    SearchAttributePair,
    TypedSearchAttributes,
    WorkflowIDConflictPolicy,
    WorkflowIDReusePolicy,
)
from temporalio.exceptions import ApplicationError
from temporalio.service import RPCError, RPCStatusCode

from farshore.activities import messages as m
from farshore.activities import signatures as s
from farshore.activities.support import beating
from farshore.contract import names
from farshore.contract.machine import MachineSpec, MachineStatus, ProtectionState
from farshore.contract.runs import ErrorView
from farshore.domain.errors import Code, FarshoreError
from farshore.plans.catalog import read_plan

_KEPT_OUTPUT = 4000  # characters of a script's output that go into history


class Directory(Protocol):
    """What the control worker knows of sites: the queue of each."""

    def source_queue(self, site: str) -> str: ...
    def target_queue(self, site: str) -> str: ...


class ControlActivities:
    """Bound to the Temporal client, the plans folder and the directory of sites."""

    def __init__(
        self, client: Client, plans: Path, directory: Directory, *, leg_seconds: float = 3600.0
    ) -> None:
        self._client = client
        self._plans = plans
        self._directory = directory
        self._leg_seconds = leg_seconds

    @activity.defn(name=s.LOAD_PLAN.name)
    async def load_plan(self, call: m.LoadPlan) -> m.PinnedPlan:
        """Read, check and pin a plan."""
        loaded = await asyncio.to_thread(read_plan, self._plans, call.plan)
        unknown = [name for name in call.machines if name not in loaded.plan.machines]
        if unknown:
            raise FarshoreError(
                Code.MACHINE_UNKNOWN,
                f"Plan {call.plan} has no machine {', '.join(unknown)}; it has {', '.join(loaded.plan.machines)}.",
                subject=call.plan,
            )
        return m.PinnedPlan(
            plan=loaded.plan,
            sha256=loaded.sha256,
            source_queue=self._directory.source_queue(loaded.plan.sites.source),
            target_queue=self._directory.target_queue(loaded.plan.sites.target),
            leg_seconds=self._leg_seconds,
        )

    @activity.defn(name=s.START_PROTECTION.name)
    async def start_protection(self, call: m.StartProtection) -> MachineStatus:
        """Start the machine's protection workflow unless it runs."""
        spec = call.spec
        handle = await self._client.start_workflow(
            names.MACHINE_PROTECTION,
            ProtectionState(spec=spec),
            id=names.protection_id(spec.machine),
            task_queue=names.PROTECTION_QUEUE,
            id_reuse_policy=WorkflowIDReusePolicy.ALLOW_DUPLICATE,
            id_conflict_policy=WorkflowIDConflictPolicy.USE_EXISTING,
            static_summary=f"Protection of {spec.machine}",
            search_attributes=_attributes(spec),
        )
        return await handle.query("status", result_type=MachineStatus)

    @activity.defn(name=s.UPDATE_MACHINE.name)
    async def update_machine(self, call: m.UpdateCall) -> MachineStatus:
        """Send an Update to the one writer of a machine's state. A lock held by a run that has ended is broken."""
        try:
            return await self._update(call)
        except ApplicationError as error:
            holder = _holder(error)
            if error.type != Code.SCENARIO_IN_PROGRESS.value or not holder or await self._is_running(holder):
                raise
            activity.logger.warning("%s is held by %s, which has ended: taking over", call.machine, holder)
            await self._update(
                m.UpdateCall(
                    machine=call.machine,
                    update="abandon",
                    payload={"holder": holder, "reason": f"{holder} ended without settling {call.machine}"},
                    update_id=f"abandon {call.update_id}",
                )
            )
            return await self._update(call)

    async def _update(self, call: m.UpdateCall) -> MachineStatus:
        handle = self._client.get_workflow_handle(names.protection_id(call.machine))
        try:
            return await handle.execute_update(
                call.update, call.payload, id=call.update_id, result_type=MachineStatus
            )
        except WorkflowUpdateFailedError as error:
            if isinstance(error.cause, ApplicationError):
                raise error.cause from None
            raise
        except RPCError as error:
            if error.status is RPCStatusCode.NOT_FOUND:
                raise await self._not_protected(call.machine) from None
            raise FarshoreError(
                Code.TEMPORAL_UNREACHABLE, f"Temporal answered {error.status.name}."
            ) from error

    async def _not_protected(self, machine: str) -> FarshoreError:
        """Why no protection workflow of a machine answers: it never began, was disabled, or was ended by hand and has
        left its replica. `details["disabled"]` tells the second from the rest."""
        try:
            description = await self._client.get_workflow_handle(names.protection_id(machine)).describe()
            ended = description.status
        except RPCError as error:
            if error.status is not RPCStatusCode.NOT_FOUND:
                raise
            ended = None
        if ended in (None, WorkflowExecutionStatus.COMPLETED):
            disabled = ended is not None
            return FarshoreError(
                Code.MACHINE_NOT_PROTECTED,
                f"{machine} is not protected{': its protection was disabled' if disabled else ''}.",
                subject=machine,
                details={"disabled": disabled},
            )
        return FarshoreError(
            Code.MACHINE_NOT_PROTECTED,
            f"{machine} is not protected: its workflow {names.protection_id(machine)} was ended from outside "
            f"({ended.name.lower()}). Its replica may still be there.",
            subject=machine,
            causes=("Somebody terminated the workflow in Temporal.",),
            action="Run protect for it; to delete the replica, run disable after that.",
            details={"ended_by_hand": True},
        )

    async def _is_running(self, holder: str) -> bool:
        """Whether the very run that holds a lock goes on (a reset run is the same one, a new run of the same id is not)."""
        id = names.holder_id(holder)
        try:
            description = await self._client.get_workflow_handle(id).describe()
        except RPCError as error:
            if error.status is RPCStatusCode.NOT_FOUND:
                return False
            raise
        first = description.raw_description.workflow_execution_info.first_run_id
        return description.close_time is None and holder in (id, names.lock_holder(id, first))

    @activity.defn(name=s.MACHINE_STATUS.name)
    async def machine_status(self, call: m.StatusCall) -> m.StatusList:
        """The status of machines; one that is not protected is listed as missing."""
        found: dict[str, dict[str, object]] = {}
        missing: dict[str, ErrorView] = {}
        for name in call.machines:
            handle = self._client.get_workflow_handle(names.protection_id(name))
            try:
                status = await handle.query("status", result_type=MachineStatus)
            except RPCError as error:
                if error.status is not RPCStatusCode.NOT_FOUND:
                    raise
                gone = FarshoreError(Code.MACHINE_NOT_PROTECTED, f"{name} is not protected.", subject=name)
                missing[name] = ErrorView.of(gone.info)
            else:
                found[name] = status.model_dump(mode="json")
        return m.StatusList(found=found, missing=missing)

    @activity.defn(name=s.READ_SCRIPT.name)
    async def read_script(self, call: m.ReadScript) -> str:
        """The text of a script of the plans folder's `scripts/`, to be run in a guest."""
        return await asyncio.to_thread(self._script_path(call.script).read_text, encoding="utf-8")

    def _script_path(self, script: str) -> Path:
        folder = (self._plans / "scripts").resolve()
        path = (folder / script).resolve()
        if not path.is_relative_to(folder) or not path.is_file():
            raise FarshoreError(
                Code.ACTION_FAILED,
                f"Script {script} is not in the plans folder's scripts/.",
                subject=script,
                causes=("The file is missing on the control worker.", "The path leads out of scripts/."),
            )
        return path

    @activity.defn(name=s.RUN_WORKER_SCRIPT.name)
    async def run_worker_script(self, call: m.WorkerScript) -> m.ScriptOutput:
        """Run a script of the plans folder's `scripts/`. It gets its context as FARSHORE_… variables and as JSON on
        standard input, and an idempotency key that stays the same when the step is repeated."""
        path = self._script_path(call.script)
        environment = {
            "PATH": os.environ.get("PATH", "/usr/bin:/bin"),
            "FARSHORE_PLAN": call.plan,
            "FARSHORE_RUN": call.run,
            "FARSHORE_KIND": call.kind,
            "FARSHORE_ACTION": call.action,
            "FARSHORE_IDEMPOTENCY_KEY": call.key,
        }
        async with beating():
            process = await _start(
                str(path),
                *call.args,
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.PIPE,
                env=environment,
                cwd=path.parent,
                start_new_session=True,
            )
            try:
                async with asyncio.timeout(call.timeout):
                    out, err = await process.communicate(json.dumps(call.context).encode())
            except TimeoutError:
                raise FarshoreError(
                    Code.ACTION_TIMEOUT,
                    f"Script {call.script} did not end within {call.timeout:.0f} s and was stopped.",
                    subject=call.action,
                ) from None
            finally:
                if process.returncode is None:
                    with contextlib.suppress(ProcessLookupError):
                        os.killpg(process.pid, signal.SIGKILL)
                    await process.wait()
        return m.ScriptOutput(
            exit_code=process.returncode or 0,
            stdout=out.decode(errors="replace")[-_KEPT_OUTPUT:],
            stderr=err.decode(errors="replace")[-_KEPT_OUTPUT:],
        )


async def _start(*command: str, **options: Any) -> asyncio.subprocess.Process:
    try:
        return await asyncio.create_subprocess_exec(*command, **options)
    except OSError as error:
        raise FarshoreError(
            Code.ACTION_FAILED,
            f"Script {Path(command[0]).name} can't be started: {error.strerror}.",
            causes=("It is not executable, or its first line names no interpreter of this machine.",),
        ) from None


def _attributes(spec: MachineSpec) -> TypedSearchAttributes:
    return TypedSearchAttributes(
        [
            SearchAttributePair(names.PLAN, spec.plan),
            SearchAttributePair(names.MACHINE, spec.machine),
            SearchAttributePair(names.SITE, spec.source_site),
            SearchAttributePair(names.KIND, "protection"),
        ]
    )


def _holder(error: ApplicationError) -> str:
    for detail in error.details:
        if isinstance(detail, dict):
            inner = detail.get("details")
            if isinstance(inner, dict) and isinstance(inner.get("holder"), str):
                return inner["holder"]
    return ""
