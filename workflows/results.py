"""What a run leaves behind: its result, and the failure of a run that ends badly. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime

from temporalio.exceptions import ApplicationError

from farshore.contract.errors import view_to_application_error
from farshore.contract.runs import (
    DecisionRecord,
    ErrorView,
    MachineResult,
    Outcome,
    ResourceView,
    RunKind,
    RunResult,
    RunStatus,
)

_LISTED = 20  # machines named in the text of a failure
_LISTED_ERRORS = 50
_FULL_RESULTS = 200  # machines whose results are kept with all details
_FENCE_TEXT = 100  # characters of a fence's evidence where details are left out


@dataclass(frozen=True, slots=True)
class Facts:
    """Of a run that has ended."""

    plan: str
    kind: RunKind
    sha256: str
    started: datetime
    finished: datetime
    machines: Sequence[MachineResult]
    decisions: Sequence[DecisionRecord]
    actions: Sequence[str]
    network_deleted: tuple[ResourceView, ...]
    errors: Sequence[ErrorView]
    stopped: ErrorView | None


def run_result(facts: Facts) -> RunResult:
    """A run that was stopped or did nothing has failed; one of which some part failed has succeeded partially."""
    good = [r for r in facts.machines if r.outcome is Outcome.SUCCEEDED]
    bad = [r for r in facts.machines if r.outcome in (Outcome.FAILED, Outcome.STOPPED)]
    if facts.stopped is not None or not (good or facts.network_deleted):
        status = RunStatus.FAILED
    elif bad or facts.errors:
        status = RunStatus.PARTIALLY_SUCCEEDED
    else:
        status = RunStatus.SUCCEEDED
    running = [r.running_at for r in good if r.running_at is not None]
    losses = [r.data_loss_seconds for r in good if r.data_loss_seconds is not None]
    return RunResult(
        plan=facts.plan,
        kind=facts.kind.value,
        status=status,
        plan_sha256=facts.sha256,
        started_at=facts.started,
        finished_at=facts.finished,
        rto_seconds=(max(running) - facts.started).total_seconds() if running else None,
        rpo_seconds=max(losses) if losses else None,
        machines=tuple(_slim(facts.machines)),
        decisions=tuple(facts.decisions),
        actions=tuple(facts.actions),
        network_deleted=facts.network_deleted,
        errors=tuple(facts.errors[:_LISTED_ERRORS]),
    )


def run_failure(view: ErrorView, result: RunResult) -> ApplicationError:
    """What went wrong and where the machines are now; the details are the error and the whole result."""
    listed = result.machines[:_LISTED]
    left = "; ".join(f"{r.machine}: {r.state or r.outcome.value}" for r in listed)
    if len(result.machines) > _LISTED:
        left += f"; and {len(result.machines) - _LISTED} more"
    base = view_to_application_error(view)
    return ApplicationError(
        f"{base.message}{f' — machines now: {left}' if left else ''}",
        view.model_dump(mode="json"),
        result.model_dump(mode="json"),
        type=view.code,
        non_retryable=True,
    )


def _slim(machines: Sequence[MachineResult]) -> Sequence[MachineResult]:
    """A result must stay under Temporal's 2 MiB: of many machines, the details stay with the machines' own runs."""
    if len(machines) <= _FULL_RESULTS:
        return machines
    return [
        r.model_copy(update={"made": (), "deleted": (), "fence": r.fence[:_FENCE_TEXT]}) for r in machines
    ]
