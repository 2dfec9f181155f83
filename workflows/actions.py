"""The plan's actions around the steps of a run: people, and scripts on a worker or in a guest."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from temporalio import workflow
from temporalio.exceptions import ActivityError

with workflow.unsafe.imports_passed_through():
    from farshore.activities import messages as m
    from farshore.activities import signatures as s
    from farshore.contract import names
    from farshore.contract.errors import error_view
    from farshore.contract.runs import FailoverInput
    from farshore.domain.errors import Code, FarshoreError
    from farshore.plans.model import ManualAction, ScriptAction
    from farshore.plans.schedule import Step as PlanStep
    from farshore.workflows.decisions import Decisions, ask_for, refusal
    from farshore.workflows.journal import Journal, Stop, problem
    from farshore.workflows.stages import COURSES
    from farshore.workflows.steps import run_step


class PlanActions:
    """Of one run. `machines` are those of the run."""

    def __init__(
        self,
        ask: FailoverInput,
        run: str,
        holder: str,
        *,
        journal: Journal,
        decisions: Decisions,
        machines: Collection[str],
    ) -> None:
        self._ask = ask
        self._course = COURSES[ask.kind]
        self._run = run
        self._holder = holder
        self._journal = journal
        self._decisions = decisions
        self._machines = machines
        self.done: list[str] = []  # how each came out

    async def perform(self, pinned: m.PinnedPlan, steps: Sequence[PlanStep]) -> None:
        """One after another. Raises Stop where a failure ends the run."""
        for step in steps:
            action = step.action
            self._journal.look_for_abort()
            try:
                if isinstance(action, ManualAction):
                    await self._manual(action)
                else:
                    await self._script(pinned, action, step.id)
            except (ActivityError, FarshoreError, Stop) as error:
                view = (
                    error.view
                    if isinstance(error, Stop)
                    else error_view(error, subject=step.id, unreachable=Code.TARGET_UNREACHABLE)
                )
                self.done.append(f"{action.title}: failed — {view.message}")
                self._journal.errors.append(view)
                stops = (
                    action.stops(self._ask.kind.value)
                    if isinstance(action, ScriptAction)
                    else self._course.stops_at_error
                )
                if stops or view.code in (Code.ACTION_REJECTED, Code.RUN_ABORTED):
                    raise Stop(view) from None
                self._journal.say(f"{action.title} failed, the run goes on: {view.message}")
            else:
                self.done.append(f"{action.title}: done")

    async def _manual(self, action: ManualAction) -> None:
        key = _slug(action.manual)
        number = 2
        while self._decisions.knows(key):
            key = f"{_slug(action.manual)}-{number}"
            number += 1
        pending = ask_for(key, action.manual, action.instructions or "", timeout=action.timeout)
        refused = refusal(await self._decisions.wait_for(pending, action.timeout))
        if refused is not None:
            raise Stop(
                problem(
                    Code.ACTION_REJECTED,
                    f"{refused.by} rejected “{action.manual}”. {refused.observation}".strip(),
                )
            )

    async def _script(self, pinned: m.PinnedPlan, action: ScriptAction, where: str) -> None:
        self._journal.enter(f"script {action.script} ({where})")
        if action.where == "guest" and action.machine:
            if action.machine not in self._machines:
                self._journal.say(f"script {action.script} left out: {action.machine} is not in this run")
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
                self._worker_call(action, where),
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
            self._journal.say(f"{action.script}: {output.stdout.strip()[-200:]}")

    def _worker_call(self, action: ScriptAction, where: str) -> m.WorkerScript:
        return m.WorkerScript(
            plan=self._ask.plan,
            run=self._run,
            kind=self._ask.kind.value,
            action=where,
            script=action.script,
            args=tuple(action.args),
            timeout=action.timeout,
            key=f"{self._holder}:{where}:{action.script}",
            context={
                "plan": self._ask.plan,
                "kind": self._ask.kind.value,
                "run": self._run,
                "machines": list(self._machines),
                "reason": self._ask.reason,
            },
        )

    async def _guest_call(self, pinned: m.PinnedPlan, action: ScriptAction) -> m.GuestScriptCall:
        text = await run_step(
            s.READ_SCRIPT,
            m.ReadScript(plan=self._ask.plan, script=action.script),
            queue=names.CONTROL_QUEUE,
            summary=f"Read {action.script}",
        )
        where = {
            "site": pinned.plan.sites.target,
            "plan": self._ask.plan,
            "run": self._holder,
            "machine": action.machine or "",
            "test": self._course.is_test,
        }
        found = await run_step(
            s.FIND_MACHINE,
            m.OwnedCall.model_validate(where),
            queue=pinned.target_queue,
            summary=f"Find {action.machine or ''}",
        )
        return m.GuestScriptCall.model_validate(
            where | {"script": text, "args": tuple(action.args), "timeout": action.timeout, "resource": found}
        )


def _slug(text: str) -> str:
    words = "".join(c.lower() if c.isalnum() else " " for c in text).split()
    return "-".join(words)[:60] or "action"
