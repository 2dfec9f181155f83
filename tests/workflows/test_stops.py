"""Stops and cancellations at bad moments: every machine is settled, and one that runs is recorded as running."""

from __future__ import annotations

import asyncio

import pytest

from farshore.contract import names
from farshore.contract.client import Run
from farshore.contract.runs import Outcome, RunKind
from farshore.domain.errors import Code

from .harness import Harness, approve, by_machine, ended_badly, eventually
from .world import Gate, World

pytestmark = pytest.mark.asyncio(loop_scope="session")


async def settling(lab: Harness) -> tuple[World, Run, Gate]:
    """A planned failover of two machines that was stopped; both are just about to settle, and are held there."""
    world = await lab.protected(machines=("a", "b"))
    shutdown = world.hold("shut_down_source")
    settle = world.hold("update_machine:settle")
    run = await lab.start(world, RunKind.PLANNED)
    await world.reached("shut_down_source", times=2)
    await run.abort(approve("stop", "ann", "wrong day"))
    shutdown.open()

    async def both() -> bool:
        return settle.waiting == 2

    await eventually(both)
    return world, run, settle


async def cancelled(lab: Harness, id: str) -> None:
    """Cancel a workflow and wait until it has been told."""
    await lab.temporal.get_workflow_handle(id).cancel()

    async def told() -> bool:
        events = await lab.events(id)
        asked = events.index("WORKFLOW_EXECUTION_CANCEL_REQUESTED")
        return "WORKFLOW_TASK_COMPLETED" in events[asked:]

    await eventually(told)


async def all_settled(lab: Harness, world: World) -> None:
    for short in ("a", "b"):
        status = await lab.status(world, short)
        assert (status.state.main, status.holder) == ("PlannedFailoverFailed", "")


async def test_a_run_that_is_cancelled_while_its_machines_settle_waits_for_them_and_tells_how_they_are(
    lab: Harness,
) -> None:
    world, run, settle = await settling(lab)
    await cancelled(lab, run.id)
    settle.open()
    failure = await ended_badly(run)
    assert failure.error.code == Code.RUN_ABORTED
    assert "wrong day" in failure.error.message
    results = by_machine(world, failure.result)
    assert {r.outcome for r in results.values()} == {Outcome.STOPPED}
    assert {r.state for r in results.values()} == {"PlannedFailoverFailed"}
    await all_settled(lab, world)


async def test_a_group_that_is_cancelled_while_its_machines_settle_waits_for_them(lab: Harness) -> None:
    world, run, settle = await settling(lab)
    await cancelled(lab, f"{run.id}/group/all")
    settle.open()
    failure = await ended_badly(run)
    results = by_machine(world, failure.result)
    assert {r.outcome for r in results.values()} == {Outcome.STOPPED}
    assert {r.state for r in results.values()} == {"PlannedFailoverFailed"}
    await all_settled(lab, world)


async def test_a_machine_that_is_cancelled_while_it_settles_is_settled(lab: Harness) -> None:
    world, run, settle = await settling(lab)
    await cancelled(lab, f"{run.id}/{world.machine('a')}")
    settle.open()
    failure = await ended_badly(run)
    results = by_machine(world, failure.result)
    assert {r.outcome for r in results.values()} == {Outcome.STOPPED}
    await all_settled(lab, world)


async def test_a_group_that_is_cancelled_by_hand_stops_its_machines_before_their_next_step(
    lab: Harness,
) -> None:
    world = await lab.protected(machines=("a", "b"))
    gate = world.hold("shut_down_source")
    run = await lab.start(world, RunKind.PLANNED)
    await world.reached("shut_down_source", times=2)
    await cancelled(lab, f"{run.id}/group/all")
    gate.open()
    failure = await ended_badly(run)
    assert "group was cancelled" in failure.error.message
    assert not world.asked("final_cycle", "create_disk")
    await all_settled(lab, world)


@pytest.mark.parametrize("how", ["abort", "cancel", "cancel the group"])
async def test_a_machine_that_has_booted_is_recorded_as_running_though_the_run_was_stopped_meanwhile(
    lab: Harness, how: str
) -> None:
    world = await lab.protected(machines=("a",))
    gate = world.hold("wait_until_running", "a")
    run = await lab.start(world, RunKind.PLANNED)
    await world.reached("wait_until_running", "a")
    match how:
        case "abort":
            await run.abort(approve("stop", "ann"))
        case "cancel":
            await cancelled(lab, run.id)
        case _:
            await cancelled(lab, f"{run.id}/group/all")
    child = f"{run.id}/{world.machine('a')}"

    async def told() -> bool:
        return "WORKFLOW_EXECUTION_SIGNALED" in (await lab.events(child))[-6:]

    await eventually(told)
    gate.open()
    if how == "cancel the group":
        await asyncio.wait_for(run.handle.result(), 60)
    else:
        await ended_badly(run)
    status = await lab.status(world, "a")
    assert (status.state.main, status.holder) == ("PlannedCommitPending", "")
    assert [r.kind for r in status.recovered][-1] == "machine"


async def test_no_disk_is_still_being_made_when_a_machine_settles(lab: Harness) -> None:
    world = await lab.protected(machines=("a",))
    slow = world.hold("create_disk:1", "a")
    world.fail("create_disk:0", "a", Code.QUOTA_EXCEEDED)
    run = await lab.start(world, RunKind.PLANNED)
    child = f"{run.id}/{world.machine('a')}"

    async def failed() -> list[str]:
        """What the machine's workflow did since a disk failed."""
        events = await lab.events(child)
        if "ACTIVITY_TASK_FAILED" not in events:
            return []
        since = events[events.index("ACTIVITY_TASK_FAILED") :]
        return since if "WORKFLOW_TASK_COMPLETED" in since else []

    await world.reached("create_disk", "a", times=2)
    await eventually(failed)
    assert "ACTIVITY_TASK_SCHEDULED" not in await failed()
    slow.open()
    await ended_badly(run)
    assert world.position("create_disk a:1", ended=True) < world.position("update_machine a:settle")


async def test_a_cancel_of_a_machines_protection_is_not_heard(lab: Harness) -> None:
    world = await lab.protected(machines=("a",))
    await lab.until(world, "a", lambda s: s.replicating)
    world.forget()
    await cancelled(lab, names.protection_id(world.machine("a")))
    await world.reached("replicate_leg")
    status = await lab.until(world, "a", lambda s: s.replicating)
    assert status.state.main == "Protected"
    assert (await lab.disable(world)).status == "Succeeded"
