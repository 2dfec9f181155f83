"""The source site dies, or half dies. What survives is an unbroken prefix; what is lost is the age of the newest point."""

from __future__ import annotations

import time

import pytest

from farshore.contract.runs import Confirmation, FailoverInput, RunKind, RunStatus
from farshore.lab.demo.application import prove
from tests.e2e.conftest import until
from tests.e2e.helpers import NAMES, approve, fail_over, last_ack, newest_points, point_counts, protect

pytestmark = pytest.mark.timeout(400)


async def test_a_dead_source_site_costs_exactly_what_was_written_after_the_newest_point(make_stack, connect):
    stack = make_stack(interval="3s")
    client = await connect(stack)
    await protect(client)
    before = await point_counts(client)

    async def replicates() -> bool:
        now = await point_counts(client)
        return all(now[name] >= before[name] + 2 for name in NAMES)

    await until("a few more points", replicates)
    stack.processes["vcenter"].kill()
    stack.processes["worker-east"].kill()
    killed_ns = time.time_ns()
    acked = {name: last_ack(stack, name) for name in NAMES}
    newest = await newest_points(client)

    began = time.monotonic()
    run = await client.failover(FailoverInput(plan="crm", kind=RunKind.UNPLANNED, reason="the site burns"))
    pending = await until("the run asks for the fence", lambda: _pending(run))
    assert pending.needs == 2
    assert "1 more" in await approve(run, "fence", "alice", "the fire brigade says so")
    await approve(run, "fence", "bob", "I see the smoke")
    result = await run.result()
    assert time.monotonic() - began < 180, "an unplanned failover must not wait for a dead site"
    assert result.status is RunStatus.SUCCEEDED, result.model_dump_json(indent=1)
    assert {row.state for row in result.machines} == {"UnplannedCommitPending"}
    assert all("alice" in row.fence and "bob" in row.fence for row in result.machines)

    stack.start_vcenter()  # only to ask it for the digests it had recorded
    for row in result.machines:
        name = row.machine
        assert row.point is not None
        assert row.point.id == newest[name].id, "latest means the newest committed point"
        proof = prove(stack, name, "failover", against_live=False)
        assert proof.equal, f"{name}: the recovered disks are not the source's at the point"
        assert proof.intact, proof.problems
        number, at_ns = acked[name]
        lost = number - proof.recovered
        assert lost > 0, "the source wrote on after the point, or this test proves nothing"
        age = killed_ns / 1e9 - row.point.taken_at.timestamp()
        # 25 records a second: the records lost span the age of the point, give or take scheduling of the writer
        assert lost / 25 == pytest.approx(age, abs=max(1.5, 0.5 * age)), (
            f"{name}: lost {lost}, point {age:.1f} s old"
        )
        assert (at_ns / 1e9 - row.point.taken_at.timestamp()) <= age + 0.5
        assert row.data_loss_seconds is not None
        assert row.data_loss_seconds >= age - 0.5


async def test_an_unplanned_failover_with_the_source_alive_shuts_it_down_and_can_be_cancelled(
    make_stack, connect
):
    stack = make_stack(interval="2s")
    client = await connect(stack)
    await protect(client)
    result = await fail_over(
        client,
        RunKind.UNPLANNED,
        break_glass=(Confirmation(by="alice"), Confirmation(by="bob")),
    )
    for row in result.machines:
        assert row.point is not None
        assert row.point.final, "the source was off and reachable: its last changes are in the point"
        assert row.data_loss_seconds == 0
        assert prove(stack, row.machine, "failover", against_live=True).lost == 0
    cancelled = await fail_over(client, RunKind.CANCEL, reason="false alarm")
    assert {row.state for row in cancelled.machines} == {"Protected"}
    made = [r.id for r in stack.azure.resources() if r.tags.get("farshore-purpose") == "failover"]
    assert made == []
    assert all(stack.vcenter.vm(name)["power"] == "poweredOn" for name in NAMES)
    before = await point_counts(client)

    async def replicates() -> bool:
        now = await point_counts(client)
        return all(now[name] > before[name] + 1 for name in NAMES)

    await until("replication goes on after the cancel", replicates)
    # and the points made after the cancel are whole
    again = await fail_over(client, RunKind.TEST)
    for row in again.machines:
        proof = prove(stack, row.machine, "test", against_live=False)
        assert proof.equal
        assert proof.intact, proof.problems


async def _pending(run):
    waiting = (await run.progress()).pending
    return waiting[0] if waiting else None
