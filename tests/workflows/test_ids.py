"""Ids: what people may write is long, what Temporal may store is not, and no two updates of a run share an id."""

from __future__ import annotations

import pytest

from farshore.activities import messages as m
from farshore.contract.runs import RunKind, RunStatus

from .harness import Harness

pytestmark = pytest.mark.asyncio(loop_scope="session")

TITLE = "Datenbanken der Auftragsabwicklung — zuerst, äußerst vorsichtig und nur mit Begleitung " + "ö" * 100
IN_VISIBILITY = 255  # characters of an id in the columns of Temporal's SQL stores


async def test_long_titles_and_a_long_id_of_the_run_make_no_two_updates_the_same(lab: Harness) -> None:
    assert 180 < len(TITLE) <= 200
    world = await lab.protected(machines=("a", "b"), boot=[(TITLE, ["a"]), (TITLE + " 2", ["b"])])
    id_ = f"{world.name}/" + "x" * (IN_VISIBILITY - 60)
    result = await (await lab.start(world, RunKind.PLANNED, id=id_)).result()
    assert result.status is RunStatus.SUCCEEDED
    assert set((await lab.states(world)).values()) == {"PlannedCommitPending"}
    updates = [c.value for c in world.calls if isinstance(c.value, m.UpdateCall)]
    of_a = [u.update_id for u in updates if u.machine == world.machine("a")]
    assert len(set(of_a)) == len(of_a) == 4  # begin, halt, promote, settle
    assert max(len(u.update_id) for u in updates) < 100

    children = await children_of(lab, id_)
    assert len(set(children)) == 2
    for child in children:
        assert child.startswith(f"{id_}/group/Datenbanken")
        assert len(child) <= IN_VISIBILITY
        assert "WORKFLOW_EXECUTION_COMPLETED" in await lab.events(child)


async def children_of(lab: Harness, id: str) -> list[str]:
    """Workflow ids of the children that a workflow has started."""
    history = await lab.temporal.get_workflow_handle(id).fetch_history()
    return [
        e.start_child_workflow_execution_initiated_event_attributes.workflow_id
        for e in history.events
        if e.HasField("start_child_workflow_execution_initiated_event_attributes")
    ]


async def test_a_short_title_stands_in_the_groups_id_as_it_is(lab: Harness) -> None:
    world = await lab.protected(machines=("a",), boot=[("Data tier", ["a"])])
    run = await lab.start(world, RunKind.TEST)
    await run.result()
    assert await children_of(lab, run.id) == [f"{run.id}/group/Data tier"]


async def test_a_second_run_of_the_same_id_is_not_answered_with_the_first_ones_updates(lab: Harness) -> None:
    world = await lab.protected(machines=("a",))
    id_ = f"{world.name}/mine"
    await (await lab.start(world, RunKind.TEST, id=id_)).result()
    await lab.run(world, RunKind.CLEANUP)
    await (await lab.start(world, RunKind.TEST, id=id_)).result()
    assert (await lab.status(world, "a")).state.test == "WaitingForCompletion"
