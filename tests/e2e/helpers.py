"""Steps that several stories share."""

from __future__ import annotations

import json
from typing import Any

from farshore.contract.client import FarshoreClient, Run
from farshore.contract.runs import (
    Decision,
    FailoverInput,
    Outcome,
    PointsInput,
    PointView,
    ProtectionInput,
    RunKind,
    RunResult,
    RunStatus,
)
from farshore.lab.stack import Stack

NAMES = ("crm-db01", "crm-app01", "crm-web01")


async def protect(client: FarshoreClient) -> RunResult:
    """Protect the plan and wait for initial replication."""
    result = await (await client.protection(ProtectionInput(plan="crm"))).result()
    assert result.status is RunStatus.SUCCEEDED, result
    return result


async def fail_over(client: FarshoreClient, kind: RunKind, **fields: Any) -> RunResult:
    """Run a kind to its end; every machine must succeed."""
    run = await client.failover(FailoverInput(plan="crm", kind=kind, **fields))
    result = await run.result()
    assert result.status is RunStatus.SUCCEEDED, result.model_dump_json(indent=1)
    assert {row.outcome for row in result.machines} == {Outcome.SUCCEEDED}
    return result


async def approve(run: Run, action: str, by: str, observation: str = "") -> str:
    """Answer a manual action."""
    return await run.decide(Decision(action=action, by=by, observation=observation))


async def newest_points(client: FarshoreClient) -> dict[str, PointView]:
    """The newest committed point of each machine, from the store."""
    newest: dict[str, PointView] = {}
    for point in await client.points(PointsInput(plan="crm", limit=1)):
        newest.setdefault(point.machine, point)
    return newest


async def point_counts(client: FarshoreClient) -> dict[str, int]:
    """Cycle number of the newest point of each machine."""
    return {name: point.cycle for name, point in (await newest_points(client)).items()}


def test_leftovers(stack: Stack) -> list[str]:
    """What a test failover left at the target."""
    return [r.id for r in stack.azure.resources() if r.tags.get("farshore-purpose") == "test"]


test_leftovers.__test__ = False  # a helper, not a test


def created_and_deleted(stack: Stack, purpose: str) -> tuple[list[str], list[str]]:
    """Ids of what Farshore really created and deleted for a purpose, by the server's own log."""
    events = [e for e in stack.azure.history() if e.tags.get("farshore-purpose") == purpose]
    return (
        sorted(e.id for e in events if e.event == "created"),
        sorted(e.id for e in events if e.event == "deleted"),
    )


def last_ack(stack: Stack, machine: str) -> tuple[int, int]:
    """Number and time (ns) of the last record the source acknowledged, from the log outside its disks."""
    lines = (stack.root / "vcenter" / "acks" / f"{machine}.log").read_text().splitlines()
    whole = [line.split() for line in lines if len(line.split()) >= 3]
    return int(whole[-1][0]), int(whole[-1][1])


def outputs(text: str) -> Any:
    """JSON that a command printed."""
    return json.loads(text)
