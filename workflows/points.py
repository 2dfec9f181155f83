"""RecoveryPoints: the points of a plan's machines, read from the store now."""

from __future__ import annotations

import asyncio

from temporalio import workflow
from temporalio.exceptions import ActivityError

with workflow.unsafe.imports_passed_through():
    from farshore.activities import messages as m
    from farshore.activities import signatures as s
    from farshore.contract import names
    from farshore.contract.errors import error_view, view_to_application_error
    from farshore.contract.runs import PointsInput, PointView
    from farshore.domain.errors import Code
    from farshore.workflows.steps import run_step


@workflow.defn(name=names.RECOVERY_POINTS)
class RecoveryPoints:
    """Start it with {"plan": "crm"}."""

    @workflow.run
    async def run(self, ask: PointsInput) -> list[PointView]:
        """Newest first, machine by machine."""
        workflow.upsert_search_attributes([names.PLAN.value_set(ask.plan), names.KIND.value_set("points")])
        try:
            pinned = await run_step(
                s.LOAD_PLAN,
                m.LoadPlan(plan=ask.plan, machines=ask.machines),
                queue=names.CONTROL_QUEUE,
                summary=f"Read plan {ask.plan}",
            )
            wanted = [name for name in pinned.plan.machines if not ask.machines or name in ask.machines]
            lists = await asyncio.gather(
                *(
                    run_step(
                        s.LIST_POINTS,
                        m.StoreCall(site=pinned.plan.sites.target, machine=name),
                        queue=pinned.target_queue,
                        summary=f"List the points of {name}",
                    )
                    for name in wanted
                )
            )
        except ActivityError as error:
            raise view_to_application_error(
                error_view(error, subject=ask.plan, unreachable=Code.TARGET_UNREACHABLE)
            ) from None
        return [point for found in lists for point in list(reversed(found.points))[: ask.limit]]
