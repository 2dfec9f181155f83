"""How a workflow runs a step: one call, with the rules of the table, a summary for people and typed results."""

from __future__ import annotations

from dataclasses import replace
from datetime import timedelta
from typing import TypeVar

from temporalio import workflow
from temporalio.workflow import ActivityCancellationType

with workflow.unsafe.imports_passed_through():
    from farshore.activities.signatures import Rules, Step

In = TypeVar("In")
Out = TypeVar("Out")


def _seconds(value: float | None) -> timedelta | None:
    return None if value is None else timedelta(seconds=value)


def start_step(
    step: Step[In, Out],
    given: In,
    *,
    queue: str,
    summary: str,
    rules: Rules | None = None,
    longer_by: float = 0.0,
) -> workflow.ActivityHandle[Out]:
    """Schedule a step. `longer_by` (seconds) widens the step's own time where the plan gives it a timeout."""
    use = rules or step.rules
    if longer_by:
        use = replace(
            use,
            start_to_close=use.start_to_close + longer_by,
            schedule_to_close=None if use.schedule_to_close is None else use.schedule_to_close + longer_by,
        )
    return workflow.start_activity(
        step.name,
        given,
        task_queue=queue,
        result_type=step.output,
        summary=summary[:200],
        start_to_close_timeout=_seconds(use.start_to_close),
        heartbeat_timeout=_seconds(use.heartbeat),
        schedule_to_start_timeout=_seconds(use.schedule_to_start),
        schedule_to_close_timeout=_seconds(use.schedule_to_close),
        retry_policy=use.retry_policy(),
        cancellation_type=ActivityCancellationType.WAIT_CANCELLATION_COMPLETED,
    )


async def run_step(
    step: Step[In, Out],
    given: In,
    *,
    queue: str,
    summary: str,
    rules: Rules | None = None,
    longer_by: float = 0.0,
) -> Out:
    """Run a step to its end. Raises ActivityError; `contract.errors.error_view` tells what it means."""
    return await start_step(step, given, queue=queue, summary=summary, rules=rules, longer_by=longer_by)
