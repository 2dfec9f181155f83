"""What a run is asked for must hang together, and a wrong choice of point is found before anything is touched."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from farshore.contract.runs import FailoverInput, RunKind
from farshore.domain.errors import Code

from .harness import Harness

POINT = "p-0000000001-00000000"
TWO = [{"by": "ann"}, {"by": "bob"}]


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ({"kind": "test", "machines": ["a"], "points": {"b": "latest"}}, "points names b"),
        ({"kind": "test", "point": "yesterday"}, "'yesterday' is no recovery point"),
        ({"kind": "test", "points": {"a": "newest"}}, "'newest' is no recovery point"),
        ({"kind": "planned", "point": "latest-processed"}, "loses nothing"),
        ({"kind": "planned", "point": POINT}, "loses nothing"),
        ({"kind": "planned", "points": {"a": POINT}}, "loses nothing"),
        *(
            ({"kind": kind, "shutdown": False}, "for unplanned only")
            for kind in ("planned", "test", "cancel")
        ),
        *(({"kind": kind, "break_glass": TWO}, "for unplanned only") for kind in ("planned", "commit")),
        ({"kind": "unplanned", "break_glass": [{"by": "Ann"}, {"by": " ann"}]}, "different people"),
    ],
)
def test_an_input_that_contradicts_itself_is_refused(more: dict[str, Any], says: str) -> None:
    with pytest.raises(ValidationError, match=says):
        FailoverInput.model_validate({"plan": "crm"} | more)


@pytest.mark.parametrize(
    "more",
    [
        {"kind": "planned"},
        {"kind": "planned", "point": "latest", "points": {"a": "latest"}},
        {"kind": "test", "points": {"a": POINT, "b": "latest-app-consistent"}},
        {"kind": "test", "machines": ["a", "b"], "points": {"b": POINT}},
        {"kind": "unplanned", "shutdown": False, "break_glass": TWO},
        {"kind": "change-point", "point": POINT, "accept_data_loss": True},
    ],
)
def test_an_input_that_hangs_together_is_accepted(more: dict[str, Any]) -> None:
    assert FailoverInput.model_validate({"plan": "crm"} | more).plan == "crm"


@pytest.mark.asyncio(loop_scope="session")
@pytest.mark.parametrize("kind", [RunKind.TEST, RunKind.UNPLANNED, RunKind.CHANGE_POINT])
async def test_a_point_that_does_not_exist_is_found_before_anything_is_touched(
    lab: Harness, kind: RunKind
) -> None:
    world = await lab.protected(machines=("a",))
    more: dict[str, Any] = {}
    if kind is RunKind.CHANGE_POINT:
        await lab.run(world, RunKind.PLANNED)
        more["accept_data_loss"] = True
    before = (await lab.status(world, "a")).state
    world.forget()
    world.fail("choose_point", "a", Code.NO_RECOVERY_POINT, "there is no such point")
    failure = await lab.fails(world, kind, point=POINT, **more)
    assert failure.error.code == Code.NO_RECOVERY_POINT
    assert "there is no such point" in failure.error.message
    assert set(world.asked()) == {"load_plan", "choose_point a"}
    [sought] = [c.value for c in world.calls if c.step == "choose_point"]
    assert not sought.hold, "only looked at: nothing may keep the point from its retention"
    status = await lab.status(world, "a")
    assert (status.state, status.holder) == (before, "")


@pytest.mark.asyncio(loop_scope="session")
async def test_the_newest_point_needs_no_look_before(lab: Harness) -> None:
    world = await lab.protected(machines=("a",))
    await lab.run(world, RunKind.TEST)
    assert [c.value.hold for c in world.calls if c.step == "choose_point"] == [True]
