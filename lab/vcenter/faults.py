"""Fault rules: which calls go wrong, how, and how often. Rules live as long as the process."""

from __future__ import annotations

import random
import threading
import time
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from farshore.lab.vcenter.soap import client_version, encode_fault
from farshore.lab.vcenter.vim import make_fault

Stage = Literal["call", "task", "folder"]
Action = Literal["fault", "drop", "status", "delay", "stuck", "slow", "short", "reset", "wrong"]


@dataclass(slots=True)
class FaultRule:
    """One rule. `method`: a WSDL name, `GET`/`HEAD`/`PUT` for /folder, or `*`; `vm`: name or moid, None for any.

    Stages and their actions:
    `call`   fault, drop (no answer), status (an HTTP status), delay; `when="after"` does the work first: a lost answer
    `task`   fault (at `percent`, or after the work with `when="after"`), stuck (at `percent` until cancelled), delay
    `folder` status, drop, delay, slow (`rate` bytes/s), short (clean end after `percent` of the body),
             reset (at `percent`), wrong (right length, wrong bytes)
    """

    method: str
    stage: Stage = "call"
    action: Action = "fault"
    vm: str | None = None
    count: int | None = 1
    """How often; None for ever."""
    skip: int = 0
    """Matching calls that pass first."""
    probability: float = 1.0
    seed: int = 0
    when: Literal["before", "after"] = "before"
    fault: str = "vmodl.fault.SystemError"
    message: str | None = None
    fields: dict[str, Any] = field(default_factory=dict[str, Any])
    status: int = 503
    delay: float | None = None
    percent: int = 50
    rate: int = 1 << 20
    id: int = 0
    hits: int = 0


@dataclass(slots=True)
class TaskPlan:
    """What a rule wants of a task."""

    delay: float | None = None
    stuck: bool = False
    fault: Any = None
    after: bool = False
    percent: int = 50


class DropConnectionError(Exception):
    """Close the connection without an answer."""


class HttpStatusError(Exception):
    """Answer with a bare HTTP status."""

    def __init__(self, status: int) -> None:
        super().__init__(status)
        self.status = status


class Faults:
    """The rules in force, oldest first; the first that matches and fires is used."""

    def __init__(self) -> None:
        self._rules: list[tuple[FaultRule, random.Random]] = []
        self._lock = threading.Lock()
        self._next = 1

    def add(self, rule: FaultRule) -> int:
        """Add a rule; return its id. Raises for an unknown fault type or fields that do not fit it."""
        if rule.action == "fault":
            encode_fault(self.make(rule), client_version(""))
        with self._lock:
            rule.id, self._next = self._next, self._next + 1
            self._rules.append((rule, random.Random(rule.seed)))
        return rule.id

    def remove(self, rule_id: int | None = None) -> None:
        """Remove one rule or all."""
        with self._lock:
            self._rules = [r for r in self._rules if rule_id is not None and r[0].id != rule_id]

    def listing(self) -> list[dict[str, Any]]:
        with self._lock:
            return [asdict(rule) for rule, _ in self._rules]

    def match(
        self, stage: Stage, method: str, target: str | None, moid: str | None = None, when: str = ""
    ) -> FaultRule | None:
        """The rule that fires for this call, counted, or None."""
        with self._lock:
            for rule, chance in self._rules:
                if (
                    rule.stage != stage
                    or rule.method not in ("*", method)
                    or (rule.vm is not None and rule.vm not in (target, moid))
                    or (when and rule.when != when)
                    or (rule.count is not None and rule.hits >= rule.count)
                ):
                    continue
                if rule.skip > 0:
                    rule.skip -= 1
                    continue
                if rule.probability < 1 and chance.random() >= rule.probability:
                    continue
                rule.hits += 1
                return rule
        return None

    def call(self, method: str, target: str | None, moid: str | None, when: str) -> None:
        """Carry out the rule for a SOAP call at this moment: may sleep, raise a fault, or cut the connection."""
        rule = self.match("call", method, target, moid, when)
        if rule is None:
            return
        if rule.delay:
            time.sleep(rule.delay)
        if rule.action == "fault":
            raise self.make(rule)
        if rule.action == "drop":
            raise DropConnectionError
        if rule.action == "status":
            raise HttpStatusError(rule.status)

    def task_plan(self, method: str, target: str) -> TaskPlan | None:
        """What should go wrong with a task that is about to start."""
        rule = self.match("task", method, target)
        if rule is None:
            return None
        return TaskPlan(
            delay=rule.delay,
            stuck=rule.action == "stuck",
            fault=self.make(rule) if rule.action == "fault" else None,
            after=rule.when == "after",
            percent=rule.percent,
        )

    @staticmethod
    def make(rule: FaultRule) -> Any:
        return make_fault(rule.fault, rule.message, **rule.fields)
