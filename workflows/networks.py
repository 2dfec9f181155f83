"""The network of a run: the plan's own, or for a test one that leads nowhere, which goes with the plan's last test."""

from __future__ import annotations

from temporalio import workflow
from temporalio.exceptions import ActivityError

with workflow.unsafe.imports_passed_through():
    from farshore.activities import messages as m
    from farshore.activities import signatures as s
    from farshore.contract import names
    from farshore.contract.errors import error_view
    from farshore.contract.runs import ResourceView, RunKind
    from farshore.domain.errors import Code
    from farshore.plans.model import Plan
    from farshore.workflows.journal import Journal, problem
    from farshore.workflows.stages import COURSES
    from farshore.workflows.steps import run_step

_ISOLATED = "isolated"  # a plan's word for: make one


async def network_for(kind: RunKind, pinned: m.PinnedPlan, holder: str, journal: Journal) -> str:
    """Name of the network for a run's machines; made or checked if they are a test's. Raises NetworkNotIsolated."""
    plan = pinned.plan
    if kind is not RunKind.TEST:
        return plan.network.failover
    if plan.network.test != _ISOLATED:
        return await run_step(
            s.CHECK_ISOLATED,
            m.IsolationCall(site=plan.sites.target, network=plan.network.test),
            queue=pinned.target_queue,
            summary=f"Check that {plan.network.test} is isolated",
        )
    journal.enter("making the isolated test network")
    return await run_step(
        s.ENSURE_TEST_NETWORK,
        m.TestNetworkCall(
            site=plan.sites.target,
            plan=plan.plan,
            run=holder,
            machine="",
            test=True,
            like=(plan.network.failover,),
        ),
        queue=pinned.target_queue,
        summary=f"Make an isolated network like {plan.network.failover}",
    )


async def remove_test_network(plan: Plan, queue: str, journal: Journal) -> tuple[ResourceView, ...]:
    """Delete it unless a machine of the plan still has a test open. What fails is noted in the journal."""
    closed = COURSES[RunKind.CLEANUP].skips_in
    try:
        statuses = await run_step(
            s.MACHINE_STATUS,
            m.StatusCall(machines=tuple(plan.machines)),
            queue=names.CONTROL_QUEUE,
            summary="Look whether another machine's test is still open",
        )
        if any(row["state"]["test"] not in closed for row in statuses.found.values()):
            return ()
        journal.enter("removing the test network")
        gone = await run_step(
            s.REMOVE_RESOURCES,
            m.RemoveCall(
                site=plan.sites.target, plan=plan.plan, run="", machine="", test=True, run_level=True
            ),
            queue=queue,
            summary="Remove the isolated network of the test",
        )
    except ActivityError as error:
        journal.errors.append(error_view(error, unreachable=Code.TARGET_UNREACHABLE))
        return ()
    if gone.leftovers:
        journal.errors.append(problem(Code.CLEANUP_LEFTOVERS, "Left over: " + "; ".join(gone.leftovers)))
    return gone.deleted
