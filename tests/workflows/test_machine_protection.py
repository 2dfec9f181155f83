"""MachineProtection: the one writer of a machine's state. Its loop, its lock, its fence, its next run."""

from __future__ import annotations

from collections.abc import AsyncIterator
from datetime import UTC, datetime
from typing import Any

import pytest
import pytest_asyncio
from temporalio.client import WorkflowUpdateFailedError
from temporalio.exceptions import ApplicationError

from farshore.contract import names
from farshore.contract.machine import (
    Abandon,
    Advance,
    Begin,
    FenceKind,
    FenceToken,
    Halt,
    MachineStatus,
    ProtectionState,
    Settle,
    SettleOutcome,
)
from farshore.contract.runs import RunKind
from farshore.domain.errors import Code
from farshore.domain.machine import MachineState, MainState, Operation, ResyncState

from .harness import Harness, eventually, running
from .world import World

pytestmark = pytest.mark.asyncio(loop_scope="session")

RUN = "crm/planned/1"


async def started(lab: Harness, world: World, **policy: Any) -> Any:
    """A MachineProtection in its first state, without a Protection run around it."""
    spec = lab.spec(world, "a", **policy)
    return await lab.temporal.start_workflow(
        names.MACHINE_PROTECTION,
        ProtectionState(spec=spec),
        id=names.protection_id(spec.machine),
        task_queue=names.PROTECTION_QUEUE,
    )


async def enabled(lab: Harness, world: World, **policy: Any) -> Any:
    handle = await started(lab, world, **policy)
    await tell(handle, "begin", Begin(operation=Operation.ENABLE, run="enabling"))
    await tell(handle, "settle", Settle(run="enabling", outcome=SettleOutcome.SUCCESS))
    return handle


async def tell(handle: Any, update: str, payload: object) -> MachineStatus:
    return await handle.execute_update(update, payload, result_type=MachineStatus)


async def refused(handle: Any, update: str, payload: object) -> ApplicationError:
    """The reason for which an update is refused."""
    with pytest.raises(WorkflowUpdateFailedError) as refusal:
        await tell(handle, update, payload)
    assert isinstance(refusal.value.cause, ApplicationError)
    return refusal.value.cause


def token(machine: str, run: str = RUN, **other: Any) -> FenceToken:
    given: dict[str, Any] = {"kind": FenceKind.POWERED_OFF, "evidence": "off", "at": datetime.now(UTC)}
    return FenceToken(machine=machine, run=run, **(given | other))


def count(events: list[str], *wanted: str) -> int:
    return sum(e in wanted for e in events)


# -- the loop ---------------------------------------------------------------------------------------------------------


async def test_the_end_of_initial_replication_makes_a_machine_protected(lab: Harness) -> None:
    world = lab.world(machines=("a",))
    gate = world.hold("replicate_leg")
    handle = await enabled(lab, world)
    await world.reached("replicate_leg")
    assert (await lab.status(world, "a")).state.main is MainState.INITIAL_REPLICATION_IN_PROGRESS
    first = world.calls[-1].value
    assert first.stop_after_first
    gate.open()
    status = await lab.until(world, "a", lambda s: s.state.main is MainState.PROTECTED)
    assert status.newest_point is not None
    await world.reached("replicate_leg", times=2)
    assert not world.calls[-1].value.stop_after_first
    assert "WORKFLOW_TASK_FAILED" not in await lab.events(handle.id)


async def test_a_halt_is_answered_when_the_leg_has_stopped_and_not_before(lab: Harness) -> None:
    world = await lab.protected(machines=("a",))
    handle = lab.protection(world, "a")
    await lab.until(world, "a", lambda s: s.replicating)
    await tell(handle, "begin", Begin(operation=Operation.PLANNED_FAILOVER, run=RUN))
    await tell(handle, "halt", Halt(run=RUN))
    assert not (await lab.status(world, "a")).replicating
    assert world.busy["replicate_leg"] == 0
    # a failed failover lets it replicate again
    await tell(handle, "settle", Settle(run=RUN, outcome=SettleOutcome.FAILURE))
    assert (await lab.until(world, "a", lambda s: s.replicating)).state.main == "PlannedFailoverFailed"


async def test_legs_that_fail_show_in_health_and_are_tried_again(lab: Harness) -> None:
    world = await lab.protected(machines=("a",), leg_seconds=0.2)
    handle = lab.protection(world, "a")
    await tell(handle, "configure", lab.spec(world, "a", leg=0.2))
    world.fail("replicate_leg", "a", Code.SNAPSHOT_FAILED, "the datastore is full")
    status = await lab.until(world, "a", lambda s: s.state.health == "Warning")
    assert status.error is not None
    assert "the datastore is full" in status.error.message
    assert status.state.main is MainState.PROTECTED
    await lab.until(world, "a", lambda s: s.state.health == "Critical")
    world.heal()
    status = await lab.until(world, "a", lambda s: s.state.health == "Normal")
    assert status.error is None


async def test_the_pauses_between_failing_legs_grow(lab: Harness) -> None:
    world = await lab.protected(machines=("a",), leg_seconds=0.1)
    handle = lab.protection(world, "a")
    world.fail("replicate_leg", "a", Code.SNAPSHOT_FAILED)
    await tell(handle, "configure", lab.spec(world, "a", leg=0.1, interval=0.05))

    async def four_pauses() -> bool:
        return count(await lab.events(handle.id), "TIMER_STARTED") >= 4

    await eventually(four_pauses)
    history = await handle.fetch_history()
    pauses = [
        e.timer_started_event_attributes.start_to_fire_timeout.ToTimedelta().total_seconds()
        for e in history.events
        if e.HasField("timer_started_event_attributes")
    ][-4:]
    assert pauses == pytest.approx([0.1, 0.2, 0.4, 0.8])


async def test_an_initial_replication_that_can_never_work_fails_and_can_be_repaired(lab: Harness) -> None:
    world = lab.world(machines=("a",))
    world.fail("replicate_leg", "a", Code.SOURCE_NOT_ELIGIBLE)
    handle = await enabled(lab, world)
    await lab.until(world, "a", lambda s: s.state.main is MainState.INITIAL_REPLICATION_FAILED)
    world.heal()
    status = await tell(handle, "begin", Begin(operation=Operation.REPAIR, run="repairing"))
    assert status.state.main is MainState.INITIAL_REPLICATION_IN_PROGRESS
    assert status.holder == ""
    await lab.until(world, "a", lambda s: s.state.main is MainState.PROTECTED)


async def test_a_repair_compares_in_full_at_once_and_not_after_the_running_leg(lab: Harness) -> None:
    world = await lab.protected(machines=("a",), leg_seconds=3600)
    handle = lab.protection(world, "a")
    await lab.until(world, "a", lambda s: s.replicating)
    world.forget()
    gate = world.hold("replicate_leg")
    await tell(handle, "begin", Begin(operation=Operation.REPAIR, run="repairing"))
    await world.reached("replicate_leg", within=20)
    call = world.calls[-1].value
    assert call.force_full
    assert call.stop_after_first
    refusal = await refused(handle, "begin", Begin(operation=Operation.PLANNED_FAILOVER, run=RUN))
    assert "resynchronised" in refusal.message
    gate.open()
    status = await lab.until(world, "a", lambda s: s.state.resync is ResyncState.COMPLETED)
    assert status.state.health == "Normal"
    await world.reached("replicate_leg", times=2)
    assert not world.calls[-1].value.force_full


# -- the lock ---------------------------------------------------------------------------------------------------------


async def test_a_held_machine_refuses_another_run_and_names_its_holder_without_an_event(lab: Harness) -> None:
    world = await lab.protected(machines=("a",))
    handle = lab.protection(world, "a")
    await tell(handle, "begin", Begin(operation=Operation.TEST_FAILOVER, run=RUN))
    before = count(await lab.events(handle.id), "WORKFLOW_EXECUTION_UPDATE_ACCEPTED")
    for update, payload in (
        ("begin", Begin(operation=Operation.PLANNED_FAILOVER, run="other")),
        ("advance", Advance(run="other")),
        ("settle", Settle(run="other", outcome=SettleOutcome.SUCCESS)),
        ("halt", Halt(run="other")),
    ):
        refusal = await refused(handle, update, payload)
        assert refusal.type == Code.SCENARIO_IN_PROGRESS
        assert RUN in refusal.message
    assert count(await lab.events(handle.id), "WORKFLOW_EXECUTION_UPDATE_ACCEPTED") == before


async def test_abandon_touches_only_the_lock_it_names(lab: Harness) -> None:
    world = await lab.protected(machines=("a",))
    handle = lab.protection(world, "a")
    await tell(handle, "begin", Begin(operation=Operation.TEST_FAILOVER, run=RUN))
    assert (await tell(handle, "abandon", Abandon(holder="other", reason="?"))).holder == RUN
    status = await tell(handle, "abandon", Abandon(holder=RUN, reason="gone"))
    assert status.holder == ""
    assert status.state.test == "Failed"


async def test_updates_with_bad_payloads_are_refused_and_the_machine_goes_on(lab: Harness) -> None:
    world = await lab.protected(machines=("a",))
    handle = lab.protection(world, "a")
    for update, payload, says in (
        ("begin", {"operation": "Explode", "run": "x"}, "operation"),
        ("settle", {"run": "x"}, "outcome: is required"),
        ("advance", "x", "Advance"),
        ("configure", {}, "machine: is required"),
    ):
        assert says in (await refused(handle, update, payload)).message
    assert (await lab.status(world, "a")).state.main is MainState.PROTECTED
    assert "WORKFLOW_TASK_FAILED" not in await lab.events(handle.id)


async def test_settings_of_another_machine_are_refused(lab: Harness) -> None:
    world = await lab.protected(machines=("a", "b"))
    refusal = await refused(lab.protection(world, "a"), "configure", lab.spec(world, "b"))
    assert refusal.type == Code.INVALID_INPUT


# -- the fence --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("operation", [Operation.PLANNED_FAILOVER, Operation.UNPLANNED_FAILOVER])
async def test_no_update_promotes_without_a_fence_token_that_fits(lab: Harness, operation: Operation) -> None:
    world = await lab.protected(machines=("a",))
    machine, handle = world.machine("a"), lab.protection(world, "a")
    await tell(handle, "begin", Begin(operation=operation, run=RUN))
    break_glass = {"kind": FenceKind.BREAK_GLASS}
    for payload in (
        Advance(run=RUN),
        Advance(run=RUN, fence=token("another-machine")),
        Advance(run=RUN, fence=token(machine, "crm/planned/0")),
        Advance(run=RUN, fence=token(machine, **break_glass)),
        Advance(run=RUN, fence=token(machine, **break_glass, approvers=("ann",))),
        Advance(run=RUN, fence=token(machine, **break_glass, approvers=("ann", "ANN"))),
    ):
        assert (await refused(handle, "advance", payload)).type == Code.FENCE_NOT_PROVEN
    settled = await refused(handle, "settle", Settle(run=RUN, outcome=SettleOutcome.SUCCESS))
    assert settled.type == Code.FENCE_NOT_PROVEN
    status = await lab.status(world, "a")
    assert status.state.main.value.endswith("FailoverInitiated")
    assert status.fence is None
    assert status.state.active_location == "Primary"

    status = await tell(handle, "advance", Advance(run=RUN, fence=token(machine)))
    assert status.state.main.value.endswith("FailoverCompleting")
    repeated = await tell(handle, "advance", Advance(run=RUN, fence=token(machine)))
    assert repeated.state == status.state
    status = await tell(handle, "settle", Settle(run=RUN, outcome=SettleOutcome.SUCCESS))
    assert status.state.active_location == "Recovery"


async def test_the_fence_of_an_earlier_failover_does_not_serve_a_second_one(lab: Harness) -> None:
    world = await lab.protected(machines=("a",))
    machine, handle = world.machine("a"), lab.protection(world, "a")
    await lab.run(world, RunKind.PLANNED)
    await lab.run(world, RunKind.CANCEL)
    await tell(handle, "begin", Begin(operation=Operation.UNPLANNED_FAILOVER, run="second"))
    assert (await refused(handle, "advance", Advance(run="second"))).type == Code.FENCE_NOT_PROVEN
    await tell(handle, "advance", Advance(run="second", fence=token(machine, "second")))


# -- repeats, and the next run of the workflow ------------------------------------------------------------------------


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def forgetful() -> AsyncIterator[Harness]:
    """A server that suggests to continue as new after 40 events, as real ones do after 4,096."""
    async with running("--dynamic-config-value", "limit.historyCount.suggestContinueAsNew=40") as harness:
        yield harness


async def renewed(lab: Harness, handle: Any, run_id: str) -> None:
    """Wait until a workflow has continued as new since its run `run_id`."""

    async def is_new() -> bool:
        return (await lab.temporal.get_workflow_handle(handle.id).describe()).run_id != run_id

    await eventually(is_new)


async def test_continue_as_new_keeps_the_state_and_repeats_stay_harmless(forgetful: Harness) -> None:
    lab = forgetful
    world = lab.world(machines=("a",), leg_ends=lambda _call: True)
    machine = world.machine("a")
    handle = await enabled(lab, world)
    await lab.until(world, "a", lambda s: s.state.main is MainState.PROTECTED)

    async def now() -> str:
        return (await lab.temporal.get_workflow_handle(handle.id).describe()).run_id

    # legs end all the time and fill the history; each step below meets a later run of the workflow
    first = await now()
    await renewed(lab, handle, first)
    begin = Begin(operation=Operation.PLANNED_FAILOVER, run=RUN)
    status = await tell(handle, "begin", begin)
    await renewed(lab, handle, await now())
    assert (await tell(handle, "begin", begin)).state == status.state
    assert (await lab.status(world, "a")).holder == RUN
    refusal = await refused(handle, "begin", Begin(operation=Operation.TEST_FAILOVER, run="other"))
    assert refusal.type == Code.SCENARIO_IN_PROGRESS

    await tell(handle, "halt", Halt(run=RUN))
    advance = Advance(run=RUN, fence=token(machine))
    status = await tell(handle, "advance", advance)
    run = await now()
    for _ in range(12):  # repeats themselves fill the history of a machine that rests
        assert (await tell(handle, "advance", advance)).state == status.state
    await renewed(lab, handle, run)
    settle = Settle(run=RUN, outcome=SettleOutcome.SUCCESS)
    status = await tell(handle, "settle", settle)
    assert status.state.main is MainState.PLANNED_COMMIT_PENDING
    run = await now()
    for _ in range(12):
        assert (await tell(handle, "settle", settle)).state == status.state
    await renewed(lab, handle, run)
    kept = await tell(handle, "settle", settle)
    assert kept.state == status.state
    assert kept.fence == status.fence
    assert kept.last_failover_at == status.last_failover_at
    failed = await refused(handle, "settle", Settle(run=RUN, outcome=SettleOutcome.FAILURE))
    assert failed.type == Code.SCENARIO_IN_PROGRESS
    await lab.sweep()


async def test_a_whole_life_passes_through_many_runs_of_the_workflow(forgetful: Harness) -> None:
    lab = forgetful
    world = await lab.protected(machines=("a",), leg_ends=lambda _call: True)
    await lab.run(world, RunKind.TEST)
    await lab.run(world, RunKind.CLEANUP)
    await lab.run(world, RunKind.PLANNED)
    await lab.run(world, RunKind.CANCEL)
    await lab.disable(world)
    assert world.resources == {}
    await lab.sweep()


async def test_a_continued_run_begins_from_the_state_it_was_given(lab: Harness) -> None:
    world = lab.world(machines=("a",))
    state = MachineState(MainState.PLANNED_COMMIT_PENDING)
    given = ProtectionState(spec=lab.spec(world, "a"), state=state, settled=(RUN, "success"))
    handle = await lab.temporal.start_workflow(
        names.MACHINE_PROTECTION,
        given,
        id=names.protection_id(world.machine("a")),
        task_queue=names.PROTECTION_QUEUE,
    )
    status = await tell(handle, "settle", Settle(run=RUN, outcome=SettleOutcome.SUCCESS))
    assert status.state == state
    assert world.asked("replicate_leg") == []
