"""Manual actions and scripts: who may answer, what happens if nobody does, what a failure means."""

from __future__ import annotations

import pytest

from farshore.activities import messages as m
from farshore.contract.runs import Decision, DecisionKind, RunKind, RunStatus
from farshore.domain.errors import Code, FarshoreError

from .harness import Harness, approve, ended_badly, pending

pytestmark = pytest.mark.asyncio(loop_scope="session")

LOOK = {"manual": "Check the database", "instructions": "Count the orders"}


async def test_a_manual_action_holds_the_run_until_a_person_approves(lab: Harness) -> None:
    world = await lab.protected(machines=("a",), actions={"all": {"before": [LOOK]}})
    run = await lab.start(world, RunKind.TEST)
    progress = await pending(run)
    waiting = progress.pending[0]
    assert (waiting.action, waiting.title) == ("check-the-database", "Check the database")
    assert waiting.instructions == "Count the orders"
    assert waiting.until is not None
    assert not world.asked("create_machine")
    answer = await run.decide(approve("check-the-database", "ann", "4711 orders"))
    assert "recorded" in answer
    result = await run.result()
    assert result.status is RunStatus.SUCCEEDED
    assert [(d.by, d.observation) for d in result.decisions] == [("ann", "4711 orders")]
    assert any("Check the database: done" in line for line in result.actions)


async def test_a_rejected_manual_action_stops_any_kind_of_run(lab: Harness) -> None:
    world = await lab.protected(machines=("a",), actions={"all": {"before": [LOOK]}})
    run = await lab.start(world, RunKind.TEST)
    await pending(run)
    await run.decide(
        Decision(action="check-the-database", decision=DecisionKind.REJECT, by="ann", observation="no")
    )
    failure = await ended_badly(run)
    assert failure.error.code == Code.ACTION_REJECTED
    assert "ann" in failure.error.message
    status = await lab.status(world, "a")
    assert status.state.test == "Failed"
    assert status.replicating or status.state.main == "Protected"


async def test_a_manual_action_that_nobody_answers_ends_a_planned_failover(lab: Harness) -> None:
    world = await lab.protected(machines=("a",), shutdown={"before": [LOOK | {"timeout": "1s"}]})
    failure = await lab.fails(world, RunKind.PLANNED)
    assert failure.error.code == Code.ACTION_TIMEOUT
    assert "Check the database" in failure.error.message
    assert (await lab.status(world, "a")).state.main == "Protected"


async def test_a_test_runs_on_when_nobody_answers(lab: Harness) -> None:
    world = await lab.protected(machines=("a",), actions={"all": {"before": [LOOK | {"timeout": "1s"}]}})
    result = await lab.run(world, RunKind.TEST)
    assert result.status is RunStatus.PARTIALLY_SUCCEEDED
    assert [e.code for e in result.errors] == [Code.ACTION_TIMEOUT]


async def test_a_refused_decision_leaves_no_trace_in_history(lab: Harness) -> None:
    world = await lab.protected(machines=("a",), actions={"all": {"before": [LOOK]}})
    run = await lab.start(world, RunKind.TEST)
    await pending(run)
    with pytest.raises(FarshoreError) as refusal:
        await run.decide(approve("something-else", "ann"))
    assert refusal.value.code is Code.NO_PENDING_ACTION
    assert "check-the-database" in str(refusal.value)
    assert not [e for e in await lab.events(run.id) if "UPDATE" in e]
    await run.decide(approve("check-the-database", "ann"))
    assert [e for e in await lab.events(run.id) if "UPDATE" in e]
    await run.result()


async def test_the_same_action_can_stand_twice_in_a_plan(lab: Harness) -> None:
    world = await lab.protected(machines=("a",), actions={"all": {"before": [LOOK], "after": [LOOK]}})
    run = await lab.start(world, RunKind.TEST)
    await pending(run, "check-the-database")
    await run.decide(approve("check-the-database", "ann"))
    await pending(run, "check-the-database-2")
    await run.decide(approve("check-the-database-2", "ann"))
    assert (await run.result()).status is RunStatus.SUCCEEDED


async def test_a_decision_with_a_bad_payload_is_refused_readably_and_harms_nothing(lab: Harness) -> None:
    world = await lab.protected(machines=("a",), actions={"all": {"before": [LOOK]}})
    run = await lab.start(world, RunKind.TEST)
    await pending(run)
    from temporalio.client import WorkflowUpdateFailedError

    with pytest.raises(WorkflowUpdateFailedError) as refusal:
        await run.handle.execute_update("decide", {"action": "check-the-database", "decision": "yes"})
    text = str(refusal.value.cause)
    assert "by: is required" in text
    assert "decision" in text
    assert "approve" in text
    assert "Traceback" not in text
    await run.decide(approve("check-the-database", "ann"))
    assert (await run.result()).status is RunStatus.SUCCEEDED


@pytest.mark.parametrize(
    ("kind", "on_failure", "stops"),
    [
        (RunKind.PLANNED, None, True),
        (RunKind.PLANNED, "continue", False),
        (RunKind.TEST, None, False),
        (RunKind.TEST, "stop", True),
    ],
)
async def test_the_policy_of_a_script_decides_what_its_failure_means(
    lab: Harness, kind: RunKind, on_failure: str | None, stops: bool
) -> None:
    script = {"script": "smoke.sh", "args": ["a b"]} | ({"on_failure": on_failure} if on_failure else {})
    world = await lab.protected(machines=("a",), actions={"all": {"before": [script]}})
    world.scripts["smoke.sh"] = m.ScriptOutput(exit_code=3, stderr="the port is closed")
    run = await lab.start(world, kind)
    if stops:
        failure = await ended_badly(run)
        assert failure.error.code == Code.ACTION_FAILED
        assert "the port is closed" in failure.error.message
        assert "ended with 3" in failure.error.message
    else:
        result = await run.result()
        assert result.status is RunStatus.PARTIALLY_SUCCEEDED
        assert result.errors[0].code == Code.ACTION_FAILED
    call = next(c.value for c in world.calls if c.step == "run_worker_script")
    assert call.args == ("a b",)
    assert call.key.startswith(run.id)  # the same when the step is repeated, another one in another run
    assert call.key.endswith(":boot.all.before.1:smoke.sh")
    assert call.context["machines"] == [world.machine("a")]


async def test_a_guest_script_runs_in_the_recovered_machine(lab: Harness) -> None:
    world = lab.world(machines=("a",))
    after = [{"script": "probe.sh", "where": "guest", "machine": world.machine("a")}]
    group = world.plan.boot[0].model_copy(
        update={"after": type(world.plan.boot[0]).model_validate({"group": "x", "after": after}).after}
    )
    world.plan = world.plan.model_copy(update={"boot": (group,)})
    from farshore.contract.runs import ProtectionInput

    await (await lab.client.protection(ProtectionInput(plan=world.name))).result()
    result = await lab.run(world, RunKind.TEST)
    assert result.status is RunStatus.SUCCEEDED
    call = next(c.value for c in world.calls if c.step == "run_guest_script")
    assert isinstance(call, m.GuestScriptCall)
    assert call.script == "# probe.sh"
    assert call.resource.name == f"{world.machine('a')}-test"


async def test_actions_of_other_kinds_of_run_are_left_out(lab: Harness) -> None:
    world = await lab.protected(machines=("a",), actions={"all": {"before": [LOOK | {"on": ["planned"]}]}})
    result = await lab.run(world, RunKind.TEST)
    assert result.status is RunStatus.SUCCEEDED
    assert result.actions == ()
