"""A second run after one that failed or was stopped: it begins from what the first one left, and says so."""

from __future__ import annotations

import pytest

from farshore.contract.client import RunFailed
from farshore.contract.machine import MachineStatus
from farshore.contract.runs import Outcome, ProtectionInput, ProtectionKind, RunKind, RunStatus
from farshore.domain.errors import Code

from .harness import Harness, approve, by_machine, ended_badly
from .world import World

pytestmark = pytest.mark.asyncio(loop_scope="session")


async def shown(lab: Harness, world: World, short: str) -> str:
    """The page of a machine, as the web UI reads it."""
    metadata = await lab.protection(world, short).query("__temporal_workflow_metadata")
    return metadata.current_details


async def with_its_source_off(lab: Harness) -> World:
    """A machine whose planned failover failed after its source had been shut down."""
    world = await lab.protected(machines=("a",))
    world.fail("final_cycle", "a", Code.SOURCE_NOT_ELIGIBLE)
    await lab.fails(world, RunKind.PLANNED)
    assert world.machine("a") in world.off
    world.heal()
    world.forget()
    return world


async def stopped_before_its_shutdown(lab: Harness, world: World) -> MachineStatus:
    """A planned failover that a person stops while it still looks at the sources."""
    gate = world.hold("inspect_source", "a")
    run = await lab.start(world, RunKind.PLANNED)
    await world.reached("inspect_source", "a")
    await run.abort(approve("stop", "ann", "not now"))
    gate.open()
    assert (await ended_badly(run)).error.code == Code.RUN_ABORTED
    assert world.asked("shut_down_source") == []
    return await lab.status(world, "a")


# -- a source that an earlier run shut down ---------------------------------------------------------------------------


async def test_a_source_that_an_earlier_run_shut_down_is_not_protected_because_a_rerun_stops_early(
    lab: Harness,
) -> None:
    world = await with_its_source_off(lab)
    status = await stopped_before_its_shutdown(lab, world)
    assert status.state.main == "PlannedFailoverFailed"
    assert status.source_off
    assert {"PlannedFailover", "Cancel"} <= set(status.allowed_operations)
    page = await shown(lab, world, "a")
    assert "source is off" in page
    assert "cancel" in page

    # and the way home is the one that it names
    assert (await lab.run(world, RunKind.CANCEL)).status is RunStatus.SUCCEEDED
    assert world.off == set()
    status = await lab.until(world, "a", lambda s: s.replicating)
    assert (status.state.main, status.source_off) == ("Protected", False)
    assert "source is off" not in await shown(lab, world, "a")


async def test_a_rerun_after_a_failed_completion_that_stops_early_does_not_call_the_machine_protected_either(
    lab: Harness,
) -> None:
    world = await lab.protected(machines=("a",))
    world.fail("create_machine", "a", Code.CAPACITY_EXHAUSTED)
    await lab.fails(world, RunKind.PLANNED)
    assert (await lab.status(world, "a")).state.main == "PlannedFailoverCompletionFailed"
    world.heal()
    world.forget()
    status = await stopped_before_its_shutdown(lab, world)
    assert (status.state.main, status.source_off) == ("PlannedFailoverFailed", True)
    assert (await lab.run(world, RunKind.CANCEL)).status is RunStatus.SUCCEEDED
    assert world.resources == {}
    assert world.off == set()


async def test_a_failover_that_failed_before_its_shutdown_leaves_no_source_called_off(lab: Harness) -> None:
    world = await lab.protected(machines=("a",))
    world.fail("inspect_source", "a", Code.SOURCE_MACHINE_NOT_FOUND)
    await lab.fails(world, RunKind.PLANNED)
    assert not (await lab.status(world, "a")).source_off
    assert "source is off" not in await shown(lab, world, "a")


async def test_the_source_of_a_run_that_died_counts_as_off_also_in_the_next_run(lab: Harness) -> None:
    world = await lab.protected(machines=("a",))
    gate = world.hold("shut_down_source")
    run = await lab.start(world, RunKind.PLANNED)
    await world.reached("shut_down_source")
    await run.handle.terminate("gone")
    gate.open()
    world.off.add(world.machine("a"))
    world.forget()
    status = await stopped_before_its_shutdown(lab, world)
    assert (status.state.main, status.source_off) == ("PlannedFailoverFailed", True)


async def test_a_first_run_that_stops_before_its_shutdown_leaves_a_protected_machine(lab: Harness) -> None:
    world = await lab.protected(machines=("a",))
    status = await stopped_before_its_shutdown(lab, world)
    assert (status.state.main, status.source_off) == ("Protected", False)


async def test_an_open_test_is_shown_with_what_it_made_until_it_is_cleaned_up(lab: Harness) -> None:
    world = await lab.protected(machines=("a",))
    await lab.run(world, RunKind.TEST)
    status = await lab.status(world, "a")
    assert {view.kind for view in status.tested} == {"disk", "network-interface", "machine"}
    page = await shown(lab, world, "a")
    assert "Test is open" in page
    assert status.tested[-1].name in page
    await lab.run(world, RunKind.CLEANUP)
    assert (await lab.status(world, "a")).tested == ()
    assert "Test is open" not in await shown(lab, world, "a")


# -- disable, again ---------------------------------------------------------------------------------------------------


async def test_a_second_disable_leaves_out_what_the_first_one_has_done(lab: Harness) -> None:
    world = await lab.protected(machines=("a", "b"))
    world.fail("remove_replica", "b", Code.REPLICA_DAMAGED)
    first = await lab.disable(world)
    assert first.status is RunStatus.PARTIALLY_SUCCEEDED
    assert (await lab.status(world, "b")).state.main == "DisablingFailed"
    world.heal()
    world.forget()

    second = await lab.disable(world)
    assert second.status is RunStatus.SUCCEEDED
    assert second.errors == ()
    machines = by_machine(world, second)
    assert {k: r.outcome for k, r in machines.items()} == {"a": Outcome.SKIPPED, "b": Outcome.SUCCEEDED}
    assert {r.state for r in machines.values()} == {"Unprotected"}
    assert "already" in machines["a"].note
    assert world.asked("remove_replica") == ["remove_replica b"]

    third = await lab.disable(world)  # all is done, and that is no error
    assert third.status is RunStatus.SUCCEEDED
    assert {r.outcome for r in third.machines} == {Outcome.SKIPPED}


async def test_a_disable_leaves_out_a_machine_that_was_never_protected(lab: Harness) -> None:
    world = lab.world(machines=("a", "b"))
    only_a = ProtectionInput(plan=world.name, machines=(world.machine("a"),))
    await (await lab.client.protection(only_a)).result()
    result = await lab.disable(world)
    assert result.status is RunStatus.SUCCEEDED
    outcomes = {k: r.outcome for k, r in by_machine(world, result).items()}
    assert outcomes == {"a": Outcome.SUCCEEDED, "b": Outcome.SKIPPED}


async def test_a_machine_whose_protection_was_ended_by_hand_is_not_called_disabled(lab: Harness) -> None:
    world = await lab.protected(machines=("a", "b"))
    await lab.protection(world, "a").terminate("by hand")
    result = await lab.disable(world)
    assert result.status is RunStatus.PARTIALLY_SUCCEEDED
    left = by_machine(world, result)["a"]
    assert left.outcome is Outcome.FAILED
    assert left.error is not None
    assert left.error.code == Code.MACHINE_NOT_PROTECTED
    assert "protect" in left.error.recommended_action
    assert "replica" in left.error.message
    assert world.machine("a") in world.points

    # what the error recommends works
    only_a = ProtectionInput(plan=world.name, machines=(world.machine("a"),))
    await (await lab.client.protection(only_a)).result()
    assert (await lab.disable(world, "a")).status is RunStatus.SUCCEEDED
    assert world.machine("a") not in world.points


async def test_a_disable_of_nothing_but_unknown_machines_is_an_error(lab: Harness) -> None:
    world = lab.world(machines=("a",))
    with pytest.raises(RunFailed) as failure:
        await (
            await lab.client.protection(ProtectionInput(plan=world.name, kind=ProtectionKind.DISABLE))
        ).result()
    assert failure.value.error.code == Code.MACHINE_NOT_PROTECTED
