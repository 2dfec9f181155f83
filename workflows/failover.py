"""Failover: a run of a recovery plan, of any kind. It pins the plan, checks the target, leads the groups through the
stages of the kind's course, runs the plan's actions around them, and says at every moment what it is doing, what it
waits for and what comes next.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta

from temporalio import workflow
from temporalio.common import Priority, SearchAttributePair, TypedSearchAttributes
from temporalio.exceptions import ActivityError, ApplicationError, ChildWorkflowError

with workflow.unsafe.imports_passed_through():
    from farshore.activities import messages as m
    from farshore.activities import signatures as s
    from farshore.contract import names
    from farshore.contract.errors import error_view, to_application_error, view_to_application_error
    from farshore.contract.machine import FenceKind, FenceToken
    from farshore.contract.runs import (
        Decision,
        DecisionKind,
        DecisionRecord,
        ErrorView,
        FailoverInput,
        MachineProgress,
        MachineResult,
        Outcome,
        PendingAction,
        ResourceView,
        RunKind,
        RunProgress,
        RunResult,
        RunStatus,
    )
    from farshore.domain.errors import Code, FarshoreError
    from farshore.plans.model import KINDS, BootGroup, ManualAction, Plan, ScriptAction
    from farshore.plans.schedule import Schedule, batches, schedule
    from farshore.plans.schedule import Step as PlanStep
    from farshore.workflows.details import group_label, run_page
    from farshore.workflows.failover_group import FailoverGroup
    from farshore.workflows.messages import (
        GroupReport,
        GroupRun,
        MachineReport,
        MachineRun,
        Proceed,
        StageOutcome,
    )
    from farshore.workflows.policy import machine_spec
    from farshore.workflows.stages import COURSES, Course, Order, Stage
    from farshore.workflows.steps import run_step

_FENCE = "fence"
_LISTED = 20  # machines named in the text of a failure
_LISTED_ERRORS = 50
_FULL_RESULTS = 200  # machines whose results are kept with all details
_PEOPLE = 2
_PRIORITY = {
    RunKind.UNPLANNED: 1,
    RunKind.PLANNED: 2,
    RunKind.CANCEL: 2,
    RunKind.CHANGE_POINT: 2,
    RunKind.COMMIT: 3,
}


class _Stop(Exception):
    """The run ends here; the machines settle."""

    def __init__(self, view: ErrorView) -> None:
        super().__init__(view.message)
        self.view = view


@dataclass
class _Part:
    """A started FailoverGroup."""

    id: str
    group: str
    machines: tuple[MachineRun, ...]
    handle: workflow.ChildWorkflowHandle[FailoverGroup, list[MachineResult]]


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
        self._phase = "starting"
        self._next = ""
        self._parts: list[_Part] = []
        self._reports: dict[tuple[str, str], GroupReport] = {}
        self._rows: dict[str, MachineReport] = {}
        self._group_of: dict[str, str] = {}
        self._pending: dict[str, PendingAction] = {}
        self._answers: dict[str, list[DecisionRecord]] = {}
        self._decisions: list[DecisionRecord] = []
        self._actions: list[str] = []
        self._log: list[str] = []
        self._errors: list[ErrorView] = []
        self._lost: set[str] = set()  # machines whose failure has been noticed
        self._abort: ErrorView | None = None
        self._network_deleted: tuple[ResourceView, ...] = ()

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
        record = DecisionRecord(**decision.model_dump(), at=workflow.now())
        self._answers.setdefault(decision.action, []).append(record)
        self._decisions.append(record)
        self._say(
            f"{decision.by}: {decision.decision.value} {decision.action} {decision.observation}".strip()
        )
        pending = self._pending[decision.action]
        if decision.decision is DecisionKind.APPROVE:
            pending = pending.model_copy(update={"given": (*pending.given, decision.by)})
            self._pending[decision.action] = pending
            missing = pending.needs - len(pending.given)
            if missing > 0:
                self._show()
                return f"recorded; {missing} more approval needed from somebody else"
        self._show()
        return f"{decision.decision.value} recorded for {decision.action}"

    @decide.validator
    def _may_decide(self, decision: Decision) -> None:
        pending = self._pending.get(decision.action)
        if pending is None:
            waits = ", ".join(self._pending) or "nothing"
            raise to_application_error(
                FarshoreError(
                    Code.NO_PENDING_ACTION, f"{decision.action!r} is not pending; this run waits for {waits}."
                )
            )
        again = decision.by.casefold() in (given.casefold() for given in pending.given)
        if again and decision.decision is DecisionKind.APPROVE:  # taking one's word back is always possible
            raise to_application_error(
                FarshoreError(
                    Code.ACTION_REJECTED,
                    f"{decision.by} has approved already; a different person must confirm.",
                    action="Let somebody else approve.",
                )
            )

    @workflow.update(
        description='Stop the run before its next step; machines are left in named states: {"action": "abort", '
        '"by": "your name", "observation": "why"}'
    )
    def abort(self, decision: Decision) -> str:
        self._abort = self._abort or _view(
            Code.RUN_ABORTED, f"{decision.by} stopped the run. {decision.observation}".strip()
        )
        self._say(f"{decision.by}: stop")
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
            phase=self._phase,
            started_at=self._started,
            pending=tuple(self._pending.values()),
            machines=tuple(rows),
            log=tuple(self._log[-20:]),
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
        self._enter("loading the plan")
        stopped: ErrorView | None = None
        try:
            pinned = await self._load()
            network = pinned.plan.network.failover
            await self._start_groups(pinned, network)
            for number, stage in enumerate(self._course.stages):
                await self._stage(pinned, stage, network)
                if number == 0:  # the machines are ours: nothing has been touched yet
                    await self._check_target(pinned)
                    self._look_for_abort()
                    network = await self._network(pinned)
        except _Stop as stop:
            stopped = stop.view
        except asyncio.CancelledError:
            stopped = _view(Code.RUN_ABORTED, "The run was cancelled.")
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
        chosen = self._chosen(pinned.plan)
        if ask.kind.value in KINDS:
            self._schedule = schedule(pinned.plan, ask.kind.value, chosen)
        if ask.point.startswith("p-") and len(chosen) != 1:
            raise FarshoreError(
                Code.INVALID_INPUT,
                f"A point id belongs to one machine, but this run has {len(chosen)}.",
                action='Name the machine ("machines": ["…"]), or give a point for each in "points".',
            )
        workflow.upsert_search_attributes([names.SITE.value_set(pinned.plan.sites.target)])
        return pinned

    def _chosen(self, plan: Plan) -> tuple[str, ...]:
        wanted = set(self._ask.machines)
        return tuple(name for name in plan.machines if not wanted or name in wanted)

    async def _check_target(self, pinned: m.PinnedPlan) -> None:
        if self._ask.kind not in (RunKind.PLANNED, RunKind.TEST, RunKind.UNPLANNED):
            return
        self._enter("checking the target")
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
            self._say(f"the check of the target failed: {error_view(error).message}")
        bad = [f for f in findings if f.severity == "error"]
        for finding in findings:
            self._say(f"{finding.severity}: {finding.message}")
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

    async def _network(self, pinned: m.PinnedPlan) -> str:
        plan = pinned.plan
        if self._ask.kind is not RunKind.TEST:
            return plan.network.failover
        if plan.network.test != "isolated":
            return await run_step(
                s.CHECK_ISOLATED,
                m.IsolationCall(site=plan.sites.target, network=plan.network.test),
                queue=pinned.target_queue,
                summary=f"Check that {plan.network.test} is isolated",
            )
        self._enter("making the isolated test network")
        return await run_step(
            s.ENSURE_TEST_NETWORK,
            m.TestNetworkCall(
                site=plan.sites.target,
                plan=plan.plan,
                run=self._holder,
                machine="",
                test=True,
                like=(plan.network.failover,),
            ),
            queue=pinned.target_queue,
            summary=f"Make an isolated network like {plan.network.failover}",
        )

    async def _start_groups(self, pinned: m.PinnedPlan, network: str) -> None:
        self._enter("starting the groups")
        chosen = set(self._chosen(pinned.plan))
        for group in pinned.plan.boot:
            members = [name for name in group.machines if name in chosen]
            slices = batches(members)
            for index, slice_ in enumerate(slices):
                part = group.group if len(slices) == 1 else f"{group.group}-{index + 1}"
                runs = tuple(self._machine_run(pinned, name, group, network) for name in slice_)
                handle = await workflow.start_child_workflow(
                    FailoverGroup.run,
                    GroupRun(
                        run=self._holder,
                        kind=self._ask.kind,
                        plan=self._ask.plan,
                        group=group.group,
                        part=part,
                        machines=runs,
                    ),
                    id=f"{self._id}/group/{part}",
                    static_summary=group_label(part, slice_),
                    priority=Priority(priority_key=_PRIORITY.get(self._ask.kind, 4)),
                    search_attributes=TypedSearchAttributes(
                        [
                            SearchAttributePair(names.PLAN, self._ask.plan),
                            SearchAttributePair(names.KIND, self._ask.kind.value),
                        ]
                    ),
                )
                self._parts.append(_Part(part, group.group, runs, handle))
                self._group_of.update(dict.fromkeys(slice_, part))

    def _machine_run(self, pinned: m.PinnedPlan, name: str, group: BootGroup, network: str) -> MachineRun:
        plan, ask = pinned.plan, self._ask
        return MachineRun(
            run=self._holder,
            kind=ask.kind,
            plan=ask.plan,
            machine=name,
            group=group.group,
            settings=plan.machines[name],
            spec=machine_spec(pinned, name),
            network=network,
            choice=ask.points.get(name, ask.point),
            guest_timeout=plan.shutdown.guest_timeout,
            force_off=plan.shutdown.force,
            try_shutdown=ask.shutdown,
            accept_data_loss=ask.accept_data_loss,
            named=name in ask.machines or name in ask.points,
        )

    async def _stage(self, pinned: m.PinnedPlan, stage: Stage, network: str) -> None:
        plan = pinned.plan
        fences = (
            await self._fences() if stage.name == "failover" and self._ask.kind is RunKind.UNPLANNED else ()
        )
        shutdown = stage.name == "shutdown"
        around = self._schedule
        if shutdown and around is not None:
            await self._run_actions(pinned, around.shutdown_before)
        order = stage.order
        if shutdown and order is Order.REVERSE and plan.shutdown.order == "parallel":
            order = Order.TOGETHER
        for group, parts in self._in_order(plan, order):
            boots = None
            if stage.name == "boot" and group is not None and around is not None:
                boots = next((g for g in around.boot if g.name == group.group), None)
            if boots is not None:
                await self._run_actions(pinned, boots.before)
            where = f" — group {group.group}" if group is not None else ""
            self._enter(f"{stage.title}{where}")
            await self._lead(stage, parts, Proceed(stage=stage.name, network=network, fences=fences))
            if boots is not None:
                await self._run_actions(pinned, boots.after)
        if shutdown and around is not None:
            await self._run_actions(pinned, around.shutdown_after)
        self._must_have_work(stage)

    def _in_order(self, plan: Plan, order: Order) -> Iterable[tuple[BootGroup | None, list[_Part]]]:
        if order is Order.TOGETHER:
            return [(None, self._parts)]
        groups = list(plan.boot) if order is Order.BOOT else list(reversed(plan.boot))
        found = [(group, [p for p in self._parts if p.group == group.group]) for group in groups]
        # a group may hold actions only: its turn comes all the same
        acts = {g.name for g in self._schedule.boot} if self._schedule and order is Order.BOOT else set[str]()
        return [(group, parts) for group, parts in found if parts or group.group in acts]

    async def _lead(self, stage: Stage, parts: Sequence[_Part], word: Proceed) -> None:
        """Send parts into a stage and wait until all have reported it."""
        self._look_for_abort()
        live = [p for p in parts if not p.handle.done()]
        for part in live:
            mine = {mr.machine for mr in part.machines}
            fences = tuple(token for token in word.fences if token.machine in mine)
            try:
                await part.handle.signal("proceed", word.model_copy(update={"fences": fences}))
            except ApplicationError:
                workflow.logger.info("group %s had ended", part.id)
        await workflow.wait_condition(
            lambda: (
                self._abort is not None
                or all((p.id, stage.name) in self._reports or p.handle.done() for p in live)
            )
        )
        self._look_for_abort()
        failed = [view for part in parts for view in self._newly_failed(part, stage)]
        if failed and (
            self._course.stops_at_error or (self._ask.kind is RunKind.TEST and stage.name == "prepare")
        ):
            raise _Stop(failed[0])

    def _newly_failed(self, part: _Part, stage: Stage) -> list[ErrorView]:
        """Failures of a part's machines that no stage has counted yet: also of machines or whole groups whose workflow
        was ended by hand, at whatever stage, and which therefore never reported."""
        report = self._reports.get((part.id, stage.name))
        lost: list[tuple[str, ErrorView]] = []
        if report is not None:
            lost = [
                (row.machine, row.error or _view(Code.RUN_FAILED, row.note or f"{row.machine} failed."))
                for row in report.machines
                if row.outcome in (StageOutcome.FAILED, StageOutcome.STOPPED)
            ]
        elif part.handle.done() and part.handle.exception() is not None:
            view = error_view(part.handle.exception() or RuntimeError(), subject=part.id)
            lost = [(mr.machine, view) for mr in part.machines]
        elif part.handle.done():
            lost = [
                (r.machine, r.error or _view(Code.RUN_FAILED, r.note or f"{r.machine} failed."))
                for r in part.handle.result()
                if r.outcome in (Outcome.FAILED, Outcome.STOPPED)
            ]
        fresh = [(machine, view) for machine, view in lost if machine not in self._lost]
        for machine, view in fresh:
            self._lost.add(machine)
            self._errors.append(view)
            self._say(f"{machine} failed: {view.message}")
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
            raise _Stop(_view(Code.OPERATION_NOT_ALLOWED, note))
        if all(row is not None and row.outcome is not StageOutcome.DONE for row in rows) and rows:
            first = (
                self._errors[0]
                if self._errors
                else _view(Code.RUN_FAILED, f"No machine got past {stage.name}.")
            )
            raise _Stop(first)

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
            answers = await self._wait_for(
                _FENCE,
                "Confirm that the source can't come back",
                f"Nothing proves that {', '.join(unproven)} is off. If the source still writes, data will differ on both "
                "sides. Two different people must confirm that the source site is down for good or cut off.",
                needs=_PEOPLE,
                timeout=None,
                given=tuple(by for by, _ in given),
            )
            given += [(a.by, a.observation) for a in answers if a.decision is DecisionKind.APPROVE]
        people = tuple(by for by, _ in given)
        words = "; ".join(f"{by}: {text or 'confirmed'}" for by, text in given)
        self._say(f"break-glass by {', '.join(people)} for {', '.join(unproven)}")
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

    # -- actions --------------------------------------------------------------------------------------------------

    async def _run_actions(self, pinned: m.PinnedPlan, steps: Sequence[PlanStep]) -> None:
        for step in steps:
            action = step.action
            self._look_for_abort()
            try:
                if isinstance(action, ManualAction):
                    await self._manual(action)
                else:
                    await self._script(pinned, action, step.id)
            except (ActivityError, FarshoreError, _Stop) as error:
                view = (
                    error.view
                    if isinstance(error, _Stop)
                    else error_view(error, subject=step.id, unreachable=Code.TARGET_UNREACHABLE)
                )
                self._actions.append(f"{action.title}: failed — {view.message}")
                self._errors.append(view)
                stops = (
                    action.stops(self._ask.kind.value)
                    if isinstance(action, ScriptAction)
                    else self._course.stops_at_error
                )
                if stops or view.code in (Code.ACTION_REJECTED, Code.RUN_ABORTED):
                    raise _Stop(view) from None
                self._say(f"{action.title} failed, the run goes on: {view.message}")
            else:
                self._actions.append(f"{action.title}: done")

    async def _manual(self, action: ManualAction) -> None:
        key = _slug(action.manual)
        number = 2
        while key in self._answers or key in self._pending:
            key = f"{_slug(action.manual)}-{number}"
            number += 1
        answers = await self._wait_for(
            key, action.manual, action.instructions or "", needs=1, timeout=action.timeout
        )
        refused = next((a for a in answers if a.decision is DecisionKind.REJECT), None)
        if refused is not None:
            raise _Stop(
                _view(
                    Code.ACTION_REJECTED,
                    f"{refused.by} rejected “{action.manual}”. {refused.observation}".strip(),
                )
            )

    async def _script(self, pinned: m.PinnedPlan, action: ScriptAction, where: str) -> None:
        self._enter(f"script {action.script} ({where})")
        key = f"{self._holder}:{where}:{action.script}"
        context = {
            "plan": self._ask.plan,
            "kind": self._ask.kind.value,
            "run": self._id,
            "machines": list(self._group_of),
            "reason": self._ask.reason,
        }
        if action.where == "guest" and action.machine:
            if action.machine not in self._group_of:
                self._say(f"script {action.script} left out: {action.machine} is not in this run")
                return
            output = await run_step(
                s.RUN_GUEST_SCRIPT,
                await self._guest_call(pinned, action),
                queue=pinned.target_queue,
                summary=f"Run {action.script} in {action.machine}",
                longer_by=action.timeout,
            )
        else:
            output = await run_step(
                s.RUN_WORKER_SCRIPT,
                m.WorkerScript(
                    plan=self._ask.plan,
                    run=self._id,
                    kind=self._ask.kind.value,
                    action=where,
                    script=action.script,
                    args=tuple(action.args),
                    timeout=action.timeout,
                    key=key,
                    context=context,
                ),
                queue=names.CONTROL_QUEUE,
                summary=f"Run {action.script}",
                longer_by=action.timeout,
            )
        if output.exit_code != 0:
            text = (output.stderr or output.stdout).strip()[-300:]
            raise FarshoreError(
                Code.ACTION_FAILED,
                f"Script {action.script} ended with {output.exit_code}. {text}".strip(),
                subject=where,
            )
        if output.stdout.strip():
            self._say(f"{action.script}: {output.stdout.strip()[-200:]}")

    async def _guest_call(self, pinned: m.PinnedPlan, action: ScriptAction) -> m.GuestScriptCall:
        machine = action.machine or ""
        text = await run_step(
            s.READ_SCRIPT,
            m.ReadScript(plan=self._ask.plan, script=action.script),
            queue=names.CONTROL_QUEUE,
            summary=f"Read {action.script}",
        )
        found = await run_step(
            s.FIND_MACHINE,
            m.OwnedCall(
                site=pinned.plan.sites.target,
                plan=self._ask.plan,
                run=self._holder,
                machine=machine,
                test=self._course.is_test,
            ),
            queue=pinned.target_queue,
            summary=f"Find {machine}",
        )
        return m.GuestScriptCall(
            site=pinned.plan.sites.target,
            plan=self._ask.plan,
            run=self._holder,
            machine=machine,
            test=self._course.is_test,
            script=text,
            args=tuple(action.args),
            timeout=action.timeout,
            resource=found,
        )

    async def _wait_for(
        self,
        key: str,
        title: str,
        instructions: str,
        *,
        needs: int,
        timeout: float | None,
        given: tuple[str, ...] = (),
    ) -> list[DecisionRecord]:
        """Suspend the run until people have decided. Raises ActionTimeout, RunAborted."""
        now = workflow.now()
        until: datetime | None = now + timedelta(seconds=timeout) if timeout else None
        self._pending[key] = PendingAction(
            action=key,
            title=title,
            instructions=instructions,
            since=now,
            until=until,
            needs=needs,
            given=given,
        )
        former = self._phase
        self._enter(f"waiting for a person: {title}", state="Waiting for a person")

        def decided() -> bool:
            answers = self._answers.get(key, [])
            return (
                self._abort is not None
                or any(a.decision is DecisionKind.REJECT for a in answers)
                or len(self._pending[key].given) >= needs
            )

        try:
            await workflow.wait_condition(
                decided,
                timeout=timedelta(seconds=timeout) if timeout else None,
                timeout_summary=f"Waiting for a person: {title}"[:200],
            )
        except TimeoutError:
            raise FarshoreError(
                Code.ACTION_TIMEOUT, f"Nobody decided on “{title}” within {timeout:.0f} s.", subject=key
            ) from None
        finally:
            self._pending.pop(key, None)
            self._enter(former, state="Running")
        self._look_for_abort()
        answers = self._answers.get(key, [])
        refused = next((a for a in answers if a.decision is DecisionKind.REJECT), None)
        if refused is not None and key == _FENCE:
            raise _Stop(
                _view(Code.FENCE_NOT_PROVEN, f"{refused.by} did not confirm the fence. {refused.observation}")
            )
        return answers

    # -- end ------------------------------------------------------------------------------------------------------

    async def _finish(self, stopped: ErrorView | None) -> RunResult:
        if stopped is not None:
            self._say(f"stopped: {stopped.message}")
            self._enter("stopping: machines record their state")
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
                stopped = _view(
                    Code.OPERATION_NOT_ALLOWED,
                    f"There is nothing to clean up in {self._ask.plan}: {self._course.skip_note}.",
                )
        result = self._result(machines, stopped)
        await workflow.wait_condition(workflow.all_handlers_finished)
        workflow.upsert_search_attributes([names.STATE.value_set(result.status.value)])
        self._enter(f"ended: {result.status.value}", state=result.status.value)
        if result.status is RunStatus.FAILED:
            view = stopped or (
                self._errors[0] if self._errors else _view(Code.RUN_FAILED, "No machine succeeded.")
            )
            raise self._failure(view, result)
        return result

    def _failure(self, view: ErrorView, result: RunResult) -> ApplicationError:
        listed = result.machines[:_LISTED]
        left = "; ".join(f"{r.machine}: {r.state or r.outcome.value}" for r in listed)
        if len(result.machines) > _LISTED:
            left += f"; and {len(result.machines) - _LISTED} more"
        base = view_to_application_error(view)
        text = f"{base.message}{f' — machines now: {left}' if left else ''}"
        return ApplicationError(
            text,
            view.model_dump(mode="json"),
            result.model_dump(mode="json"),
            type=view.code,
            non_retryable=True,
        )

    async def _results(self) -> list[MachineResult]:
        found: list[MachineResult] = []
        for part in self._parts:
            try:
                found += await self._end_of(part)
            except ChildWorkflowError as error:
                view = error_view(error, subject=part.id)
                if not self._lost.issuperset(mr.machine for mr in part.machines):
                    self._errors.append(view)
                found += [
                    MachineResult(machine=mr.machine, outcome=Outcome.FAILED, error=view)
                    for mr in part.machines
                ]
        return found

    async def _end_of(self, part: _Part) -> list[MachineResult]:
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
        try:
            statuses = await run_step(
                s.MACHINE_STATUS,
                m.StatusCall(machines=tuple(plan.machines)),
                queue=names.CONTROL_QUEUE,
                summary="Look whether another machine's test is still open",
            )
            if any(row["state"]["test"] not in self._course.skips_in for row in statuses.found.values()):
                return
            self._enter("removing the test network")
            gone = await run_step(
                s.REMOVE_RESOURCES,
                m.RemoveCall(
                    site=plan.sites.target, plan=plan.plan, run="", machine="", test=True, run_level=True
                ),
                queue=self._parts[0].machines[0].spec.target_queue,
                summary="Remove the isolated network of the test",
            )
        except ActivityError as error:
            self._errors.append(error_view(error, unreachable=Code.TARGET_UNREACHABLE))
            return
        self._network_deleted = gone.deleted
        if gone.leftovers:
            self._errors.append(_view(Code.CLEANUP_LEFTOVERS, "Left over: " + "; ".join(gone.leftovers)))

    def _result(self, machines: Sequence[MachineResult], stopped: ErrorView | None) -> RunResult:
        good = [r for r in machines if r.outcome is Outcome.SUCCEEDED]
        bad = [r for r in machines if r.outcome in (Outcome.FAILED, Outcome.STOPPED)]
        if stopped is not None or not (good or self._network_deleted):
            status = RunStatus.FAILED
        elif bad or self._errors:
            status = RunStatus.PARTIALLY_SUCCEEDED
        else:
            status = RunStatus.SUCCEEDED
        running = [r.running_at for r in good if r.running_at is not None]
        losses = [r.data_loss_seconds for r in good if r.data_loss_seconds is not None]
        return RunResult(
            plan=self._ask.plan,
            kind=self._ask.kind.value,
            status=status,
            plan_sha256=self._sha,
            started_at=self._started,
            finished_at=workflow.now(),
            rto_seconds=(max(running) - self._started).total_seconds() if running else None,
            rpo_seconds=max(losses) if losses else None,
            machines=tuple(_slim(machines)),
            decisions=tuple(self._decisions),
            actions=tuple(self._actions),
            network_deleted=self._network_deleted,
            errors=tuple(self._errors[:_LISTED_ERRORS]),
        )

    # -- help -----------------------------------------------------------------------------------------------------

    def _look_for_abort(self) -> None:
        if self._abort is not None:
            raise _Stop(self._abort)
        if workflow.cancellation_reason() is not None:  # however the cancellation was received
            raise _Stop(_view(Code.RUN_ABORTED, "The run was cancelled."))

    def _say(self, line: str) -> None:
        self._log.append(f"{workflow.now():%H:%M:%S} {line}"[:300])
        del self._log[:-100]

    def _enter(self, phase: str, *, state: str = "") -> None:
        self._phase = phase
        if state:
            workflow.upsert_search_attributes([names.STATE.value_set(state)])
        self._say(phase)
        self._show()

    def _show(self) -> None:
        workflow.set_current_details(
            run_page(
                self.progress(),
                course=self._course,
                run=self._id,
                namespace=workflow.info().namespace,
                now=workflow.now(),
                reason=self._ask.reason,
                errors=self._errors,
            )
        )


def _slim(machines: Sequence[MachineResult]) -> Sequence[MachineResult]:
    """A result must stay under Temporal's 2 MiB: of many machines, the details stay with the machines' own runs."""
    if len(machines) <= _FULL_RESULTS:
        return machines
    return [r.model_copy(update={"made": (), "deleted": (), "fence": r.fence[:100]}) for r in machines]


def _view(code: Code, message: str) -> ErrorView:
    return ErrorView.of(FarshoreError(code, message).info)


def _slug(text: str) -> str:
    words = "".join(c.lower() if c.isalnum() else " " for c in text).split()
    return "-".join(words)[:60] or "action"
