"""The typed client, as another service uses it, against real workflows."""

from __future__ import annotations

import pytest

from farshore.contract import names
from farshore.contract.client import FarshoreClient
from farshore.contract.runs import FailoverInput, ProtectionInput, RunKind, RunStatus
from farshore.domain.errors import Code, FarshoreError

from ..workflows.harness import Harness, approve, ended_badly, eventually, pending  # noqa: TID252  tests are no installed package

pytestmark = pytest.mark.asyncio(loop_scope="session")


async def test_a_run_is_started_followed_answered_and_awaited(lab: Harness) -> None:
    address = lab.temporal.service_client.config.target_host
    client = await FarshoreClient.connect(address)
    world = await lab.protected(machines=("a",), actions={"all": {"before": [{"manual": "Look"}]}})
    run = await client.failover(
        FailoverInput(plan=world.name, kind=RunKind.TEST, reason="drill"),
    )
    assert run.id.startswith(f"{world.name}/test/")
    progress = await pending(run)
    assert (progress.plan, progress.kind) == (world.name, "test")
    assert progress.machines[0].machine == world.machine("a")
    assert await run.is_running()
    again = client.run(run.id)
    await again.decide(approve("look", "ann"))
    result = await again.result()
    assert result.status is RunStatus.SUCCEEDED
    assert result == await run.result()
    assert not await run.is_running()
    with pytest.raises(FarshoreError) as late:
        await run.decide(approve("look", "bob"))
    assert late.value.code is Code.NO_PENDING_ACTION


async def test_a_failed_run_tells_why_what_to_do_and_what_was_reached(lab: Harness) -> None:
    world = await lab.protected(machines=("a",))
    world.fail("create_machine", "a", Code.QUOTA_EXCEEDED)
    failure = await ended_badly(await lab.start(world, RunKind.PLANNED))
    assert failure.error.code == Code.QUOTA_EXCEEDED
    assert failure.error.recommended_action in str(failure)
    assert failure.error.subject == world.machine("a")
    assert failure.result is not None
    assert failure.result.machines[0].state == "PlannedFailoverCompletionFailed"


async def test_machines_and_their_replication_are_read(lab: Harness) -> None:
    world = await lab.protected(machines=("a", "b"))

    async def listed() -> bool:  # visibility follows a moment later
        return len(await lab.client.machines(world.name)) == 2

    await eventually(listed)
    found = await lab.client.machines(world.name)
    assert [m.machine for m in found] == [world.machine("a"), world.machine("b")]
    assert found[0].allowed_operations

    async def beating() -> bool:
        return bool(await lab.client.replication(world.machine("a")))

    await eventually(beating)
    with pytest.raises(FarshoreError) as unknown:
        await lab.client.machine("nobody")
    assert unknown.value.code is Code.MACHINE_NOT_PROTECTED


async def test_runs_of_a_plan_are_listed(lab: Harness) -> None:
    world = await lab.protected(machines=("a",))
    gate = world.hold("create_disk")
    run = await lab.start(world, RunKind.TEST)

    async def listed() -> bool:
        return [r.id async for r in lab.client.runs(world.name)] == [run.id]

    await eventually(listed)
    gate.open()
    await run.result()

    async def both() -> bool:
        return len([r async for r in lab.client.runs(world.name, running_only=False)]) == 2

    await eventually(both)
    assert [r async for r in lab.client.runs("it's \\ nothing")] == []


async def test_the_same_json_works_without_the_client(lab: Harness) -> None:
    world = lab.world(machines=("a",))
    handle = await lab.temporal.start_workflow(
        names.PROTECTION, {"plan": world.name}, id=f"{world.name}-json", task_queue=names.CONTROL_QUEUE
    )
    result = await handle.result()
    assert result["status"] == "Succeeded"
    assert result["machines"][0]["state"] == "Protected"


async def test_a_protection_start_is_idempotent_by_its_id(lab: Harness) -> None:
    world = lab.world(machines=("a",))
    gate = world.hold("enable_tracking")
    run = await lab.client.protection(ProtectionInput(plan=world.name), id=f"{world.name}/p")
    with pytest.raises(FarshoreError) as refusal:
        await lab.client.protection(ProtectionInput(plan=world.name), id=run.id)
    assert refusal.value.info.details["holder"] == run.id
    gate.open()
    await run.result()
