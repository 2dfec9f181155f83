"""FailoverGroup: at most 50 machines of one boot group. It passes the parent's word on, gathers reports and tells the
parent when all its machines have ended a stage, so that a plan of 1,000 machines costs its parent few events.
"""

from __future__ import annotations

import asyncio

from temporalio import workflow
from temporalio.common import SearchAttributePair, TypedSearchAttributes
from temporalio.exceptions import ApplicationError, ChildWorkflowError

with workflow.unsafe.imports_passed_through():
    from farshore.contract import names
    from farshore.contract.errors import error_view
    from farshore.contract.runs import MachineResult, Outcome
    from farshore.workflows.details import bullets, link, many, outcome, page, plain
    from farshore.workflows.machine_failover import MachineFailover
    from farshore.workflows.messages import (
        GroupReport,
        GroupRun,
        MachineReport,
        MachineRun,
        Proceed,
        StageOutcome,
    )
    from farshore.workflows.stages import COURSES


MachineHandle = workflow.ChildWorkflowHandle[MachineFailover, MachineResult]


@workflow.defn(name=names.FAILOVER_GROUP)
class FailoverGroup:
    """Child of a Failover."""

    @workflow.init
    def __init__(self, given: GroupRun) -> None:
        self._in = given
        self._words: list[Proceed] = []
        self._stop = ""
        self._stop_passed_on = False
        self._reports: dict[str, dict[str, MachineReport]] = {}  # stage -> machine -> report
        self._ended: dict[str, MachineReport] = {}  # machines that need no more stages
        self._results: dict[str, MachineResult] = {}

    @workflow.signal(description="Enter a stage")
    def proceed(self, word: Proceed) -> None:
        self._words.append(word)

    @workflow.signal(description="Stop every machine before its next step")
    def stop(self, reason: str) -> None:
        self._stop = self._stop or reason

    @workflow.signal(description="A machine has ended a stage")
    def machine_report(self, report: MachineReport) -> None:
        self._reports.setdefault(report.stage, {})[report.machine] = report
        if report.outcome is not StageOutcome.DONE:
            self._ended[report.machine] = report
        self._show()

    @workflow.run
    async def run(self, given: GroupRun) -> list[MachineResult]:
        """Start the machines, then pass on each stage until all have ended."""
        self._show()
        # All at once, here and below: one after another, each would cost this workflow a task of its own.
        started = await asyncio.gather(*(self._start(mr) for mr in given.machines))
        children = dict(zip((mr.machine for mr in given.machines), started, strict=True))
        watchers = [asyncio.create_task(self._watch(name, child)) for name, child in children.items()]
        everyone = set(children)
        while len(self._results) < len(everyone):
            try:
                await self._lead(children, everyone)
            except asyncio.CancelledError:
                # To end now would end the machines in the middle of a step: they stop before the next one and settle.
                self._stop = self._stop or "the group was cancelled by a person"
        await asyncio.gather(*watchers)
        await workflow.wait_condition(workflow.all_handlers_finished)
        return [self._results[mr.machine] for mr in given.machines]

    async def _lead(self, children: dict[str, MachineHandle], everyone: set[str]) -> None:
        """Wait for a word from above, or for the end of the last machine, and pass it on."""
        await workflow.wait_condition(lambda: self._has_news() or len(self._results) == len(everyone))
        if self._stop and not self._stop_passed_on:
            self._stop_passed_on = True
            left = sorted(everyone - set(self._results))
            await asyncio.gather(*(self._tell(children[name], "stop", self._stop) for name in left))
        elif self._words:
            word = self._words.pop(0)
            left = sorted(everyone - set(self._ended))
            await asyncio.gather(*(self._tell(children[name], "proceed", _own(word, name)) for name in left))
            await workflow.wait_condition(lambda stage=word.stage: self._all_reported(stage, everyone))
            await self._tell_parent(word.stage, everyone)

    def _has_news(self) -> bool:
        return bool(self._words) or (bool(self._stop) and not self._stop_passed_on)

    def _all_reported(self, stage: str, everyone: set[str]) -> bool:
        there = self._reports.get(stage, {})
        return bool(self._stop) or all(name in there or name in self._ended for name in everyone)

    async def _start(self, mr: MachineRun) -> MachineHandle:
        return await workflow.start_child_workflow(
            MachineFailover.run,
            mr,
            id=f"{names.holder_id(mr.run)}/{mr.machine}",
            static_summary=f"{COURSES[mr.kind].title}: {mr.machine}",
            search_attributes=TypedSearchAttributes(
                [
                    SearchAttributePair(names.PLAN, mr.plan),
                    SearchAttributePair(names.KIND, mr.kind.value),
                    SearchAttributePair(names.MACHINE, mr.machine),
                    SearchAttributePair(names.SITE, mr.spec.target_site),
                ]
            ),
        )

    async def _watch(self, name: str, child: MachineHandle) -> None:
        """A machine's workflow that ends without a word (terminated by hand) must not hold up the run."""
        try:
            result = await child
        except ChildWorkflowError as error:
            view = error_view(error, subject=name)
            result = MachineResult(
                machine=name, outcome=Outcome.FAILED, error=view, note="its workflow was ended"
            )
            self._ended.setdefault(
                name,
                MachineReport(
                    machine=name, stage="", outcome=StageOutcome.FAILED, note=view.message, error=view
                ),
            )
        if result.outcome is Outcome.SUCCEEDED:  # then it sends no report of its last stage
            last = COURSES[self._in.kind].stages[-1].name
            self.machine_report(
                MachineReport(machine=name, stage=last, outcome=StageOutcome.DONE, note=result.note)
            )
        self._results[name] = result

    async def _tell(self, child: MachineHandle, signal: str, word: Proceed | str) -> None:
        try:
            await child.signal(signal, word)
        except ApplicationError:
            workflow.logger.info("a machine of %s had ended before %s", self._in.part, signal)

    async def _tell_parent(self, stage: str, everyone: set[str]) -> None:
        parent = workflow.info().parent
        if parent is None:
            return
        there = self._reports.get(stage, {})
        rows = [there.get(name) or self._ended.get(name) for name in sorted(everyone)]
        await workflow.get_external_workflow_handle(parent.workflow_id, run_id=parent.run_id).signal(
            "group_report",
            GroupReport(
                part=self._in.part, stage=stage, machines=tuple(row for row in rows if row is not None)
            ),
        )

    def _show(self) -> None:
        course = COURSES[self._in.kind]
        titles = {stage.name: stage.title for stage in course.stages}
        latest: dict[str, MachineReport] = {}
        for stage in course.stages:
            latest.update(self._reports.get(stage.name, {}))
        lines: list[str] = []
        for mr in self._in.machines:
            row = self._ended.get(mr.machine) or latest.get(mr.machine)
            text = (
                outcome(titles.get(row.stage, row.stage), row.outcome.value, row.note) if row else "not begun"
            )
            name = link(mr.machine, f"{names.holder_id(mr.run)}/{mr.machine}", workflow.info().namespace)
            lines.append(f"{name}: {text}")
        workflow.set_current_details(
            page(
                f"**{course.title} of {plain(self._in.plan)}, group {plain(self._in.part)}**: "
                f"{many(len(self._in.machines), 'machine')}",
                bullets(lines),
            )
        )


def _own(word: Proceed, machine: str) -> Proceed:
    """The parent's word as it concerns one machine."""
    return word.model_copy(update={"fences": tuple(t for t in word.fences if t.machine == machine)})
