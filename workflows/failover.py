"""Failover: a run of a recovery plan, of any kind. It pins the plan, checks the target, leads the groups through the
stages of the kind's course, runs the plan's actions around them, and says at every moment what it is doing, what it
waits for and what comes next.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from temporalio import workflow
from temporalio.exceptions import ActivityError, ApplicationError, ChildWorkflowError

with workflow.unsafe.imports_passed_through():
    from farshore.activities import messages as m
    from farshore.activities import signatures as s
    from farshore.contract import names
    from farshore.contract.errors import error_view
    from farshore.contract.machine import FenceKind, FenceToken
    from farshore.contract.runs import (
        Decision,
        DecisionKind,
        ErrorView,
        FailoverInput,
        MachineProgress,
        MachineResult,
        Outcome,
        ResourceView,
        RunKind,
        RunProgress,
        RunResult,
        RunStatus,
    )
    from farshore.domain.errors import Code, FarshoreError
    from farshore.plans.model import KINDS, Plan
    from farshore.plans.schedule import Schedule, schedule
    from farshore.workflows.actions import PlanActions
    from farshore.workflows.decisions import Decisions, ask_for, refusal
    from farshore.workflows.details import run_page
    from farshore.workflows.groups import Part, chosen, failures_of, in_order, slices, start_group
    from farshore.workflows.journal import Journal, Stop, problem
    from farshore.workflows.messages import GroupReport, MachineReport, Proceed, StageOutcome
    from farshore.workflows.networks import network_for, remove_test_network
    from farshore.workflows.results import Facts, run_failure, run_result
    from farshore.workflows.stages import COURSES, Course, Order, Stage
    from farshore.workflows.steps import run_step

_FENCE = "fence"
_PEOPLE = 2


@workflow.defn(name=names.FAILOVER)
class Failover:
    """Start it with one JSON object: {"plan": "crm", "kind": "planned", "reason": "…"}."""

    @workflow.init
    def __init__(self, ask: FailoverInput) -> None:
        self._ask = ask
        self._course: Course = COURSES[ask.kind]
        self._id = workflow.info().workflow_id
        self._holder = names.lock_holder(self._id, workflow.info().first_execution_run_id)
        self._started = workflow.now()
        self._plan: Plan | None = None
        self._sha = ""
        self._schedule: Schedule | None = None
        self._parts: list[Part] = []
        self._reports: dict[tuple[str, str], GroupReport] = {}
        self._rows: dict[str, MachineReport] = {}
        self._group_of: dict[str, str] = {}
        self._lost: set[str] = set()  # machines whose failure has been noticed
        self._network_deleted: tuple[ResourceView, ...] = ()
        self._journal = Journal(self._show)
        self._decisions = Decisions(self._journal)
        self._actions = PlanActions(
            ask,
            self._id,
            self._holder,
            journal=self._journal,
            decisions=self._decisions,
            machines=self._group_of.keys(),
        )

    # -- what people and children say -----------------------------------------------------------------------------

    @workflow.signal(description="A group has ended a stage (from its workflow)")
    def group_report(self, report: GroupReport) -> None:
        self._reports[report.part, report.stage] = report
        for row in report.machines:
            self._rows[row.machine] = row
        self._show()

    @workflow.update(
        description='Answer what the run waits for: {"action": "its id, see the current details", "by": "your name", '
        '"decision": "approve" or "reject"}'
    )
    def decide(self, decision: Decision) -> str:
        return self._decisions.record(decision)

    @decide.validator
    def _may_decide(self, decision: Decision) -> None:
        self._decisions.may_record(decision)

    @workflow.update(
        description='Stop the run before its next step; machines are left in named states: {"action": "abort", '
        '"by": "your name", "observation": "why"}'
    )
    def abort(self, decision: Decision) -> str:
        words = f"{decision.by} stopped the run. {decision.observation}".strip()
        self._journal.abort = self._journal.abort or problem(Code.RUN_ABORTED, words)
        self._journal.say(f"{decision.by}: stop")
        self._show()
        return "the run stops before its next step"

    @workflow.query
    def progress(self) -> RunProgress:
        """Machines, phase, what is pending, the last lines of the log."""
        rows: list[MachineProgress] = []
        for machine, group in self._group_of.items():
            row = self._rows.get(machine)
            rows.append(
                MachineProgress(
                    machine=machine,
                    group=group,
                    stage=row.stage if row else "",
                    outcome=row.outcome.value if row else "starting",
                    note=row.note if row else "",
                )
            )
        return RunProgress(
            plan=self._ask.plan,
            kind=self._ask.kind.value,
            phase=self._journal.phase,
            started_at=self._started,
            pending=tuple(self._decisions.pending.values()),
            machines=tuple(rows),
            log=tuple(self._journal.lines[-20:]),
        )

    # -- course ---------------------------------------------------------------------------------------------------

    @workflow.run
    async def run(self, ask: FailoverInput) -> RunResult:
        """Lead the run to its end. Fails with RunFailed when the kind stops at errors or nothing succeeded."""
        workflow.upsert_search_attributes(
            [
                names.PLAN.value_set(ask.plan),
                names.KIND.value_set(ask.kind.value),
                names.STATE.value_set("Running"),
            ]
        )
        self._journal.enter("loading the plan")
        stopped: ErrorView | None = None
        try:
            pinned = await self._load()
            network = pinned.plan.network.failover
            await self._start_groups(pinned)
            for number, stage in enumerate(self._course.stages):
                await self._stage(pinned, stage, network)
                if number == 0:  # the machines are ours: nothing has been touched yet
                    await self._check_target(pinned)
                    self._journal.look_for_abort()
                    network = await network_for(ask.kind, pinned, self._holder, self._journal)
        except Stop as stop:
            stopped = stop.view
        except asyncio.CancelledError:
            stopped = problem(Code.RUN_ABORTED, "The run was cancelled.")
        except (ActivityError, ApplicationError, FarshoreError) as error:
            stopped = error_view(error, subject=ask.plan, unreachable=Code.TARGET_UNREACHABLE)
        return await self._finish(stopped)

    async def _load(self) -> m.PinnedPlan:
        ask = self._ask
        pinned = await run_step(
            s.LOAD_PLAN,
            m.LoadPlan(plan=ask.plan, machines=tuple(dict.fromkeys([*ask.machines, *ask.points]))),
            queue=names.CONTROL_QUEUE,
            summary=f"Read and pin plan {ask.plan}",
        )
        self._plan, self._sha = pinned.plan, pinned.sha256
        machines = chosen(ask, pinned.plan)
        if ask.kind.value in KINDS:
            self._schedule = schedule(pinned.plan, ask.kind.value, machines)
        if ask.point.startswith("p-") and len(machines) != 1:
            raise FarshoreError(
                Code.INVALID_INPUT,
                f"A point id belongs to one machine, but this run has {len(machines)}.",
                action='Name the machine ("machines": ["…"]), or give a point for each in "points".',
            )
        workflow.upsert_search_attributes([names.SITE.value_set(pinned.plan.sites.target)])
        return pinned

    async def _check_target(self, pinned: m.PinnedPlan) -> None:
        if self._ask.kind not in (RunKind.PLANNED, RunKind.TEST, RunKind.UNPLANNED):
            return
        self._journal.enter("checking the target")
        plan = pinned.plan
        try:
            findings = await run_step(
                s.CHECK_TARGET,
                m.CheckTargetCall(
                    site=plan.sites.target, plan=plan, machines=self._at_work(), test=self._course.is_test
                ),
                queue=pinned.target_queue,
                rules=s.TARGET_IN_A_HURRY if self._ask.kind is RunKind.UNPLANNED else None,
                summary=f"Check {plan.sites.target}: networks, addresses, quota, names",
            )
        except ActivityError as error:
            if self._ask.kind is not RunKind.UNPLANNED:
                raise
            findings = []
            self._journal.say(f"the check of the target failed: {error_view(error).message}")
        bad = [f for f in findings if f.severity == "error"]
        for finding in findings:
            self._journal.say(f"{finding.severity}: {finding.message}")
        if bad and self._ask.kind is not RunKind.UNPLANNED:
            raise FarshoreError(
                Code.NOT_READY,
                f"{plan.sites.target} is not ready: " + "; ".join(f.message for f in bad),
                subject=self._ask.plan,
                causes=tuple(dict.fromkeys(f.code for f in bad)),
                action=" ".join(dict.fromkeys(f.action for f in bad)),
            )

    def _at_work(self) -> tuple[str, ...]:
        """Machines that have neither failed nor been left out."""
        return tuple(n for n, row in self._rows.items() if row.outcome is StageOutcome.DONE)

    async def _start_groups(self, pinned: m.PinnedPlan) -> None:
        self._journal.enter("starting the groups")
        for given in slices(self._ask, pinned, self._holder):
            part = await start_group(given, self._id)
            self._parts.append(part)
            self._group_of.update(dict.fromkeys((mr.machine for mr in part.machines), part.id))

    async def _stage(self, pinned: m.PinnedPlan, stage: Stage, network: str) -> None:
        plan = pinned.plan
        fences = (
            await self._fences() if stage.name == "failover" and self._ask.kind is RunKind.UNPLANNED else ()
        )
        shutdown = stage.name == "shutdown"
        around = self._schedule
        if shutdown and around is not None:
            await self._actions.perform(pinned, around.shutdown_before)
        order = stage.order
        if shutdown and order is Order.REVERSE and plan.shutdown.order == "parallel":
            order = Order.TOGETHER
        for group, parts in in_order(plan, order, self._parts, around):
            boots = None
            if stage.name == "boot" and group is not None and around is not None:
                boots = next((g for g in around.boot if g.name == group.group), None)
            if boots is not None:
                await self._actions.perform(pinned, boots.before)
            where = f" — group {group.group}" if group is not None else ""
            self._journal.enter(f"{stage.title}{where}")
            await self._lead(stage, parts, Proceed(stage=stage.name, network=network, fences=fences))
            if boots is not None:
                await self._actions.perform(pinned, boots.after)
        if shutdown and around is not None:
            await self._actions.perform(pinned, around.shutdown_after)
        self._must_have_work(stage)

    async def _lead(self, stage: Stage, parts: Sequence[Part], word: Proceed) -> None:
        """Send parts into a stage and wait until all have reported it."""
        self._journal.look_for_abort()
        live = [p for p in parts if not p.handle.done()]
        await asyncio.gather(*(self._tell(part, word) for part in live))
        await workflow.wait_condition(
            lambda: (
                self._journal.abort is not None
                or all((p.id, stage.name) in self._reports or p.handle.done() for p in live)
            )
        )
        self._journal.look_for_abort()
        failed = [view for part in parts for view in self._newly_failed(part, stage)]
        if failed and (
            self._course.stops_at_error or (self._ask.kind is RunKind.TEST and stage.name == "prepare")
        ):
            raise Stop(failed[0])

    async def _tell(self, part: Part, word: Proceed) -> None:
        mine = {mr.machine for mr in part.machines}
        fences = tuple(token for token in word.fences if token.machine in mine)
        try:
            await part.handle.signal("proceed", word.model_copy(update={"fences": fences}))
        except ApplicationError:
            workflow.logger.info("group %s had ended", part.id)

    def _newly_failed(self, part: Part, stage: Stage) -> list[ErrorView]:
        """Failures of a part's machines that no stage has counted yet."""
        report = self._reports.get((part.id, stage.name))
        lost = failures_of(part, report)
        if report is None and part.handle.done() and part.handle.exception() is not None:
            view = error_view(part.handle.exception() or RuntimeError(), subject=part.id)
            lost = [(mr.machine, view) for mr in part.machines]
        fresh = [(machine, view) for machine, view in lost if machine not in self._lost]
        for machine, view in fresh:
            self._lost.add(machine)
            self._journal.errors.append(view)
            self._journal.say(f"{machine} failed: {view.message}")
        return [view for _, view in fresh]

    def _must_have_work(self, stage: Stage) -> None:
        rows = [self._rows.get(name) for name in self._group_of]
        if self._ask.kind is RunKind.CLEANUP and not self._ask.machines:
            return  # the network of a test may be left even where no machine is
        if all(row is not None and row.outcome is StageOutcome.SKIPPED for row in rows) and rows:
            if self._course.stops_at_error or self._ask.kind is RunKind.UNPLANNED:
                note = f"Every machine of {self._ask.plan} was left out: {self._course.skip_note}."
            else:
                note = f"No machine of {self._ask.plan} allows this: {self._course.skip_note}."
            raise Stop(problem(Code.OPERATION_NOT_ALLOWED, note))
        if all(row is not None and row.outcome is not StageOutcome.DONE for row in rows) and rows:
            first = (
                self._journal.errors[0]
                if self._journal.errors
                else problem(Code.RUN_FAILED, f"No machine got past {stage.name}.")
            )
            raise Stop(first)

    # -- fences ---------------------------------------------------------------------------------------------------

    async def _fences(self) -> tuple[FenceToken, ...]:
        """People's word for the machines whose source gave no proof. Two different people, or nothing is promoted."""
        unproven = sorted(
            row.machine for row in self._rows.values() if row.needs_fence and row.outcome is StageOutcome.DONE
        )
        if not unproven:
            return ()
        given = [(c.by, c.statement) for c in self._ask.break_glass]
        if len(given) < _PEOPLE:
            answers = await self._decisions.wait_for(
                ask_for(
                    _FENCE,
                    "Confirm that the source can't come back",
                    f"Nothing proves that {', '.join(unproven)} is off. If the source still writes, data will differ on "
                    "both sides. Two different people must confirm that the source site is down for good or cut off.",
                    needs=_PEOPLE,
                    given=tuple(by for by, _ in given),
                ),
                None,
            )
            refused = refusal(answers)
            if refused is not None:
                words = f"{refused.by} did not confirm the fence. {refused.observation}"
                raise Stop(problem(Code.FENCE_NOT_PROVEN, words))
            given += [(a.by, a.observation) for a in answers if a.decision is DecisionKind.APPROVE]
        people = tuple(by for by, _ in given)
        words = "; ".join(f"{by}: {text or 'confirmed'}" for by, text in given)
        self._journal.say(f"break-glass by {', '.join(people)} for {', '.join(unproven)}")
        return tuple(
            FenceToken(
                machine=name,
                run=self._holder,
                kind=FenceKind.BREAK_GLASS,
                evidence=f"break-glass — {words}",
                at=workflow.now(),
                approvers=people,
            )
            for name in unproven
        )

    # -- end ------------------------------------------------------------------------------------------------------

    async def _finish(self, stopped: ErrorView | None) -> RunResult:
        if stopped is not None:
            self._journal.say(f"stopped: {stopped.message}")
            self._journal.enter("stopping: machines record their state")
            for part in self._parts:
                if not part.handle.done():
                    try:
                        await part.handle.signal("stop", stopped.message)
                    except ApplicationError:
                        workflow.logger.info("group %s had ended", part.id)
        machines = await self._results()
        if self._ask.kind is RunKind.CLEANUP and stopped is None:
            await self._remove_network(machines)
            if not self._network_deleted and all(r.outcome is Outcome.SKIPPED for r in machines):
                stopped = problem(
                    Code.OPERATION_NOT_ALLOWED,
                    f"There is nothing to clean up in {self._ask.plan}: {self._course.skip_note}.",
                )
        result = self._result(machines, stopped)
        await workflow.wait_condition(workflow.all_handlers_finished)
        workflow.upsert_search_attributes([names.STATE.value_set(result.status.value)])
        self._journal.enter(f"ended: {result.status.value}", state=result.status.value)
        if result.status is RunStatus.FAILED:
            view = stopped or (
                self._journal.errors[0]
                if self._journal.errors
                else problem(Code.RUN_FAILED, "No machine succeeded.")
            )
            raise run_failure(view, result)
        return result

    async def _results(self) -> list[MachineResult]:
        found: list[MachineResult] = []
        for part in self._parts:
            try:
                found += await self._end_of(part)
            except ChildWorkflowError as error:
                view = error_view(error, subject=part.id)
                if not self._lost.issuperset(mr.machine for mr in part.machines):
                    self._journal.errors.append(view)
                found += [
                    MachineResult(machine=mr.machine, outcome=Outcome.FAILED, error=view)
                    for mr in part.machines
                ]
        return found

    async def _end_of(self, part: Part) -> list[MachineResult]:
        """The group's results. A cancellation while it settles its machines must not end it: it is waited for again."""
        try:
            return await asyncio.shield(part.handle)
        except asyncio.CancelledError:
            return await asyncio.shield(part.handle)

    async def _remove_network(self, machines: Sequence[MachineResult]) -> None:
        """The test's network goes with the last test of the plan that is cleaned up."""
        plan = self._plan
        if plan is None or any(r.outcome not in (Outcome.SUCCEEDED, Outcome.SKIPPED) for r in machines):
            return
        queue = self._parts[0].machines[0].spec.target_queue
        self._network_deleted = await remove_test_network(plan, queue, self._journal)

    def _result(self, machines: Sequence[MachineResult], stopped: ErrorView | None) -> RunResult:
        return run_result(
            Facts(
                plan=self._ask.plan,
                kind=self._ask.kind,
                sha256=self._sha,
                started=self._started,
                finished=workflow.now(),
                machines=machines,
                decisions=self._decisions.records,
                actions=self._actions.done,
                network_deleted=self._network_deleted,
                errors=self._journal.errors,
                stopped=stopped,
            )
        )

    # -- help -----------------------------------------------------------------------------------------------------

    def _show(self) -> None:
        workflow.set_current_details(
            run_page(
                self.progress(),
                course=self._course,
                run=self._id,
                namespace=workflow.info().namespace,
                now=workflow.now(),
                reason=self._ask.reason,
                errors=self._journal.errors,
            )
        )
