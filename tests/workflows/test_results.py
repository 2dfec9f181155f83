"""What a run leaves: its status, its figures, and a size that Temporal accepts however large the plan is."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from farshore.contract.runs import (
    ErrorView,
    MachineResult,
    Outcome,
    PointView,
    ResourceView,
    RunKind,
    RunStatus,
)
from farshore.domain.errors import Code
from farshore.workflows.journal import problem
from farshore.workflows.results import Facts, run_failure, run_result

START = datetime(2026, 11, 22, 12, tzinfo=UTC)
LIMIT = 2 * 2**20  # bytes of a payload
GROUP = "/subscriptions/5e0a6a2c-7d0c-4a44-9a3f-3f6a7f0c2b11/resourceGroups/farshore-recovery/providers"


def machine(number: int, outcome: Outcome = Outcome.SUCCEEDED, *, disks: int = 6) -> MachineResult:
    """As large as a real one."""
    name = f"production-application-server-{number:04d}"
    point = PointView(
        id=f"p-{number:010d}-5f0c2b11",
        machine=name,
        cycle=number,
        taken_at=START,
        consistency="crash-consistent",
        final=True,
        size_bytes=2 << 40,
    )
    made = tuple(
        ResourceView(id=f"{GROUP}/Microsoft.Compute/disks/{name}-{i}", kind="disk", name=f"{name}-{i}")
        for i in range(disks)
    )
    error = problem(Code.QUOTA_EXCEEDED, f"no cores are left for {name}")
    return MachineResult(
        machine=name,
        outcome=outcome,
        state="PlannedCommitPending",
        point=point,
        data_loss_seconds=float(number),
        fence=f"{name} is powered off; " + "the host says so. " * 30,
        made=made,
        addresses=("10.20.3.10",),
        running_at=START + timedelta(seconds=number),
        error=error if outcome is Outcome.FAILED else None,
    )


def facts(*machines: MachineResult, **other: Any) -> Facts:
    given: dict[str, Any] = {
        "plan": "crm",
        "kind": RunKind.PLANNED,
        "sha256": "5" * 64,
        "started": START,
        "finished": START + timedelta(hours=1),
        "machines": machines,
        "decisions": (),
        "actions": (),
        "network_deleted": (),
        "errors": (),
        "stopped": None,
    }
    return Facts(**(given | other))


def test_up_to_200_machines_are_told_in_full() -> None:
    machines = [machine(i) for i in range(200)]
    assert run_result(facts(*machines)).machines == tuple(machines)


def test_the_result_of_a_thousand_machines_fits_a_payload_and_still_names_each() -> None:
    machines = [machine(i) for i in range(1000)]
    in_full = sum(len(m.model_dump_json()) for m in machines)
    assert in_full > LIMIT, "the machines are too small to show anything"
    result = run_result(facts(*machines, errors=[problem(Code.RUN_FAILED, "x" * 500)] * 1000))
    assert len(result.model_dump_json()) < 0.8 * LIMIT
    assert len(result.errors) == 50
    assert [m.machine for m in result.machines] == [m.machine for m in machines]
    assert all(m.point is not None and m.running_at and m.addresses for m in result.machines)
    assert all(m.made == () and len(m.fence) == 100 for m in result.machines)


def test_the_failure_of_a_thousand_machines_fits_too_and_names_the_first() -> None:
    result = run_result(facts(*(machine(i, Outcome.FAILED) for i in range(1000))))
    failure = run_failure(problem(Code.RUN_ABORTED, "ann stopped the run."), result)
    assert failure.type == Code.RUN_ABORTED
    assert failure.non_retryable
    assert "production-application-server-0019" in failure.message
    assert "production-application-server-0020" not in failure.message
    assert "and 980 more" in failure.message
    view, whole = failure.details
    assert ErrorView.model_validate(view).message == "ann stopped the run."
    assert len(whole["machines"]) == 1000
    assert len(json.dumps(failure.details)) < 0.8 * LIMIT


@pytest.mark.parametrize(
    ("outcomes", "other", "status"),
    [
        ([Outcome.SUCCEEDED, Outcome.SUCCEEDED], {}, RunStatus.SUCCEEDED),
        ([Outcome.SUCCEEDED, Outcome.SKIPPED], {}, RunStatus.SUCCEEDED),
        ([Outcome.SUCCEEDED, Outcome.FAILED], {}, RunStatus.PARTIALLY_SUCCEEDED),
        ([Outcome.SUCCEEDED, Outcome.STOPPED], {}, RunStatus.PARTIALLY_SUCCEEDED),
        (
            [Outcome.SUCCEEDED],
            {"errors": [problem(Code.ACTION_FAILED, "a script")]},
            RunStatus.PARTIALLY_SUCCEEDED,
        ),
        ([Outcome.SUCCEEDED], {"stopped": problem(Code.RUN_ABORTED, "stop")}, RunStatus.FAILED),
        ([Outcome.FAILED, Outcome.SKIPPED], {}, RunStatus.FAILED),
        ([], {}, RunStatus.FAILED),
        (
            [Outcome.SKIPPED],
            {"network_deleted": (ResourceView(id="n", kind="virtual-network", name="n"),)},
            RunStatus.SUCCEEDED,
        ),
    ],
)
def test_the_status_of_a_run(outcomes: list[Outcome], other: dict[str, Any], status: RunStatus) -> None:
    machines = [machine(i, outcome) for i, outcome in enumerate(outcomes)]
    assert run_result(facts(*machines, **other)).status is status


def test_times_and_losses_are_those_of_the_worst_machine_that_succeeded() -> None:
    result = run_result(facts(machine(3), machine(7), machine(90, Outcome.FAILED)))
    assert result.rto_seconds == 7
    assert result.rpo_seconds == 7
    none = run_result(facts(machine(1, Outcome.FAILED)))
    assert (none.rto_seconds, none.rpo_seconds) == (None, None)
