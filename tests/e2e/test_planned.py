"""The main job on real processes: a planned failover loses nothing, a test leaves nothing, every disk is the source's."""

from __future__ import annotations

import pytest

from farshore.contract.client import RunFailed
from farshore.contract.runs import FailoverInput, PointsInput, RunKind
from farshore.lab.demo.application import prove
from tests.e2e.conftest import until
from tests.e2e.helpers import (
    NAMES,
    created_and_deleted,
    fail_over,
    newest_points,
    point_counts,
    protect,
    test_leftovers,
)

pytestmark = pytest.mark.timeout(400)


async def test_a_plan_is_rehearsed_cleaned_up_failed_over_moved_to_another_point_and_committed(
    make_stack, connect
):
    stack = make_stack(interval="2s")
    client = await connect(stack)
    await protect(client)

    # a test failover: bytes of one instant, replication goes on, nothing stays behind
    first = await point_counts(client)
    tested = await fail_over(client, RunKind.TEST, point="latest-processed")
    for name in NAMES:
        proof = prove(stack, name, "test", against_live=False)
        assert proof.equal, f"{name}: the test disks are no snapshot of the source"
        assert proof.intact, proof.problems
    assert all(row.point is not None for row in tested.machines)

    async def replicated_on() -> bool:
        now = await point_counts(client)
        return all(now[name] > first[name] + 1 for name in NAMES)

    await until("points made while the test is open", replicated_on)
    await fail_over(client, RunKind.CLEANUP, notes="fine")
    created, deleted = created_and_deleted(stack, "test")
    assert created, "the test must have made something"
    assert created == deleted
    assert test_leftovers(stack) == []

    # planned: zero loss, proven by the ledger and by sha256
    result = await fail_over(client, RunKind.PLANNED, reason="e2e")
    for name in NAMES:
        proof = prove(stack, name, "failover", against_live=True)
        assert proof.equal, f"{name}: the recovered disks differ from the source's"
        assert proof.intact, proof.problems
        assert proof.lost == 0
        assert proof.recovered > 0
    assert all(row.data_loss_seconds == 0 for row in result.machines)
    assert all("poweredOff" in row.fence or "off" in row.fence for row in result.machines)
    assert {row.state for row in result.machines} == {"PlannedCommitPending"}
    marks = list((stack.root / "plans" / "marks").iterdir())
    assert len(marks) == 2, "the script ran once in the test and once in the planned failover"

    # change of point: refused without a word about the loss, then bytes of an older instant
    older = {}
    for point in await client.points(PointsInput(plan="crm", limit=1000)):
        older.setdefault(point.machine, []).append(point)
    wanted = {name: points[-2].id for name, points in older.items()}
    refused = await client.failover(FailoverInput(plan="crm", kind=RunKind.CHANGE_POINT, points=wanted))
    with pytest.raises(RunFailed, match="accept_data_loss"):
        await refused.result()


async def test_after_a_change_of_point_the_disks_are_the_older_instants_and_commit_keeps_only_that_point(
    make_stack, connect
):
    stack = make_stack(interval="2s")
    client = await connect(stack)
    await protect(client)
    await until("some points", lambda: _enough(client))
    await fail_over(client, RunKind.PLANNED)
    listed: dict[str, list] = {}
    for point in await client.points(PointsInput(plan="crm", limit=1000)):
        listed.setdefault(point.machine, []).append(point)
    wanted = {name: points[-2].id for name, points in listed.items()}
    changed = await fail_over(client, RunKind.CHANGE_POINT, points=wanted, accept_data_loss=True)
    for row in changed.machines:
        assert row.point is not None
        assert row.point.id == wanted[row.machine]
        proof = prove(stack, row.machine, "failover", against_live=False)
        assert proof.equal
        assert proof.intact
        assert proof.lost > 0, "an older point must lack the newest records, or this test proves nothing"
    assert {row.state for row in changed.machines} == {"UnplannedCommitPending"}

    committed = await fail_over(client, RunKind.COMMIT)
    assert {row.state for row in committed.machines} == {"Committed"}
    kept = await client.points(PointsInput(plan="crm", limit=1000))
    assert {p.machine: p.id for p in kept} == wanted
    assert len(kept) == len(NAMES)


async def _enough(client) -> bool:
    return all(p.cycle >= 4 for p in (await newest_points(client)).values())
