"""History is a budget: at most 300 events a machine-day, at a 30 s interval with the default leg."""

from __future__ import annotations

import pytest

from farshore.activities.messages import PinnedPlan
from farshore.activities.signatures import REPLICATE_LEG
from farshore.contract.machine import ReplicationPolicy
from farshore.domain.machine import MainState

from .harness import Harness, eventually
from .test_machine_protection import enabled
from .world import World

pytestmark = pytest.mark.asyncio(loop_scope="session")

BUDGET = 300
DAY = 86_400
LOSSES = 4  # one worker lost every six hours
TASK_OF_A_LOST_WORKER = 3  # the sticky task that nobody took: scheduled, timed out, scheduled again
DEFAULT = ReplicationPolicy()


async def ended_legs(lab: Harness, world: World) -> tuple[int, int]:
    """Legs that have ended, and events up to the last of them."""
    events = await lab.events(lab.protection(world, "a").id)
    ends = [i for i, e in enumerate(events) if e == "ACTIVITY_TASK_COMPLETED"]
    return len(ends), ends[-1] + 1 if ends else 0


async def test_a_machine_day_of_default_legs_fits_the_budget_even_with_a_worker_lost_every_six_hours(
    lab: Harness,
) -> None:
    assert DEFAULT.interval == 30.0
    assert PinnedPlan.model_fields["leg_seconds"].default == DEFAULT.leg
    # a leg must end before its own limit, or each one would fail
    assert DEFAULT.leg < REPLICATE_LEG.rules.start_to_close

    world = lab.world(machines=("a",), leg_ends=lambda _call: len(world.calls) < 14)
    await enabled(lab, world)
    await lab.until(world, "a", lambda s: s.state.main is MainState.PROTECTED)

    async def twelve() -> bool:
        return (await ended_legs(lab, world))[0] >= 12

    await eventually(twelve)
    events = await lab.events(lab.protection(world, "a").id)
    ends = [i for i, e in enumerate(events) if e == "ACTIVITY_TASK_COMPLETED"]
    per_leg = (ends[11] - ends[1]) / 10
    assert per_leg >= 5, "an activity alone costs three events and its workflow task at least two more"
    per_day = per_leg * DAY / DEFAULT.leg
    assert per_day <= BUDGET

    lost = per_leg + await _extra_events_of_a_lost_leg(lab) + TASK_OF_A_LOST_WORKER
    assert per_day + LOSSES * lost <= BUDGET
    print(
        f"{per_leg:.1f} events a leg, {per_day:.0f} a day, {per_day + LOSSES * lost:.0f} with {LOSSES} losses"
    )


async def _extra_events_of_a_lost_leg(lab: Harness) -> float:
    """A worker dies in mid-leg without a word; the server finds out by the missing heartbeats and tries again."""
    world = lab.world(machines=("a",), lost={"replicate_leg"}, leg_ends=lambda _call: True)
    await enabled(lab, world)
    legs = REPLICATE_LEG.rules
    assert legs.heartbeat is not None
    await world.reached("replicate_leg", times=2, within=legs.heartbeat + 40)
    assert world.calls[1].attempt == 2
    await lab.until(world, "a", lambda s: s.state.main is MainState.PROTECTED)
    events = await lab.events(lab.protection(world, "a").id)
    scheduled = events.index("ACTIVITY_TASK_SCHEDULED")
    assert events[scheduled : scheduled + 3] == [
        "ACTIVITY_TASK_SCHEDULED",
        "ACTIVITY_TASK_STARTED",
        "ACTIVITY_TASK_COMPLETED",
    ]
    return 0.0
