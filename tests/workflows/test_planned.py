"""Planned failover: the order of its steps, where it stops, and what a rerun does."""

from __future__ import annotations

import itertools

import pytest

from farshore.activities import messages as m
from farshore.contract import names
from farshore.contract.runs import Outcome, RunKind, RunStatus
from farshore.domain.errors import Code

from .harness import Harness, approve, by_machine, ended_badly, pending
from .world import World

pytestmark = pytest.mark.asyncio(loop_scope="session")

MACHINES = ("db", "app", "web")
NAMED = {"Protected", "PlannedFailoverFailed", "PlannedFailoverCompletionFailed", "PlannedCommitPending"}


def before(world: World, first: str, then: str) -> bool:
    """`first` had ended when `then` began."""
    return world.position(first, ended=True) < world.position(then)


async def test_every_step_of_a_planned_failover_comes_in_its_order(lab: Harness) -> None:
    world = await lab.protected(
        actions={"middle": {"before": [{"script": "before.sh"}], "after": [{"script": "after.sh"}]}},
        shutdown={"before": [{"script": "drain.sh"}], "after": [{"script": "drained.sh"}]},
    )
    result = await lab.run(world, RunKind.PLANNED, reason="maintenance")

    assert result.status is RunStatus.SUCCEEDED
    assert set((await lab.states(world)).values()) == {"PlannedCommitPending"}
    for machine in by_machine(world, result).values():
        assert machine.outcome is Outcome.SUCCEEDED
        assert machine.data_loss_seconds == 0
        assert machine.point is not None
        assert machine.point.final
        assert len(machine.made) == 4  # two disks, an interface, the machine

    # locks of all before anything is done to any source
    for a, b in itertools.product(MACHINES, MACHINES):
        assert before(world, f"update_machine {a}:begin", f"shut_down_source {b}")
    # the front goes down first
    assert world.asked("shut_down_source") == [f"shut_down_source {x}" for x in ("web", "app", "db")]
    assert before(world, "shut_down_source web", "shut_down_source app")
    assert before(world, "shut_down_source app", "shut_down_source db")
    # each machine: replication stops, the source is proven off, its last changes are copied
    for x in MACHINES:
        assert before(world, f"update_machine {x}:halt", f"prove_source_off {x}")
        assert before(world, f"prove_source_off {x}", f"final_cycle {x}")
        assert before(world, f"fence_replica {x}", f"update_machine {x}:advance")
        assert before(world, f"update_machine {x}:advance", f"create_disk {x}:0")
    # the barrier: nothing is promoted before the last change of every machine is safe
    for a, b in itertools.product(MACHINES, MACHINES):
        assert before(world, f"shut_down_source {a}", f"final_cycle {b}")
        assert before(world, f"final_cycle {a}", f"fence_replica {b}")
        assert before(world, f"create_nic {a}", f"create_machine {b}")
    # boot groups in order, each after the one before has started
    assert before(world, "wait_until_running db", "create_machine app")
    assert before(world, "wait_until_running app", "create_machine web")
    # actions stand around what they belong to
    scripts = [c.value.script for c in world.calls if isinstance(c.value, m.WorkerScript)]
    assert scripts == ["drain.sh", "drained.sh", "before.sh", "after.sh"]
    begun = [i for i, line in enumerate(world.order) if line == "begin run_worker_script"]
    assert begun[0] < world.position("shut_down_source web")
    assert world.position("shut_down_source db", ended=True) < begun[1] < world.position("final_cycle db")
    assert (
        world.position("wait_until_running db", ended=True) < begun[2] < world.position("create_machine app")
    )
    assert (
        world.position("wait_until_running app", ended=True) < begun[3] < world.position("create_machine web")
    )


async def test_disks_of_all_machines_are_made_at_the_same_time(lab: Harness) -> None:
    world = await lab.protected(machines=("a", "b"))
    gate = world.hold("create_disk")
    run = await lab.start(world, RunKind.PLANNED)
    await world.reached("create_disk", times=4)
    gate.open()
    await run.result()
    assert world.busiest["create_disk"] == 4


async def test_the_shutdown_order_may_be_parallel(lab: Harness) -> None:
    world = await lab.protected(
        machines=("a", "b"), boot=[("one", ["a"]), ("two", ["b"])], shutdown={"order": "parallel"}
    )
    gate = world.hold("shut_down_source")
    run = await lab.start(world, RunKind.PLANNED)
    await world.reached("shut_down_source", times=2)
    gate.open()
    assert (await run.result()).status is RunStatus.SUCCEEDED


@pytest.mark.parametrize(
    ("step", "code", "failed_state"),
    [
        ("inspect_source", Code.SOURCE_MACHINE_NOT_FOUND, "PlannedFailoverFailed"),
        ("shut_down_source", Code.SHUTDOWN_FAILED, "PlannedFailoverFailed"),
        ("final_cycle", Code.SOURCE_NOT_ELIGIBLE, "PlannedFailoverFailed"),
        ("prove_source_off", Code.FENCE_NOT_PROVEN, "PlannedFailoverFailed"),
        ("fence_replica", Code.REPLICA_DAMAGED, "PlannedFailoverFailed"),
        ("create_disk", Code.QUOTA_EXCEEDED, "PlannedFailoverCompletionFailed"),
        ("create_machine", Code.CAPACITY_EXHAUSTED, "PlannedFailoverCompletionFailed"),
    ],
)
async def test_a_planned_failover_stops_at_the_first_error_and_names_every_state(
    lab: Harness, step: str, code: Code, failed_state: str
) -> None:
    world = await lab.protected(machines=("a", "b"), boot=[("one", ["a"]), ("two", ["b"])])
    world.fail(step, "a", code, f"{step} of a fails")
    failure = await lab.fails(world, RunKind.PLANNED)

    assert failure.error.code == code
    assert f"{step} of a fails" in failure.error.message
    assert failure.error.recommended_action
    assert failure.result is not None
    assert failure.result.status is RunStatus.FAILED
    states = await lab.states(world)
    assert states["a"] == failed_state
    assert states["b"] in NAMED
    results = by_machine(world, failure.result)
    assert results["a"].outcome is Outcome.FAILED
    assert {k: r.state for k, r in results.items()} == states
    assert not (await lab.status(world, "a")).holder
    assert not (await lab.status(world, "b")).holder
    if step != "create_machine":
        assert not world.asked("create_machine")


async def test_the_same_planned_failover_run_again_goes_to_its_end(lab: Harness) -> None:
    world = await lab.protected(machines=("a", "b"), boot=[("one", ["a"]), ("two", ["b"])])
    world.fail("create_machine", "b", Code.CAPACITY_EXHAUSTED)
    await lab.fails(world, RunKind.PLANNED)
    assert await lab.states(world) == {"a": "PlannedCommitPending", "b": "PlannedFailoverCompletionFailed"}
    made_of_a = [n for n in world.of(test=False) if n.startswith(world.machine("a"))]

    world.heal()
    world.forget()
    result = await lab.run(world, RunKind.PLANNED)

    assert result.status is RunStatus.SUCCEEDED
    outcomes = {k: r.outcome for k, r in by_machine(world, result).items()}
    assert outcomes == {"a": Outcome.SKIPPED, "b": Outcome.SUCCEEDED}
    assert set((await lab.states(world)).values()) == {"PlannedCommitPending"}
    # the machine that was ready is kept, and what the first run left of the other is gone
    standing = world.of(test=False)
    assert [n for n in standing if n.startswith(world.machine("a"))] == made_of_a
    assert len([n for n in standing if n.startswith(world.machine("b"))]) == 4
    assert not [w for w in world.asked() if w.startswith("shut_down_source a")]


async def test_a_machine_that_is_named_but_has_failed_over_already_is_an_error(lab: Harness) -> None:
    world = await lab.protected(machines=("a",))
    await lab.run(world, RunKind.PLANNED)
    failure = await lab.fails(world, RunKind.PLANNED, machines=(world.machine("a"),))
    assert failure.error.code == Code.OPERATION_NOT_ALLOWED
    assert "Commit" in failure.error.message
    assert (await lab.status(world, "a")).state.main == "PlannedCommitPending"


async def test_nothing_is_touched_when_the_target_is_not_ready(lab: Harness) -> None:
    world = await lab.protected(machines=("a",))
    world.findings = [
        m.FindingView(
            severity="error", code="QuotaExceeded", subject="", message="8 cores are missing", action="Ask."
        )
    ]
    failure = await lab.fails(world, RunKind.PLANNED)
    assert failure.error.code == Code.NOT_READY
    assert "8 cores are missing" in failure.error.message
    assert world.asked("shut_down_source", "create_disk") == []
    status = await lab.status(world, "a")
    assert (status.state.main, status.holder) == ("Protected", "")


async def test_a_subset_of_machines_fails_over_alone(lab: Harness) -> None:
    world = await lab.protected(machines=("a", "b"))
    result = await lab.run(world, RunKind.PLANNED, machines=(world.machine("b"),))
    assert [r.machine for r in result.machines] == [world.machine("b")]
    assert await lab.states(world) == {"a": "Protected", "b": "PlannedCommitPending"}


async def test_an_abort_stops_before_the_next_step_and_leaves_named_states(lab: Harness) -> None:
    world = await lab.protected(machines=("a", "b"), boot=[("one", ["a"]), ("two", ["b"])])
    gate = world.hold("shut_down_source", "b")  # two goes down first
    run = await lab.start(world, RunKind.PLANNED)
    await world.reached("shut_down_source", "b")
    answer = await run.abort(approve("stop", "ann", "wrong day"))
    assert "stops before its next step" in answer
    gate.open()
    failure = await ended_badly(run)
    assert failure.error.code == Code.RUN_ABORTED
    assert "wrong day" in failure.error.message
    assert not world.asked("final_cycle", "create_disk")
    states = await lab.states(world)
    assert states["a"] == "Protected"  # its source was never stopped
    assert states["b"] == "PlannedFailoverFailed"  # its source is off: not as if nothing had been
    assert not (await lab.status(world, "b")).holder


async def test_a_run_cancelled_through_temporal_settles_its_machines(lab: Harness) -> None:
    world = await lab.protected(machines=("a", "b"))
    gate = world.hold("create_disk", "a")
    run = await lab.start(world, RunKind.PLANNED)
    await world.reached("create_disk", "a")
    await run.handle.cancel()
    gate.open()
    failure = await ended_badly(run)
    assert failure.error.code == Code.RUN_ABORTED
    states = await lab.states(world)
    assert set(states.values()) == {"PlannedFailoverCompletionFailed"}
    assert not (await lab.status(world, "a")).holder


async def test_a_machine_whose_workflow_is_terminated_by_hand_stops_a_planned_failover(lab: Harness) -> None:
    world = await lab.protected(machines=("a", "b"), boot=[("one", ["a", "b"])])
    gate = world.hold("shut_down_source")
    run = await lab.start(world, RunKind.PLANNED)
    await world.reached("shut_down_source", times=2)
    await lab.temporal.get_workflow_handle(f"{run.id}/{world.machine('a')}").terminate("by hand")
    gate.open()
    failure = await ended_badly(run)
    assert by_machine(world, failure.result)["a"].outcome is Outcome.FAILED
    assert not world.asked("create_disk"), "no machine goes on in a planned failover that lost one"
    assert (await lab.status(world, "b")).state.main in NAMED


async def test_a_lone_machine_terminated_while_the_run_waits_for_a_person_stops_it_too(lab: Harness) -> None:
    world = await lab.protected(
        machines=("a", "b"),
        boot=[("one", ["a"]), ("two", ["b"])],
        shutdown={"before": [{"manual": "Look"}]},
    )
    run = await lab.start(world, RunKind.PLANNED)
    await pending(run, "look")
    await lab.temporal.get_workflow_handle(f"{run.id}/{world.machine('a')}").terminate("by hand")
    await run.decide(approve("look", "ann"))
    failure = await ended_badly(run)
    assert by_machine(world, failure.result)["a"].outcome is Outcome.FAILED
    assert not world.asked("create_disk")


async def test_a_second_run_is_told_which_run_holds_the_machine(lab: Harness) -> None:
    world = await lab.protected(machines=("a",))
    gate = world.hold("shut_down_source")
    first = await lab.start(world, RunKind.PLANNED)
    await world.reached("shut_down_source")
    second = await lab.fails(world, RunKind.PLANNED)
    assert second.error.code == Code.SCENARIO_IN_PROGRESS
    assert first.id in second.error.message
    gate.open()
    assert (await first.result()).status is RunStatus.SUCCEEDED


async def test_the_lock_of_a_terminated_run_is_broken_by_the_next_one(lab: Harness) -> None:
    world = await lab.protected(machines=("a",))
    gate = world.hold("create_disk")
    first = await lab.start(world, RunKind.PLANNED)
    await world.reached("create_disk")
    await first.handle.terminate("gone")
    assert names.holder_id((await lab.status(world, "a")).holder) == first.id
    gate.open()
    result = await lab.run(world, RunKind.PLANNED)
    assert result.status is RunStatus.SUCCEEDED
    status = await lab.status(world, "a")
    assert status.state.main == "PlannedCommitPending"
    assert not status.holder


async def test_a_run_terminated_after_the_shutdown_does_not_count_as_protected(lab: Harness) -> None:
    world = await lab.protected(machines=("a",), shutdown={"after": [{"manual": "Look"}]})
    run = await lab.start(world, RunKind.PLANNED)
    await pending(run, "look")
    await run.handle.terminate("gone")
    # whoever comes next breaks the lock: a test is refused, since the source is off and nobody settled that
    failure = await lab.fails(world, RunKind.TEST)
    assert failure.error.code == Code.OPERATION_NOT_ALLOWED
    assert (await lab.status(world, "a")).state.main == "PlannedFailoverFailed"
    again = await lab.start(world, RunKind.PLANNED)
    await pending(again, "look")
    await again.decide(approve("look", "ann"))
    assert (await again.result()).status is RunStatus.SUCCEEDED
