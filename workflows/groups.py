"""The groups of a run: which machines each has, how it is started, in which order groups have their turns."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from temporalio import workflow
from temporalio.common import Priority, SearchAttributePair, TypedSearchAttributes

with workflow.unsafe.imports_passed_through():
    from farshore.activities import messages as m
    from farshore.contract import names
    from farshore.contract.runs import ErrorView, FailoverInput, MachineResult, Outcome, RunKind
    from farshore.domain.errors import Code
    from farshore.plans.model import BootGroup, Plan
    from farshore.plans.schedule import Schedule, batches
    from farshore.workflows.details import group_label
    from farshore.workflows.failover_group import FailoverGroup
    from farshore.workflows.journal import problem
    from farshore.workflows.messages import GroupReport, GroupRun, MachineRun, StageOutcome
    from farshore.workflows.policy import machine_spec
    from farshore.workflows.stages import Order

_PRIORITY = {
    RunKind.UNPLANNED: 1,
    RunKind.PLANNED: 2,
    RunKind.CANCEL: 2,
    RunKind.CHANGE_POINT: 2,
    RunKind.COMMIT: 3,
}
_LEAST_PRIORITY = 4
_TITLE, _DIGEST = 40, 8  # characters of a group's title in its id


@dataclass
class Part:
    """A started FailoverGroup."""

    id: str
    group: str
    machines: tuple[MachineRun, ...]
    handle: workflow.ChildWorkflowHandle[FailoverGroup, list[MachineResult]]


def chosen(ask: FailoverInput, plan: Plan) -> tuple[str, ...]:
    """The machines of a run, in the plan's order."""
    wanted = set(ask.machines)
    return tuple(name for name in plan.machines if not wanted or name in wanted)


def slices(ask: FailoverInput, pinned: m.PinnedPlan, holder: str) -> Iterator[GroupRun]:
    """The groups to start: a boot group of more machines than one workflow takes becomes several."""
    members = set(chosen(ask, pinned.plan))
    for group in pinned.plan.boot:
        of_group = batches([name for name in group.machines if name in members])
        for index, names_ in enumerate(of_group):
            yield GroupRun(
                run=holder,
                kind=ask.kind,
                plan=ask.plan,
                group=group.group,
                part=group.group if len(of_group) == 1 else f"{group.group}-{index + 1}",
                machines=tuple(_machine_run(ask, pinned, name, group, holder) for name in names_),
            )


def group_id(run: str, part: str) -> str:
    """Workflow id of a group. Titles may have 200 characters, of which some stores of Temporal can't keep enough, so
    a long one is cut, and its hash keeps it apart from others that begin alike."""
    if len(part) > _TITLE:
        digest = hashlib.sha256(part.encode()).hexdigest()[:_DIGEST]
        part = f"{part[: _TITLE - _DIGEST - 1].rstrip()}-{digest}"
    return f"{run}/group/{part}"


async def start_group(given: GroupRun, run: str) -> Part:
    """Start a group as a child of this workflow, whose id is `run`."""
    handle = await workflow.start_child_workflow(
        FailoverGroup.run,
        given,
        id=group_id(run, given.part),
        static_summary=group_label(given.part, [mr.machine for mr in given.machines]),
        priority=Priority(priority_key=_PRIORITY.get(given.kind, _LEAST_PRIORITY)),
        search_attributes=TypedSearchAttributes(
            [
                SearchAttributePair(names.PLAN, given.plan),
                SearchAttributePair(names.KIND, given.kind.value),
            ]
        ),
    )
    return Part(given.part, given.group, given.machines, handle)


def _machine_run(
    ask: FailoverInput, pinned: m.PinnedPlan, name: str, group: BootGroup, holder: str
) -> MachineRun:
    plan = pinned.plan
    return MachineRun(
        run=holder,
        kind=ask.kind,
        plan=ask.plan,
        machine=name,
        group=group.group,
        settings=plan.machines[name],
        spec=machine_spec(pinned, name),
        network=plan.network.failover,
        choice=ask.points.get(name, ask.point),
        guest_timeout=plan.shutdown.guest_timeout,
        force_off=plan.shutdown.force,
        try_shutdown=ask.shutdown,
        accept_data_loss=ask.accept_data_loss,
        named=name in ask.machines or name in ask.points,
    )


def in_order(
    plan: Plan, order: Order, parts: Sequence[Part], around: Schedule | None
) -> Iterable[tuple[BootGroup | None, list[Part]]]:
    """Whose turn it is, one after another; None: all together."""
    if order is Order.TOGETHER:
        return [(None, list(parts))]
    groups = list(plan.boot) if order is Order.BOOT else list(reversed(plan.boot))
    found = [(group, [p for p in parts if p.group == group.group]) for group in groups]
    # a group may hold actions only: its turn comes all the same
    acts = {g.name for g in around.boot} if around and order is Order.BOOT else set[str]()
    return [(group, mine) for group, mine in found if mine or group.group in acts]


def failures_of(part: Part, report: GroupReport | None) -> list[tuple[str, ErrorView]]:
    """Failed machines of a part: as it reports, or as it ended. A machine or a whole group whose workflow was ended by
    hand never reports."""
    if report is not None:
        return [
            (row.machine, row.error or problem(Code.RUN_FAILED, row.note or f"{row.machine} failed."))
            for row in report.machines
            if row.outcome in (StageOutcome.FAILED, StageOutcome.STOPPED)
        ]
    if not part.handle.done() or part.handle.exception() is not None:
        return []
    return [
        (r.machine, r.error or problem(Code.RUN_FAILED, r.note or f"{r.machine} failed."))
        for r in part.handle.result()
        if r.outcome in (Outcome.FAILED, Outcome.STOPPED)
    ]
