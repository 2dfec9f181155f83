"""What a process of power_process does, and where it is hit: one line between it and the test."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Any

STEPS = ("apply", "base", "prune", "remove", "materialise", "scrub", "")


@dataclass(frozen=True)
class Plan:
    """See the module."""

    store: str  # folder on the disk
    outside: str  # folder of what outlives the cut: the source, and the notes of what was acknowledged
    seed: int
    cut_at: str = ""  # a moment: what it begins with; "": any
    cut_after: int = -1  # so many such moments; -1: it never asks for a cut
    steps: tuple[str, ...] = ()  # the whole life; (): cycles and other steps by chance, for ever
    mutant: str = ""
    pull: int = (
        0  # the disk's server, which this process kills itself where it would ask for a cut, and goes on
    )

    def text(self) -> str:
        return json.dumps(asdict(self))

    @staticmethod
    def of(text: str) -> Plan:
        raw: dict[str, Any] = json.loads(text)
        raw["steps"] = tuple(raw["steps"])
        return Plan(**raw)
