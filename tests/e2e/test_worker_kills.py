"""Workers die by SIGKILL at random moments of a planned failover: it finishes, nothing is made twice, nothing is lost."""

from __future__ import annotations

import asyncio
import random

import pytest

from farshore.contract.runs import FailoverInput, RunKind, RunStatus
from farshore.lab.demo.application import prove
from tests.e2e.helpers import NAMES, protect

ROLES = ("control", "east", "westeurope")


async def _with_kills(stack, client, *, kills: int, seed: int) -> None:
    await protect(client)
    rng = random.Random(seed)
    run = await client.failover(FailoverInput(plan="crm", kind=RunKind.PLANNED, reason=f"kills, seed {seed}"))
    ending = asyncio.create_task(run.result())
    done = 0
    while done < kills and not ending.done():
        await asyncio.wait([ending], timeout=rng.uniform(0.1, 3.0))  # the random moment
        if ending.done():
            break
        role = rng.choice(ROLES)
        stack.processes[f"worker-{role}"].kill()
        stack.start_worker(role)
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
@pytest.mark.timeout(1800)
async def test_twenty_kills_of_workers_change_nothing(make_stack, connect):
    stack = make_stack()
    await _with_kills(stack, await connect(stack), kills=20, seed=20261122)
