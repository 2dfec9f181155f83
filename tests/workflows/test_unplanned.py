"""Unplanned failover: best effort towards the source, never a wait for a dead site, never a promotion without a fence."""

from __future__ import annotations

import time

import pytest

from farshore.activities.signatures import SOURCE_BEST_EFFORT
from farshore.contract.runs import Confirmation, Decision, DecisionKind, Outcome, RunKind, RunStatus
from farshore.domain.errors import Code, FarshoreError

from .harness import Harness, approve, by_machine, ended_badly, pending
from .world import DEAD_QUEUE, World

pytestmark = pytest.mark.asyncio(loop_scope="session")

TWO_PEOPLE = (Confirmation(by="ann", statement="power cut seen"), Confirmation(by="bob"))


async def unproven(lab: Harness, *machines: str) -> World:
    """Protected machines whose source answers, but proves nothing."""
    world = await lab.protected(machines=machines)
    world.fail("shut_down_source", code=Code.SOURCE_UNREACHABLE)
    world.fail("prove_source_off", code=Code.FENCE_NOT_PROVEN)
    return world


async def test_a_reachable_source_is_shut_down_proven_off_and_loses_nothing(lab: Harness) -> None:
    world = await lab.protected(machines=("a",))
    result = await lab.run(world, RunKind.UNPLANNED)
    assert result.status is RunStatus.SUCCEEDED
    machine = by_machine(world, result)["a"]
    assert machine.state == "UnplannedCommitPending"
    assert machine.data_loss_seconds == 0
    assert machine.fence.endswith("is powered off")
    assert world.position("shut_down_source a", ended=True) < world.position("prove_source_off a")
    assert world.position("prove_source_off a", ended=True) < world.position("final_cycle a")
    assert world.position("final_cycle a", ended=True) < world.position("fence_replica a")


async def test_a_dead_site_is_waited_for_once_and_two_people_replace_its_proof(lab: Harness) -> None:
    world = await lab.protected(machines=("a", "b"))
    world.source_queue = DEAD_QUEUE  # its worker died with it
    began = time.monotonic()
    result = await lab.run(world, RunKind.UNPLANNED, break_glass=TWO_PEOPLE)
    took = time.monotonic() - began

    assert result.status is RunStatus.SUCCEEDED
    assert SOURCE_BEST_EFFORT.schedule_to_start is not None
    # one look at the dead site, all machines at once; the rest of the time is the recovery's own
    assert took < 2 * SOURCE_BEST_EFFORT.schedule_to_start
    assert world.asked("shut_down_source", "prove_source_off", "final_cycle") == []
    for machine in result.machines:
        assert machine.state == "UnplannedCommitPending"
        assert machine.fence == "break-glass — ann: power cut seen; bob: confirmed"
        assert machine.point is not None
        assert machine.point.id == world.points[machine.machine][-1].id
        assert machine.data_loss_seconds is not None
        assert machine.data_loss_seconds > 0
    status = await lab.status(world, "a")
    assert status.fence is not None
    assert status.fence.approvers == ("ann", "bob")
    assert not status.replicating


async def test_without_a_wish_to_shut_down_the_source_is_only_asked_for_proof(lab: Harness) -> None:
    world = await lab.protected(machines=("a",))
    world.off.add(world.machine("a"))
    result = await lab.run(world, RunKind.UNPLANNED, shutdown=False)
    assert result.status is RunStatus.SUCCEEDED
    assert world.asked("shut_down_source") == []


async def test_two_different_people_confirm_the_fence_by_updates(lab: Harness) -> None:
    world = await unproven(lab, "a")
    run = await lab.start(world, RunKind.UNPLANNED)
    waiting = (await pending(run, "fence")).pending[0]
    assert waiting.needs == 2
    assert waiting.until is None
    assert world.machine("a") in waiting.instructions
    assert not world.asked("fence_replica", "create_disk")
    assert "1 more" in await run.decide(approve("fence", "Ann"))
    with pytest.raises(FarshoreError) as refusal:
        await run.decide(approve("fence", " ann "))
    assert "different person" in str(refusal.value)
    assert (await pending(run, "fence")).pending[0].given == ("Ann",)
    assert not world.asked("fence_replica", "create_disk")
    await run.decide(approve("fence", "bob"))
    result = await run.result()
    assert result.status is RunStatus.SUCCEEDED
    assert [d.by for d in result.decisions] == ["Ann", "bob"]


async def test_one_confirmation_in_the_input_and_one_by_update_make_two_people(lab: Harness) -> None:
    world = await unproven(lab, "a")
    run = await lab.start(world, RunKind.UNPLANNED, break_glass=TWO_PEOPLE[:1])
    await pending(run, "fence")
    with pytest.raises(FarshoreError):
        await run.decide(approve("fence", "ANN"))
    await run.decide(approve("fence", "bob"))
    assert (await run.result()).status is RunStatus.SUCCEEDED
    fence = (await lab.status(world, "a")).fence
    assert fence is not None
    assert fence.approvers == ("ann", "bob")


@pytest.mark.parametrize("by", ["bob", "ann"])
async def test_a_rejected_fence_promotes_nothing_even_if_the_approver_takes_it_back(
    lab: Harness, by: str
) -> None:
    world = await unproven(lab, "a")
    run = await lab.start(world, RunKind.UNPLANNED)
    await pending(run, "fence")
    await run.decide(approve("fence", "ann"))
    await run.decide(
        Decision(action="fence", decision=DecisionKind.REJECT, by=by, observation="I see it running")
    )
    failure = await ended_badly(run)
    assert failure.error.code == Code.FENCE_NOT_PROVEN
    assert "I see it running" in failure.error.message
    assert world.asked("fence_replica", "create_disk") == []
    assert (await lab.status(world, "a")).state.main == "UnplannedFailoverFailed"


async def test_only_the_unproven_machines_need_people(lab: Harness) -> None:
    world = await lab.protected(machines=("a", "b"))
    world.fail("prove_source_off", "b", Code.FENCE_NOT_PROVEN)
    run = await lab.start(world, RunKind.UNPLANNED)
    waiting = (await pending(run, "fence")).pending[0]
    assert world.machine("b") in waiting.instructions
    assert world.machine("a") not in waiting.instructions
    await run.decide(approve("fence", "ann"))
    await run.decide(approve("fence", "bob"))
    result = by_machine(world, await run.result())
    assert "powered off" in result["a"].fence
    assert "break-glass" in result["b"].fence


async def test_an_unplanned_failover_runs_on_past_a_failed_machine(lab: Harness) -> None:
    world = await lab.protected(machines=("a", "b"), boot=[("one", ["a"]), ("two", ["b"])])
    world.fail("create_machine", "a", Code.QUOTA_EXCEEDED)
    result = await lab.run(world, RunKind.UNPLANNED)
    assert result.status is RunStatus.PARTIALLY_SUCCEEDED
    outcomes = {k: r.outcome for k, r in by_machine(world, result).items()}
    assert outcomes == {"a": Outcome.FAILED, "b": Outcome.SUCCEEDED}
    assert await lab.states(world) == {
        "a": "UnplannedFailoverCompletionFailed",
        "b": "UnplannedCommitPending",
    }
    assert [e.code for e in result.errors] == [Code.QUOTA_EXCEEDED]

    world.heal()
    again = await lab.run(world, RunKind.UNPLANNED)
    assert again.status is RunStatus.SUCCEEDED
    assert set((await lab.states(world)).values()) == {"UnplannedCommitPending"}


async def test_an_unplanned_failover_follows_a_planned_one_that_failed(lab: Harness) -> None:
    world = await lab.protected(machines=("a",))
    world.fail("shut_down_source", "a", Code.SHUTDOWN_FAILED)
    await lab.fails(world, RunKind.PLANNED)
    world.fail("prove_source_off", code=Code.FENCE_NOT_PROVEN)
    result = await lab.run(world, RunKind.UNPLANNED, break_glass=TWO_PEOPLE)
    assert result.status is RunStatus.SUCCEEDED


async def test_a_machine_terminated_by_hand_fails_alone(lab: Harness) -> None:
    world = await lab.protected(machines=("a", "b"))
    gate = world.hold("create_disk", "a")
    run = await lab.start(world, RunKind.UNPLANNED)
    await world.reached("create_disk", "a")
    await lab.temporal.get_workflow_handle(f"{run.id}/{world.machine('a')}").terminate("by hand")
    gate.open()
    result = await run.result()
    assert result.status is RunStatus.PARTIALLY_SUCCEEDED
    outcomes = {k: r.outcome for k, r in by_machine(world, result).items()}
    assert outcomes == {"a": Outcome.FAILED, "b": Outcome.SUCCEEDED}
    # the next run breaks the lock that nobody could give back
    again = await lab.run(world, RunKind.UNPLANNED)
    assert again.status is RunStatus.SUCCEEDED
    assert (await lab.status(world, "a")).state.main == "UnplannedCommitPending"


async def test_a_target_that_is_not_ready_does_not_hold_up_an_unplanned_failover(lab: Harness) -> None:
    world = await lab.protected(machines=("a",))
    world.fail("check_target", "", Code.TARGET_REJECTED)
    assert (await lab.run(world, RunKind.UNPLANNED)).status is RunStatus.SUCCEEDED
