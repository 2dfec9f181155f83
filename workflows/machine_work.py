"""What the steps of a machine in a run share: what is known so far, how a step is run, what is shown of it.

The steps themselves are in `source_steps.py` and `target_steps.py`, their order in `stages.py`; `machine_failover.py`
is the workflow that takes them.
"""

from __future__ import annotations

from collections.abc import Awaitable
from datetime import datetime
from typing import Any, TypeVar

from temporalio import workflow
from temporalio.exceptions import ActivityError

with workflow.unsafe.imports_passed_through():
    from pydantic import BaseModel

    from farshore.activities import messages as m
    from farshore.activities import signatures as s
    from farshore.contract import names
    from farshore.contract.errors import error_view
    from farshore.contract.machine import FenceKind, FenceToken, MachineStatus
    from farshore.contract.runs import ErrorView, MachineResult, Outcome, PointView, ResourceView, RunKind
    from farshore.domain.errors import Code
    from farshore.workflows.details import bullets, clock, link, page, plain
    from farshore.workflows.messages import MachineRun
    from farshore.workflows.stages import COURSES
    from farshore.workflows.steps import run_step

In = TypeVar("In")
Out = TypeVar("Out")
# What the timeline says of the changes of a machine's state; the keys are part of update ids.
_RECORDS = {
    "begin": "Taking the machine's lock",
    "halt": "Stopping the replication loop",
    "promote": "Promoting the replica with the proof that the source is off",
    "advance": "Recording that the recovery site's part is done",
    "settle success": "Recording the new state and releasing the lock",
    "settle failure": "Recording the failure and releasing the lock",
    "settle cancelled": "Recording the stop and releasing the lock",
}


class MachineWork:
    """One machine in one run."""

    def __init__(self, given: MachineRun) -> None:
        self._in = given
        self._course = COURSES[given.kind]
        self._spec = given.spec
        self._queue = ""  # of the step that runs
        self._doing = "waiting for the run to begin"
        self._done: list[str] = []
        # what the steps find out
        self._began_at = workflow.now()
        self._reachable = True
        self._source_stopped = False  # from the moment in which it may have been
        self._final: PointView | None = None
        self._fence: FenceToken | None = None
        self._point: PointView | None = None
        self._disks: tuple[m.PointDisk, ...] = ()
        self._made_disks: tuple[ResourceView, ...] = ()
        self._made_nics: tuple[ResourceView, ...] = ()
        self._made: tuple[ResourceView, ...] = ()
        self._deleted: tuple[ResourceView, ...] = ()
        self._leftovers: tuple[str, ...] = ()
        self._addresses: tuple[str, ...] = ()
        self._running_at: datetime | None = None
        self._network = given.network
        self._state = ""
        self._note = ""

    async def _step(
        self,
        step: s.Step[In, Out],
        given: In,
        *,
        queue: str,
        summary: str,
        rules: s.Rules | None = None,
        longer_by: float = 0.0,
    ) -> Out:
        self._queue = queue
        return await run_step(step, given, queue=queue, summary=summary, rules=rules, longer_by=longer_by)

    async def _attempt(self, step: Awaitable[None], failed: str, *, but: tuple[Code, ...] = ()) -> None:
        """Best effort: a dead site is noted and never waited for again in this run."""
        try:
            await step
        except ActivityError as error:
            view = error_view(error, subject=self._in.machine)
            if view.code in but:
                raise
            if view.code == Code.SOURCE_UNREACHABLE:
                self._reachable = False
            self._done.append(f"{failed}: {view.message}")
            self._show()

    async def _update(self, update: str, payload: BaseModel, purpose: str) -> MachineStatus:
        run = workflow.info().parent
        return await self._step(
            s.UPDATE_MACHINE,
            m.UpdateCall(
                machine=self._in.machine,
                update=update,
                payload=payload.model_dump(mode="json"),
                update_id=f"{purpose} {run.run_id if run else workflow.info().run_id}",
            ),
            queue=names.CONTROL_QUEUE,
            summary=f"{_RECORDS.get(purpose, f'Record: {purpose}')}: {self._in.machine}",
        )

    def _owned(self, **other: Any) -> dict[str, Any]:
        return {
            "site": self._spec.target_site,
            "plan": self._in.plan,
            "run": self._in.run,
            "machine": self._in.machine,
            "test": self._course.is_test,
        } | other

    def _say(self, doing: str) -> str:
        """Show what is being done; returns the text for the step's label."""
        self._doing = doing
        self._show()
        return f"{doing[:1].upper()}{doing[1:]}: {self._in.machine}"

    def _show(self, error: ErrorView | None = None) -> None:
        run, namespace = names.holder_id(self._in.run), workflow.info().namespace
        lines = [f"**Problem**: {plain(error.text(), 1000)}"] if error is not None else []
        lines += [f"✓ {plain(line)}" for line in self._done]
        lines.append(f"Part of {link(run, run, namespace)}; this text is of {clock(workflow.now())}")
        title = f"**{plain(self._in.machine)}** ({self._course.title.lower()}): {plain(self._doing)}"
        workflow.set_current_details(page(title, bullets(lines)))

    def _result(self, outcome: Outcome, error: ErrorView | None) -> MachineResult:
        return MachineResult(
            machine=self._in.machine,
            outcome=outcome,
            state=self._state,
            note=self._note,
            point=self._point,
            data_loss_seconds=self._loss() if outcome is Outcome.SUCCEEDED else None,
            fence=self._fence.evidence if self._fence else "",
            made=self._made or (*self._made_disks, *self._made_nics),
            deleted=self._deleted,
            leftovers=self._leftovers,
            addresses=self._addresses,
            running_at=self._running_at,
            error=error,
        )

    def _loss(self) -> float | None:
        if self._point is None or self._in.kind in (RunKind.CLEANUP, RunKind.COMMIT, RunKind.CANCEL):
            return None
        if self._final is not None and self._point.id == self._final.id:
            return 0.0
        proven = self._fence is not None and self._fence.kind is not FenceKind.BREAK_GLASS
        cut_off = self._fence.at if self._fence is not None and proven else self._began_at
        return max(0.0, (cut_off - self._point.taken_at).total_seconds())

    def _side(self) -> Code:
        """Whose worker was awaited when a step found none."""
        return {
            self._spec.source_queue: Code.SOURCE_UNREACHABLE,
            self._spec.target_queue: Code.TARGET_UNREACHABLE,
        }.get(self._queue, Code.TEMPORAL_UNREACHABLE)
