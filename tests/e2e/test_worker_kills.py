"""Workers, and Temporal itself, die by SIGKILL at random moments of a planned failover: it finishes, nothing is made
twice, nothing is lost."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Sequence

import pytest
from temporalio.service import RPCError, RPCStatusCode

from farshore.contract.runs import FailoverInput, RunKind, RunStatus
from farshore.lab.demo.application import prove
from tests.e2e.helpers import NAMES, protect

ROLES = ("control", "east", "westeurope")


def _kill(stack, role: str) -> None:
    if role == "temporal":
        stack.processes["temporal"].kill()
        stack.start_temporal()  # the same database and ports; the workers were told nothing
    else:
        stack.processes[f"worker-{role}"].kill()
        stack.start_worker(role)


async def _end_of(run):
    """The result, though the server is away now and then."""
    while True:
        try:
            return await run.result()
        except RPCError as error:
            if error.status not in (
                RPCStatusCode.UNAVAILABLE,
                RPCStatusCode.CANCELLED,
                RPCStatusCode.DEADLINE_EXCEEDED,
            ):
                raise
            await asyncio.sleep(0.5)


async def _with_kills(stack, client, *, kills: int, seed: int, roles: Sequence[str] = ROLES) -> None:
    await protect(client)
    rng = random.Random(seed)
    run = await client.failover(FailoverInput(plan="crm", kind=RunKind.PLANNED, reason=f"kills, seed {seed}"))
    ending = asyncio.create_task(_end_of(run))
    done = 0
    while done < kills and not ending.done():
        await asyncio.wait([ending], timeout=rng.uniform(0.1, 3.0))  # the random moment
        if ending.done():
            break
        await asyncio.to_thread(_kill, stack, rng.choice(roles))
        done += 1
    result = await ending
    assert done == kills, f"the run was over after {done} kills"
    assert result.status is RunStatus.SUCCEEDED, result.model_dump_json(indent=1)
    for name in NAMES:
        proof = prove(stack, name, "failover", against_live=True)
        assert proof.equal, name
        assert proof.intact, proof.problems
        assert proof.lost == 0
    twice = {id: n for id, n in stack.azure.creations().items() if n != 1}
    assert twice == {}, "a resource was created twice"
    marks = [p for p in (stack.root / "plans" / "marks").iterdir() if p.read_text().strip() == "planned"]
    assert len(marks) == 1, "the script's effect was doubled"
    machines = [r for r in stack.azure.resources() if r.type.lower() == "microsoft.compute/virtualmachines"]
    assert len(machines) == len(NAMES)
    disks = [r for r in stack.azure.resources() if r.type.lower() == "microsoft.compute/disks"]
    assert len(disks) == 4
    downs = [r for r in stack.vcenter.requests("ShutdownGuest") if r.get("fault") is None]
    assert len(downs) >= len(NAMES)


@pytest.mark.timeout(420)
async def test_three_kills_of_workers_change_nothing(make_stack, connect):
    stack = make_stack()
    await _with_kills(stack, await connect(stack), kills=3, seed=1)


@pytest.mark.slow
@pytest.mark.timeout(900)
async def test_two_kills_of_temporal_itself_change_nothing(make_stack, connect):
    stack = make_stack()
    await _with_kills(stack, await connect(stack), kills=2, seed=3, roles=("temporal",))


@pytest.mark.slow
@pytest.mark.timeout(1800)
async def test_twenty_kills_of_workers_change_nothing(make_stack, connect):
    stack = make_stack()
    await _with_kills(stack, await connect(stack), kills=20, seed=20261122)
