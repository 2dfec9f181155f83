"""Seeded fault rules: which request is hit, and how."""

from __future__ import annotations

import fnmatch
import random
from dataclasses import asdict, dataclass

from farshore.lab.azure.model import Json

ACTIONS = frozenset(
    {
        "status",  # answer `status` with `code` and `message`, nothing applied
        "drop_before",  # close the connection, nothing applied
        "drop_after",  # apply, then close the connection: the caller can't know (a silent re-send of the same call is lost, too)
        "slow",  # wait `seconds` before handling
        "lro_fail",  # the operation this request starts fails with `code`
        "lro_cancel",  # it ends Canceled
        "lro_stuck",  # it never ends, until released through the control API
    }
)


@dataclass
class Fault:
    """A rule. Empty matchers match everything; globs ignore case."""

    action: str
    operation: str = "*"
    """Glob on the SDK's name of the operation, e.g. `compute.Disks.*`; polls are `lro.status` and `lro.result`, the token
    endpoint is `entra.token`, disk bytes are `sas.*`."""
    method: str = "*"
    path: str = "*"
    skip: int = 0
    """How many matching requests pass first."""
    count: int | None = 1
    """How many are hit; None: all."""
    probability: float = 1.0
    status: int = 500
    code: str = "InternalServerError"
    message: str = "The laboratory was told to fail here."
    retry_after: int | None = None
    seconds: float = 0.0
    id: int = 0
    hits: int = 0
    """How often it has struck; the answer's, not the caller's."""

    def __post_init__(self) -> None:
        if self.action not in ACTIONS:
            raise ValueError(f"unknown action {self.action}; known: {', '.join(sorted(ACTIONS))}")

    def to_json(self) -> Json:
        return asdict(self)


class Faults:
    """The rules in force, in the order they were added; the first that strikes wins."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)
        self._next = 1
        self.rules: list[Fault] = []

    def reseed(self, seed: int) -> None:
        self._random = random.Random(seed)

    def load(self, docs: list[Json]) -> None:
        self.rules = [Fault(**doc) for doc in docs]
        self._next = max((rule.id for rule in self.rules), default=0) + 1

    def add(self, rule: Fault) -> Fault:
        rule.id, rule.hits = self._next, 0
        self._next += 1
        self.rules.append(rule)
        return rule

    def remove(self, id_: int | None) -> None:
        self.rules = [] if id_ is None else [rule for rule in self.rules if rule.id != id_]

    def strike(self, operation: str, method: str, path: str) -> Fault | None:
        """The rule that hits this request, its counters moved."""
        for rule in self.rules:
            if rule.count is not None and rule.hits >= rule.count:
                continue
            if not _match(rule, operation, method, path):
                continue
            if rule.skip > 0:
                rule.skip -= 1
                continue
            if rule.probability < 1.0 and self._random.random() >= rule.probability:
                continue
            rule.hits += 1
            return rule
        return None


def _match(rule: Fault, operation: str, method: str, path: str) -> bool:
    return (
        fnmatch.fnmatchcase(operation.lower(), rule.operation.lower())
        and fnmatch.fnmatchcase(method.lower(), rule.method.lower())
        and fnmatch.fnmatchcase(path.lower(), rule.path.lower())
    )
