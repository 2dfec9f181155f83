"""What a run waits for people to decide, and what they have said. An update only records; the run acts on it."""

from __future__ import annotations

from datetime import datetime, timedelta

from temporalio import workflow

with workflow.unsafe.imports_passed_through():
    from farshore.contract.errors import to_application_error
    from farshore.contract.runs import Decision, DecisionKind, DecisionRecord, PendingAction
    from farshore.domain.errors import Code, FarshoreError
    from farshore.workflows.journal import Journal


class Decisions:
    """Of one run."""

    def __init__(self, journal: Journal) -> None:
        self._journal = journal
        self._answers: dict[str, list[DecisionRecord]] = {}
        self.pending: dict[str, PendingAction] = {}
        self.records: list[DecisionRecord] = []

    def knows(self, key: str) -> bool:
        """Whether an action of this id waits or has been answered."""
        return key in self._answers or key in self.pending

    def may_record(self, decision: Decision) -> None:
        """Refuses what nothing waits for, and a second approval by the same person."""
        pending = self.pending.get(decision.action)
        if pending is None:
            waits = ", ".join(self.pending) or "nothing"
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

    def record(self, decision: Decision) -> str:
        """Returns what the person is told."""
        record = DecisionRecord(**decision.model_dump(), at=workflow.now())
        self._answers.setdefault(decision.action, []).append(record)
        self.records.append(record)
        self._journal.say(
            f"{decision.by}: {decision.decision.value} {decision.action} {decision.observation}".strip()
        )
        pending = self.pending[decision.action]
        if decision.decision is DecisionKind.APPROVE:
            pending = pending.model_copy(update={"given": (*pending.given, decision.by)})
            self.pending[decision.action] = pending
            missing = pending.needs - len(pending.given)
            if missing > 0:
                self._journal.show()
                return f"recorded; {missing} more approval needed from somebody else"
        self._journal.show()
        return f"{decision.decision.value} recorded for {decision.action}"

    async def wait_for(self, pending: PendingAction, timeout: float | None) -> list[DecisionRecord]:
        """Suspend the run until people have decided; `timeout` in seconds. Raises ActionTimeout, and Stop for an abort."""
        key, title = pending.action, pending.title
        self.pending[key] = pending
        former = self._journal.phase
        self._journal.enter(f"waiting for a person: {title}", state="Waiting for a person")

        def decided() -> bool:
            return (
                self._journal.abort is not None
                or refusal(self._answers.get(key, [])) is not None
                or len(self.pending[key].given) >= pending.needs
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
            self.pending.pop(key, None)
            self._journal.enter(former, state="Running")
        self._journal.look_for_abort()
        return self._answers.get(key, [])


def refusal(answers: list[DecisionRecord]) -> DecisionRecord | None:
    """The first word against it."""
    return next((a for a in answers if a.decision is DecisionKind.REJECT), None)


def ask_for(
    key: str,
    title: str,
    instructions: str,
    *,
    needs: int = 1,
    timeout: float | None = None,
    given: tuple[str, ...] = (),
) -> PendingAction:
    """Something to wait for, from now on; `timeout` in seconds."""
    now = workflow.now()
    until: datetime | None = now + timedelta(seconds=timeout) if timeout else None
    return PendingAction(
        action=key,
        title=title,
        instructions=instructions,
        since=now,
        until=until,
        needs=needs,
        given=given,
    )
