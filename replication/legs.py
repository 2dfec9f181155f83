"""What a leg shall do, what it did, and the rules that the legs of machines and of groups share."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import datetime

from farshore.domain.errors import FarshoreError
from farshore.domain.points import Consistency, RecoveryPoint
from farshore.domain.retention import RetentionPolicy
from farshore.replication.journal.cycle import CycleResult, Pace
from farshore.replication.journal.writer import Writer
from farshore.replication.ports import SourceCut

_CLOCK_DOUBT = (
    3600.0  # seconds that the clock may be ahead of a point that was made just now; beyond, no pruning
)


@dataclass(frozen=True, slots=True)
class LegPlan:
    """What a leg shall do. Seconds."""

    machine: str
    owner: str  # for people: who replicates (workflow, run, attempt)
    interval_s: float
    app_consistent_every_s: float | None = None  # None: crash-consistent points only
    retention: RetentionPolicy = field(default_factory=RetentionPolicy)
    until_s: float = 3600.0  # no cycle is begun after this time
    stop_after_first: bool = False  # end with the first committed point
    final: bool = False  # the source is shut down: its points are marked as final
    resync: bool = False  # the first cycle reads the replica back and compares everything
    want: Consistency = Consistency.CRASH  # of ordinary points
    backoff_cap_s: float = 60.0
    pace: Pace = field(default_factory=Pace)
    redo_every_s: float = 10.0  # what is overwritten in this time is written to the replica disks once
    base_every_s: float = 900.0  # between two bases: bounds how much journal a restore replays
    sweep_every_s: float = 300.0
    scrub_every_s: float | None = 7 * 86400.0  # a whole round in this time; None: no scrub
    audit_every_s: float | None = (
        None  # all of the source is read once in this time, whatever it reports; None: never
    )
    tags: Mapping[str, str] = field(default_factory=dict[str, str])
    asked_at: datetime | None = (
        None  # when this attempt was scheduled: openings by others after that fence it
    )


@dataclass(frozen=True, slots=True)
class LegResult:
    """What a leg did. Bytes and seconds; times are aware UTC."""

    cycles: int  # attempted
    points: int  # committed
    newest: RecoveryPoint | None  # of the machine, also when this leg made none
    full_copies: int
    bytes_changed: int
    bytes_read: int
    bytes_shipped: int
    pruned: int
    errors: int  # waited out
    last_error: str  # in words, "" if the last cycle was good
    stopped_because: str  # "time" | "asked" | "first point"
    newest_captured_at: datetime | None  # instant of the newest cut whose bytes all reached the target
    newest_recoverable_at: datetime | None  # instant of the newest point that is not known to be damaged
    newest_applied_at: datetime | None  # instant of the newest point that the replica disks have reached
    bases: int  # made
    damage: tuple[str, ...]  # points that are known to be damaged
    worst_rpo_s: float  # the most that would have been lost at any moment of this leg, once it had a point


@dataclass(frozen=True, slots=True)
class Part:
    """A machine's part of a group's point."""

    cut: SourceCut
    tags: Mapping[str, str]
    committed: Callable[[Writer, CycleResult], None]
    """Called right after the commit, before anything is pruned."""


def backoff(plan: LegPlan, failures: int, error: FarshoreError) -> float:
    """Seconds to wait after so many failures in a row, the last of which was `error`."""
    pause = min(plan.backoff_cap_s, 2.0 ** min(failures - 1, 16))
    return pause if error.retry_after is None else max(pause, error.retry_after)


def clock_doubt(newest: RecoveryPoint, now: datetime, took: float) -> str:
    """Why nothing may be pruned by a clock that says `now`, `took` seconds after the newest point was begun; or ""."""
    ahead = (now - newest.taken_at).total_seconds() - took
    return f"the clock is {ahead:.0f} s ahead of the newest point" if ahead > _CLOCK_DOUBT else ""
