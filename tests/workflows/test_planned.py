"""Planned failover: the order of its steps, and where it stops."""

from __future__ import annotations

import pytest
from farshore.contract.runs import Outcome, RunKind, RunStatus

from .harness import Harness, by_machine

pytestmark = pytest.mark.asyncio(loop_scope="session")


async def test_a_planned_failover_brings_every_machine_to_commit_pending(lab: Harness) -> None:
    world = await lab.protected()
    result = await lab.run(world, RunKind.PLANNED, reason="maintenance")
    assert result.status is RunStatus.SUCCEEDED
    assert set((await lab.states(world)).values()) == {"PlannedCommitPending"}
    for machine in by_machine(world, result).values():
        assert machine.outcome is Outcome.SUCCEEDED
        assert machine.data_loss_seconds == 0
        assert machine.point is not None and machine.point.final
