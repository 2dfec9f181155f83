"""The members of a group in its leg, the barrier under way, and what a leg of a group did."""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field

from farshore.domain.errors import FarshoreError
from farshore.replication.barrier import BarrierSource, CommonCut
from farshore.replication.journal.cycle import CycleResult
from farshore.replication.journal.groups import GroupPoint
from farshore.replication.legs import LegResult
from farshore.replication.loop import Leg


@dataclass(frozen=True, slots=True)
class GroupResult:
    """What a group's leg did. Seconds."""

    rounds: int  # begun
    points: int  # group points made
    newest: GroupPoint | None  # of the group, also when this leg made none
    missed: int  # rounds without a group point
    missed_by: Mapping[str, int]  # rounds that a member, or the group's log as "group:<name>", cost
    last_missed: Mapping[str, str]  # reasons by member, {} when the newest round made a group point
    pruned: int  # group points
    unusable: Mapping[str, str]  # group points that cannot be restored as a whole, and why
    newest_usable: GroupPoint | None
    worst_rpo_s: float  # the most that a recovery of the whole group would have lost during this leg
    stopped_because: str  # "time" | "asked" | "first point"
    members: Mapping[str, LegResult]


@dataclass(slots=True)
class Seat:
    """A member in its leg."""

    machine: str
    source: BarrierSource
    leg: Leg
    job: Future[CycleResult | None] | None = None
    doing: str = ""
    since: float = 0.0  # monotonic
    failures: int = 0
    rest_until: float = float("-inf")  # monotonic
    last: FarshoreError | None = None
    out: bool = False  # for good
    idled: bool = True  # has done its sweep and scrub for this round
    tidied: bool = False  # holds nothing for dead owners of the group


@dataclass(slots=True)
class Pending:
    """A barrier whose members are copying."""

    cut: CommonCut
    began: float  # monotonic
    waiting: set[str]
    results: dict[str, CycleResult] = field(default_factory=dict[str, CycleResult])
    reasons: dict[str, str] = field(default_factory=dict[str, str])
