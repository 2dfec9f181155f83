"""The real Temporal dev server with the product's workflows, converter and sandbox; activities are played by a World."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import sys
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

from temporalio.client import Client, WorkflowExecutionStatus, WorkflowHandle
from temporalio.service import RPCError
from temporalio.testing import WorkflowEnvironment
from temporalio.worker import Worker

from farshore.activities.control import ControlActivities
from farshore.activities.support import ErrorInterceptor
from farshore.contract import names
from farshore.contract.client import FarshoreClient, Run, RunFailed
from farshore.contract.converter import data_converter
from farshore.contract.machine import MachineSpec, MachineStatus, ReplicationPolicy
from farshore.contract.runs import (
    Decision,
    FailoverInput,
    MachineResult,
    ProtectionInput,
    ProtectionKind,
    RunKind,
    RunProgress,
    RunResult,
)
from farshore.domain.machine import MainState
from farshore.plans.model import Plan
from farshore.workers.worker import RUNS, workflow_runner
from farshore.workflows.machine_protection import MachineProtection

from .world import SOURCE_QUEUE, TARGET_QUEUE, Stage, World

BIN = Path(sys.executable).parent
# The dev server has one shard, which by default is polled 20 times a second: every step would take 50 ms.
POLL_FLAGS = tuple(
    part
    for queue in ("transfer", "timer", "visibility")
    for part in ("--dynamic-config-value", f"history.{queue}ProcessorMaxPollRPS=1000")
)
FAST = timedelta(milliseconds=100)
_counter = itertools.count(1)

SIMPLE: Mapping[str, Any] = {
    "machines": ("db", "app", "web"),
    "boot": (("data", ("db",)), ("middle", ("app",)), ("front", ("web",))),
}


class NoDirectory:
    """The control activities ask it for queues only when they load plans, which the world does here."""

    def source_queue(self, site: str) -> str:
        return SOURCE_QUEUE

    def target_queue(self, site: str) -> str:
        return TARGET_QUEUE


@dataclass
class Harness:
    """What a test holds."""

    env: WorkflowEnvironment
    client: FarshoreClient
    stage: Stage

    @property
    def temporal(self) -> Client:
        return self.client.temporal

    # -- worlds -------------------------------------------------------------------------------------------------------

    def world(
        self,
        *,
        machines: Sequence[str] = SIMPLE["machines"],
        boot: Sequence[tuple[str, Sequence[str]]] | None = None,
        actions: Mapping[str, Mapping[str, Sequence[Mapping[str, Any]]]] | None = None,
        shutdown: Mapping[str, Any] | None = None,
        network: Mapping[str, Any] | None = None,
        **of_world: Any,
    ) -> World:
        """A plan of its own. `actions`: boot group → {"before": […], "after": […]}."""
        name = f"t{next(_counter)}"
        if boot is None:
            boot = SIMPLE["boot"] if tuple(machines) == SIMPLE["machines"] else [("all", machines)]
        acts = actions or {}
        plan = Plan.model_validate(
            {
                "farshore": 1,
                "plan": name,
                "sites": {"source": "east", "target": "west"},
                "network": network or {"failover": "dr-net"},
                "machines": {f"{name}-{one}": {"target": {"size": "Standard_D2s_v5"}} for one in machines},
                "shutdown": {"guest_timeout": "60s", **(shutdown or {})},
                "boot": [
                    {"group": group, "machines": [f"{name}-{one}" for one in members], **acts.get(group, {})}
                    for group, members in boot
                ],
            }
        )
        return self.stage.add(World(name, plan, **of_world))

    async def protected(self, **of_plan: Any) -> World:
        """A world whose machines are all Protected."""
        world = self.world(**of_plan)
        run = await self.client.protection(ProtectionInput(plan=world.name))
        result = await run.result()
        assert all(r.state == MainState.PROTECTED for r in result.machines), result
        world.forget()
        world.order.clear()
        return world

    async def sweep(self) -> None:
        """End what a test has left running: a leg beats for as long as its machine is protected."""
        for world in self.stage.leave():
            found = [w async for w in self.temporal.list_workflows(f"{names.PLAN.name}='{world.name}'")]
            ids = {w.id for w in found if w.status is WorkflowExecutionStatus.RUNNING}
            ids |= {names.protection_id(machine) for machine in world.plan.machines}
            for id in ids:
                with contextlib.suppress(RPCError):  # it had ended, or never was
                    await self.temporal.get_workflow_handle(id).terminate("the test is over")

    # -- runs ---------------------------------------------------------------------------------------------------------

    async def start(self, world: World, kind: RunKind, *, id: str | None = None, **more: Any) -> Run:
        return await self.client.failover(FailoverInput(plan=world.name, kind=kind, **more), id=id)

    async def run(self, world: World, kind: RunKind, **more: Any) -> RunResult:
        """A run to its good end."""
        return await (await self.start(world, kind, **more)).result()

    async def fails(self, world: World, kind: RunKind, **more: Any) -> RunFailed:
        """A run to its bad end."""
        return await ended_badly(await self.start(world, kind, **more))

    async def disable(self, world: World, *shorts: str) -> RunResult:
        run = await self.client.protection(
            ProtectionInput(
                plan=world.name,
                kind=ProtectionKind.DISABLE,
                machines=tuple(world.machine(one) for one in shorts),
            )
        )
        return await run.result()

    # -- machines -----------------------------------------------------------------------------------------------------

    async def status(self, world: World, short: str) -> MachineStatus:
        return await self.client.machine(world.machine(short))

    async def states(self, world: World) -> dict[str, str]:
        """Machine → main state."""
        found: dict[str, str] = {}
        for machine in world.plan.machines:
            found[world.short(machine)] = (await self.client.machine(machine)).state.main.value
        return found

    async def until(
        self,
        world: World,
        short: str,
        true: Callable[[MachineStatus], bool],
        *,
        within: float = 60.0,
    ) -> MachineStatus:
        """Wait until a machine's status is as wanted."""
        async with asyncio.timeout(within):
            while True:
                status = await self.status(world, short)
                if true(status):
                    return status
                await asyncio.sleep(0.05)

    def protection(self, world: World, short: str) -> WorkflowHandle[Any, Any]:
        return self.temporal.get_workflow_handle(names.protection_id(world.machine(short)))

    def spec(self, world: World, short: str = "db", **policy: Any) -> MachineSpec:
        machine = world.machine(short)
        return MachineSpec(
            machine=machine,
            plan=world.name,
            source=machine,
            source_site="east",
            source_queue=world.source_queue,
            target_site="west",
            target_queue=world.target_queue,
            policy=ReplicationPolicy(**({"interval": 0.05} | policy)),
        )

    async def events(self, id: str, run_id: str | None = None) -> list[str]:
        """Event types of a history, without their prefix."""
        history = await self.temporal.get_workflow_handle(id, run_id=run_id).fetch_history()
        return [_event_name(e.event_type) for e in history.events]


def _event_name(number: int) -> str:
    from temporalio.api.enums.v1 import EventType

    return EventType.Name(number).removeprefix("EVENT_TYPE_")  # type: ignore[arg-type]


async def ended_badly(run: Run) -> RunFailed:
    """The failure of a run that must fail."""
    try:
        result = await run.result()
    except RunFailed as failure:
        return failure
    raise AssertionError(f"the run should have failed, but: {result}")


async def pending(run: Run, action: str = "", *, within: float = 60.0) -> RunProgress:
    """Wait until a run waits for a person."""
    async with asyncio.timeout(within):
        while True:
            progress = await run.progress()
            if any(action in ("", p.action) for p in progress.pending):
                return progress
            await asyncio.sleep(0.05)


async def eventually(true: Callable[[], Awaitable[object]], *, within: float = 60.0) -> None:
    """Wait for a condition."""
    async with asyncio.timeout(within):
        while not await true():  # noqa: ASYNC110  the condition lives in another process
            await asyncio.sleep(0.05)


def by_machine(world: World, result: RunResult | None) -> dict[str, MachineResult]:
    """Results under the short names."""
    assert result is not None
    return {world.short(r.machine): r for r in result.machines}


def approve(action: str, by: str, observation: str = "") -> Decision:
    return Decision(action=action, by=by, observation=observation)


@contextlib.asynccontextmanager
async def workers(client: Client, stage: Stage, *, slots: int = 100) -> AsyncGenerator[None]:
    """The control worker, the protection worker and one worker for each living site."""
    playing = stage.activities()
    shared: dict[str, Any] = {"interceptors": [ErrorInterceptor()]}
    playing_with = shared | {
        "activities": playing,
        "max_heartbeat_throttle_interval": FAST,
        "default_heartbeat_throttle_interval": FAST,
        "max_concurrent_activities": slots,
        "graceful_shutdown_timeout": timedelta(0),
    }
    runner = workflow_runner()
    async with contextlib.AsyncExitStack() as stack:
        for worker in (
            Worker(
                client,
                task_queue=names.CONTROL_QUEUE,
                workflows=list(RUNS),
                workflow_runner=runner,
                disable_eager_activity_execution=True,
                **playing_with,
            ),
            Worker(
                client,
                task_queue=names.PROTECTION_QUEUE,
                workflows=[MachineProtection],
                workflow_runner=runner,
                **shared,
            ),
            Worker(client, task_queue=SOURCE_QUEUE, **playing_with),
            Worker(client, task_queue=names.legs_queue(SOURCE_QUEUE), **playing_with),
            Worker(client, task_queue=TARGET_QUEUE, **playing_with),
        ):
            await stack.enter_async_context(worker)
        yield


@contextlib.asynccontextmanager
async def running(*more_flags: str, slots: int = 100) -> AsyncIterator[Harness]:
    """Server, workers and an empty stage."""
    env = await WorkflowEnvironment.start_local(
        data_converter=data_converter,
        dev_server_existing_path=str(BIN / "temporal"),
        search_attributes=names.SEARCH_ATTRIBUTES,
        dev_server_extra_args=[*POLL_FLAGS, *more_flags],
    )
    async with env:
        control = ControlActivities(env.client, Path("unused"), NoDirectory())
        stage = Stage(control)
        async with workers(env.client, stage, slots=slots):
            harness = Harness(env, FarshoreClient(env.client), stage)
            try:
                yield harness
            finally:
                await harness.sweep()  # a worker waits for its activities, and legs go on for an hour
