"""Test failover, clean-up, change of point, commit, cancel, points; inputs that are wrong."""

from __future__ import annotations

import pytest
from temporalio.client import WorkflowFailureError
from temporalio.exceptions import ApplicationError

from farshore.contract import names
from farshore.contract.client import RunFailed
from farshore.contract.runs import Outcome, PointsInput, ProtectionInput, ProtectionKind, RunKind, RunStatus
from farshore.domain.errors import Code, FarshoreError

from .harness import Harness, by_machine

pytestmark = pytest.mark.asyncio(loop_scope="session")


# -- test and clean-up ------------------------------------------------------------------------------------------------


async def test_a_test_failover_leaves_replication_running_and_its_clean_up_leaves_nothing(
    lab: Harness,
) -> None:
    world = await lab.protected(machines=("a", "b"))
    result = await lab.run(world, RunKind.TEST)
    assert result.status is RunStatus.SUCCEEDED
    assert world.asked("shut_down_source", "prove_source_off", "final_cycle", "fence_replica") == []
    for short in ("a", "b"):
        status = await lab.status(world, short)
        assert (status.state.main, status.state.test) == ("Protected", "WaitingForCompletion")
        assert status.replicating
        assert not status.holder
    created = set(world.resources)
    assert created

    cleaned = await lab.run(world, RunKind.CLEANUP, notes="went well")
    deleted = {r.id for machine in cleaned.machines for r in machine.deleted}
    deleted |= {r.id for r in cleaned.network_deleted}
    assert deleted == created
    assert world.resources == {}
    for short in ("a", "b"):
        status = await lab.status(world, short)
        assert status.state.test in ("None", "MarkedForDeletion")
        assert status.last_test_at is not None


async def test_the_network_of_a_test_goes_with_the_last_machine_that_is_cleaned_up(
    lab: Harness,
) -> None:
    world = await lab.protected(machines=("a", "b"))
    await lab.run(world, RunKind.TEST)
    first = await lab.run(world, RunKind.CLEANUP, machines=(world.machine("a"),))
    assert first.network_deleted == ()
    assert "virtual-network" in {view.kind for view, _ in world.resources.values()}
    result = await lab.run(world, RunKind.CLEANUP, machines=(world.machine("b"),))
    assert [r.kind for r in result.network_deleted] == ["virtual-network"]
    assert world.resources == {}


async def test_a_clean_up_without_any_test_says_so(lab: Harness) -> None:
    world = await lab.protected(machines=("a",))
    failure = await lab.fails(world, RunKind.CLEANUP)
    assert failure.error.code == Code.OPERATION_NOT_ALLOWED
    assert "no test is open" in failure.error.message


async def test_a_failed_clean_up_can_be_repeated(lab: Harness) -> None:
    world = await lab.protected(machines=("a",))
    await lab.run(world, RunKind.TEST)
    world.fail("remove_resources", "a", Code.TARGET_REJECTED)
    await lab.fails(world, RunKind.CLEANUP)
    assert (await lab.status(world, "a")).state.test == "WaitingForCompletion"
    world.heal()
    await lab.run(world, RunKind.CLEANUP)
    assert world.resources == {}


async def test_a_test_runs_on_past_a_failed_machine_and_its_rest_is_cleaned_up(lab: Harness) -> None:
    world = await lab.protected(machines=("a", "b"))
    world.fail("create_machine", "a", Code.QUOTA_EXCEEDED)
    result = await lab.run(world, RunKind.TEST)
    assert result.status is RunStatus.PARTIALLY_SUCCEEDED
    assert (await lab.status(world, "a")).state.test in ("Failed", "CompletionFailed")
    assert (await lab.status(world, "b")).state.test == "WaitingForCompletion"
    await lab.run(world, RunKind.CLEANUP)
    assert world.resources == {}


async def test_a_test_network_that_leads_into_production_is_refused(lab: Harness) -> None:
    world = await lab.protected(machines=("a",), network={"failover": "dr-net", "test": "leaky-net"})
    world.fail("check_isolated", "", Code.NETWORK_NOT_ISOLATED)
    failure = await lab.fails(world, RunKind.TEST)
    assert failure.error.code == Code.NETWORK_NOT_ISOLATED
    assert world.resources == {}


async def test_a_planned_failover_waits_for_the_clean_up_of_a_test(lab: Harness) -> None:
    world = await lab.protected(machines=("a",))
    await lab.run(world, RunKind.TEST)
    failure = await lab.fails(world, RunKind.PLANNED)
    assert failure.error.code == Code.OPERATION_NOT_ALLOWED
    assert "TestCleanup" in failure.error.recommended_action
    assert world.asked("shut_down_source") == []


# -- after a failover -------------------------------------------------------------------------------------------------


async def test_another_point_after_a_planned_failover_needs_a_word_and_a_refusal_changes_nothing(
    lab: Harness,
) -> None:
    world = await lab.protected(machines=("a",))
    older = world.points[world.machine("a")][0].id
    await lab.run(world, RunKind.PLANNED)
    former = set(world.resources)
    failure = await lab.fails(world, RunKind.CHANGE_POINT, point=older)
    assert failure.error.code == Code.DATA_LOSS_NOT_APPROVED
    assert "accept_data_loss" in failure.error.recommended_action
    assert (await lab.status(world, "a")).state.main == "PlannedCommitPending"
    assert set(world.resources) == former

    result = await lab.run(world, RunKind.CHANGE_POINT, point=older, accept_data_loss=True)
    machine = by_machine(world, result)["a"]
    assert machine.point is not None
    assert machine.point.id == older
    assert machine.state == "UnplannedCommitPending"
    standing = [n for n in world.of(test=False) if older in n]
    assert len(standing) == 2
    assert len(world.resources) == 4  # replaced, not added
    assert (await lab.status(world, "a")).point_in_use == machine.point


async def test_a_commit_keeps_one_point_and_ends_replication(lab: Harness) -> None:
    world = await lab.protected(machines=("a",))
    await lab.run(world, RunKind.PLANNED)
    result = await lab.run(world, RunKind.COMMIT)
    assert result.status is RunStatus.SUCCEEDED
    status = await lab.status(world, "a")
    assert status.state.main == "Committed"
    assert not status.replicating
    assert [p.id for p in world.points[world.machine("a")]] == [
        status.newest_point.id if status.newest_point else ""
    ]
    again = await lab.fails(world, RunKind.COMMIT)
    assert "it has no failover to commit" in again.error.message


async def test_a_failed_commit_is_tried_again(lab: Harness) -> None:
    world = await lab.protected(machines=("a",))
    await lab.run(world, RunKind.PLANNED)
    world.fail("keep_only_point", "a", Code.REPLICA_DAMAGED)
    await lab.fails(world, RunKind.COMMIT)
    assert (await lab.status(world, "a")).state.main == "CommitFailoverFailedOnRecovery"
    world.heal()
    assert (await lab.run(world, RunKind.COMMIT)).status is RunStatus.SUCCEEDED
    assert (await lab.status(world, "a")).state.main == "Committed"


async def test_a_cancel_removes_the_recovered_machines_starts_the_sources_and_replicates_again(
    lab: Harness,
) -> None:
    world = await lab.protected(machines=("a", "b"), boot=[("one", ["a"]), ("two", ["b"])])
    await lab.run(world, RunKind.PLANNED)
    world.order.clear()
    result = await lab.run(world, RunKind.CANCEL)
    assert result.status is RunStatus.SUCCEEDED
    assert world.resources == {}
    assert world.off == set()
    # the replicas go first, backwards; then the sources start, in boot order
    assert world.position("remove_resources b", ended=True) < world.position("remove_resources a")
    assert world.position("remove_resources a", ended=True) < world.position("power_on_source a")
    assert world.position("power_on_source a", ended=True) < world.position("power_on_source b")
    for short in ("a", "b"):
        status = await lab.until(world, short, lambda s: s.replicating)
        assert status.state.main == "Protected"
        assert status.fence is None
        assert status.point_in_use is None


async def test_a_cancel_whose_source_does_not_start_can_be_repeated(lab: Harness) -> None:
    world = await lab.protected(machines=("a",))
    await lab.run(world, RunKind.PLANNED)
    world.fail("power_on_source", "a", Code.SOURCE_MACHINE_NOT_FOUND)
    await lab.fails(world, RunKind.CANCEL)
    assert (await lab.status(world, "a")).state.main == "CancelFailoverFailedOnPrimary"
    world.heal()
    assert (await lab.run(world, RunKind.CANCEL)).status is RunStatus.SUCCEEDED
    assert (await lab.status(world, "a")).state.main == "Protected"


async def test_points_are_listed_newest_first(lab: Harness) -> None:
    world = await lab.protected(machines=("a", "b"))
    a = world.machine("a")
    for _ in range(3):
        world.new_point(a)
    found = await lab.client.points(PointsInput(plan=world.name, machines=(a,), limit=2))
    assert [p.id for p in found] == [p.id for p in reversed(world.points[a])][:2]


# -- protect and disable ----------------------------------------------------------------------------------------------


async def test_disable_deletes_the_replica_and_ends_the_machine_workflow(lab: Harness) -> None:
    world = await lab.protected(machines=("a",))
    result = await lab.disable(world)
    assert by_machine(world, result)["a"].state == "Unprotected"
    assert world.machine("a") not in world.points
    final = await lab.protection(world, "a").result()
    assert final["state"]["main"] == "Unprotected"


async def test_a_machine_that_cannot_be_protected_says_why_and_can_be_tried_again(lab: Harness) -> None:
    world = lab.world(machines=("a", "b"))
    world.fail("enable_tracking", "a", Code.SOURCE_NOT_ELIGIBLE, "disk 2 is shared")
    result = await (await lab.client.protection(ProtectionInput(plan=world.name))).result()
    assert result.status is RunStatus.PARTIALLY_SUCCEEDED
    machines = by_machine(world, result)
    assert machines["a"].error is not None
    assert "disk 2 is shared" in machines["a"].error.message
    assert await lab.states(world) == {"a": "EnablingFailed", "b": "Protected"}
    world.heal()
    again = await (await lab.client.protection(ProtectionInput(plan=world.name))).result()
    assert again.status is RunStatus.SUCCEEDED
    outcomes = {k: r.outcome for k, r in by_machine(world, again).items()}
    assert outcomes == {"a": Outcome.SUCCEEDED, "b": Outcome.SKIPPED}


async def test_protect_takes_over_from_a_run_that_died_while_enabling(lab: Harness) -> None:
    world = lab.world(machines=("a",))
    gate = world.hold("enable_tracking")
    first = await lab.client.protection(ProtectionInput(plan=world.name))
    await world.reached("enable_tracking")
    with pytest.raises(RunFailed) as refused:
        await (await lab.client.protection(ProtectionInput(plan=world.name), id=f"{first.id}-2")).result()
    assert refused.value.error.code == Code.SCENARIO_IN_PROGRESS
    assert first.id in refused.value.error.message
    await first.handle.terminate("gone")
    gate.open()
    result = await (await lab.client.protection(ProtectionInput(plan=world.name))).result()
    assert by_machine(world, result)["a"].state == "Protected"
    assert (await lab.status(world, "a")).state.main == "Protected"


async def test_protect_with_nothing_to_wait_for_returns_at_once(lab: Harness) -> None:
    world = lab.world(machines=("a",))
    gate = world.hold("replicate_leg")
    run = await lab.client.protection(ProtectionInput(plan=world.name, wait=False))
    result = await run.result()
    assert by_machine(world, result)["a"].state == "InitialReplicationInProgress"
    gate.open()
    await lab.until(world, "a", lambda s: s.state.main == "Protected")


# -- wrong inputs -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("workflow", "given", "says"),
    [
        (names.FAILOVER, {"plan": "crm", "kind": "live"}, ["kind", "'planned'", "'live'"]),
        (
            names.FAILOVER,
            {"kind": "test", "machine": "db"},
            ["plan: is required", "machine: is not a known field"],
        ),
        (names.FAILOVER, {"plan": "", "kind": "test"}, ["plan", "at least 1 character"]),
        (names.FAILOVER, "crm", ["FailoverInput", "'crm'"]),
        (
            names.FAILOVER,
            {"plan": "p", "kind": "test", "machines": ["a"], "points": {"b": "latest"}},
            ["points names b"],
        ),
        (
            names.FAILOVER,
            {"plan": "p", "kind": "unplanned", "break_glass": [{"by": "Ann"}, {"by": "ann "}]},
            ["different people"],
        ),
        (names.PROTECTION, {"plan": "crm", "kind": "protekt"}, ["kind", "'disable'"]),
        (names.RECOVERY_POINTS, {"plan": "crm", "limit": 0}, ["limit", "greater than or equal to 1"]),
        (names.MACHINE_PROTECTION, {}, ["spec: is required"]),
    ],
)
async def test_a_wrong_input_ends_the_run_at_once_and_says_what_would_be_right(
    lab: Harness, workflow: str, given: object, says: list[str]
) -> None:
    queue = names.PROTECTION_QUEUE if workflow == names.MACHINE_PROTECTION else names.CONTROL_QUEUE
    handle = await lab.temporal.start_workflow(
        workflow, given, id=f"wrong-{lab.world().name}", task_queue=queue
    )
    with pytest.raises(WorkflowFailureError) as failure:
        await handle.result()
    cause = failure.value.cause
    assert isinstance(cause, ApplicationError)
    assert cause.type == Code.INVALID_INPUT
    for words in says:
        assert words in cause.message, cause.message
    last = (await handle.fetch_history()).events[-1]
    shown = last.workflow_execution_failed_event_attributes.failure
    assert shown.stack_trace == ""
    assert "WORKFLOW_TASK_FAILED" not in await lab.events(handle.id)


async def test_an_unknown_plan_or_machine_is_named(lab: Harness) -> None:
    world = await lab.protected(machines=("a",))
    failure = await lab.fails(world, RunKind.TEST, machines=("nobody",))
    assert failure.error.code == Code.MACHINE_UNKNOWN
    assert "nobody" in failure.error.message
    with pytest.raises(RunFailed) as unknown:
        await (await lab.client.protection(ProtectionInput(plan="nowhere"))).result()
    assert unknown.value.error.code == Code.PLAN_NOT_FOUND


async def test_a_machine_that_was_never_protected_is_told_so(lab: Harness) -> None:
    world = lab.world(machines=("a",))
    failure = await lab.fails(world, RunKind.TEST)
    assert failure.error.code == Code.MACHINE_NOT_PROTECTED
    with pytest.raises(RunFailed) as disabling:
        await (
            await lab.client.protection(ProtectionInput(plan=world.name, kind=ProtectionKind.DISABLE))
        ).result()
    assert disabling.value.error.code == Code.MACHINE_NOT_PROTECTED


async def test_one_point_id_for_several_machines_is_refused(lab: Harness) -> None:
    world = await lab.protected(machines=("a", "b"))
    failure = await lab.fails(world, RunKind.TEST, point="p-0000000001-00000000")
    assert failure.error.code == Code.INVALID_INPUT
    assert "one machine" in failure.error.message


async def test_a_run_with_an_id_that_runs_already_is_refused_by_the_client(lab: Harness) -> None:
    world = await lab.protected(machines=("a",))
    gate = world.hold("create_disk")
    run = await lab.start(world, RunKind.TEST, id=f"{world.name}/mine")
    with pytest.raises(FarshoreError) as refusal:
        await lab.start(world, RunKind.TEST, id=run.id)
    assert refusal.value.code is Code.SCENARIO_IN_PROGRESS
    gate.open()
    await run.result()
