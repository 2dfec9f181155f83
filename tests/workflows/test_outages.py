"""Legs that end without a point: the outage is told, nothing counts as protected by it, and it is tried again."""

from __future__ import annotations

import pytest

from farshore.activities import messages as m
from farshore.contract.machine import Begin, Halt, Settle, SettleOutcome
from farshore.domain.errors import Code
from farshore.domain.machine import MainState, Operation, ResyncState

from .harness import Harness
from .test_machine_protection import enabled, tell
from .world import World

pytestmark = pytest.mark.asyncio(loop_scope="session")


def said(text: str, *, points: int = 0) -> m.LegReport:
    """What a leg reports whose time was over; `text` is its last error."""
    return m.LegReport(
        cycles=3,
        points=points,
        last_error=text,
        newest=None,
        full_copies=0,
        bytes_shipped=0,
        stopped_because="time",
    )


async def test_a_leg_that_made_no_point_and_met_an_error_is_an_outage(lab: Harness) -> None:
    world = await lab.protected(machines=("a",))
    newest = (await lab.status(world, "a")).newest_point
    world.leg_report = lambda _call: said("the host answers nothing")
    await tell(lab.protection(world, "a"), "configure", lab.spec(world, "a", leg=0.1))
    await _end_leg(lab, world)
    status = await lab.until(world, "a", lambda s: s.state.health == "Critical")
    assert status.error is not None
    assert status.error.code == Code.SOURCE_READ_FAILED
    assert "the host answers nothing" in status.error.message
    assert status.state.main is MainState.PROTECTED
    assert status.newest_point == newest

    world.leg_report = None
    status = await lab.until(world, "a", lambda s: s.state.health == "Normal")
    assert status.error is None


async def test_a_leg_that_made_points_and_ended_with_an_error_is_no_outage(lab: Harness) -> None:
    world = await lab.protected(machines=("a",))
    world.leg_report = lambda call: None if call.stop_after_first else said("once", points=2)
    world.forget()
    await _end_leg(lab, world)
    await world.reached("replicate_leg", times=3)
    status = await lab.status(world, "a")
    assert (status.state.health, status.error) == ("Normal", None)


async def test_a_first_copy_that_made_no_point_protects_nothing_and_goes_on(lab: Harness) -> None:
    world = lab.world(machines=("a",))
    world.leg_report = lambda _call: said("the store is full")
    await enabled(lab, world)
    status = await lab.until(world, "a", lambda s: s.error is not None)
    assert status.state.main is MainState.INITIAL_REPLICATION_IN_PROGRESS
    await world.reached("replicate_leg", times=2)
    assert (await lab.status(world, "a")).state.main is MainState.INITIAL_REPLICATION_IN_PROGRESS
    world.leg_report = None
    status = await lab.until(world, "a", lambda s: s.state.main is MainState.PROTECTED)
    assert status.error is None


async def test_a_resynchronisation_that_made_no_point_stays_open(lab: Harness) -> None:
    world = lab.world(machines=("a",))
    handle = await enabled(lab, world)
    await lab.until(world, "a", lambda s: s.state.main is MainState.PROTECTED)
    world.leg_report = lambda _call: said("the snapshot is gone")
    await tell(handle, "begin", Begin(operation=Operation.REPAIR, run="repairing"))
    status = await lab.until(world, "a", lambda s: s.error is not None)
    assert status.state.resync is ResyncState.INITIATED
    world.leg_report = None
    await lab.until(world, "a", lambda s: s.state.resync is ResyncState.COMPLETED)


async def _end_leg(lab: Harness, world: World) -> None:
    """The leg that runs would go on for an hour: a failover that is called off after its halt ends it."""
    handle = lab.protection(world, "a")
    await lab.until(world, "a", lambda s: s.replicating)
    await tell(handle, "begin", Begin(operation=Operation.TEST_FAILOVER, run="r"))
    await tell(handle, "halt", Halt(run="r"))
    await tell(handle, "settle", Settle(run="r", outcome=SettleOutcome.FAILURE))


async def test_a_leg_that_ended_before_its_first_point_counts_for_nothing(lab: Harness) -> None:
    """No point and no error: it was stopped. Neither a first copy nor a resynchronisation is done by it."""
    world = lab.world(machines=("a",))

    def twice(call: m.LegCall) -> m.LegReport | None:
        asked = [c.value for c in world.calls if c.step == "replicate_leg"]
        same = [one for one in asked if one.force_full == call.force_full and one.stop_after_first]
        return said("") if call.stop_after_first and len(same) < 3 else None

    world.leg_report = twice
    handle = await enabled(lab, world)
    await lab.until(world, "a", lambda s: s.state.main is MainState.PROTECTED)
    await tell(handle, "begin", Begin(operation=Operation.REPAIR, run="repairing"))
    await lab.until(world, "a", lambda s: s.state.resync is ResyncState.COMPLETED)
    legs = [c.value for c in world.calls if c.step == "replicate_leg" and c.value.stop_after_first]
    assert [leg.force_full for leg in legs] == [False] * 3 + [True] * 3
