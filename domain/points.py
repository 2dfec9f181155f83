"""Recovery points: what they are called, what their label promises, how one is chosen."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum

from farshore.domain.errors import Code, FarshoreError


class Consistency(StrEnum):
    """What a point's label promises. Only what was achieved is ever written."""

    CRASH = "crash-consistent"
    FILE_SYSTEM = "file-system-consistent"
    APPLICATION = "app-consistent"


class PointChoice(StrEnum):
    """How a run chooses the point of each machine. A point id (`p-…`) may stand instead, for one machine."""

    LATEST = "latest"  # capture what can still be captured, then the newest
    LATEST_PROCESSED = "latest-processed"  # the newest that is ready: lowest recovery time
    LATEST_APP_CONSISTENT = "latest-app-consistent"
    LATEST_CRASH_CONSISTENT = "latest-crash-consistent"


@dataclass(frozen=True, slots=True)
class RecoveryPoint:
    """A committed point of one machine. Times are aware UTC; `taken_at` is the instant of the cut at the source."""

    id: str  # p-<cycle:010d>-<first 8 hex of the manifest's digest>
    machine: str
    cycle: int
    taken_at: datetime
    consistency: Consistency
    digest: str  # of the manifest
    size_bytes: int  # sum of the disks
    pinned: bool = False
    final: bool = False  # taken after the source was shut down: nothing is lost


def choose(
    points: Iterable[RecoveryPoint],
    choice: PointChoice | str,
    *,
    machine: str,
    damaged: Mapping[str, str] | None = None,
) -> RecoveryPoint:
    """The point that `choice` (a PointChoice or a point id) means. `damaged` are ids that cannot be restored, and why: a
    PointChoice passes over them, an id is refused.

    Raises NoRecoveryPoint when there is none at all, ReplicaDamaged when the wanted one or all are damaged, PointNotFound
    for an unknown id, PointNotConsistent when no point has the wanted consistency.
    """
    every = sorted(points, key=lambda p: p.cycle)
    if not every:
        raise FarshoreError(Code.NO_RECOVERY_POINT, f"{machine} has no recovery point yet.", subject=machine)
    damaged = damaged or {}
    known = [p for p in every if p.id not in damaged]
    if choice in damaged or not known:
        wanted = choice if choice in damaged else every[-1].id
        raise FarshoreError(
            Code.REPLICA_DAMAGED,
            f"Point {wanted} of {machine} is damaged: {damaged[wanted]} Of {len(every)} points {len(known)} are sound"
            f"{f', the newest is {known[-1].id}' if known else ''}.",
            subject=machine,
        )
    if choice not in set(PointChoice):
        for point in known:
            if point.id == choice:
                return point
        newest = ", ".join(p.id for p in known[-3:])
        raise FarshoreError(
            Code.POINT_NOT_FOUND,
            f"{machine} has no recovery point {choice!r}; it keeps {len(known)}, the newest are {newest}.",
            subject=machine,
        )
    match PointChoice(choice):
        case PointChoice.LATEST | PointChoice.LATEST_PROCESSED:
            return known[-1]
        case PointChoice.LATEST_CRASH_CONSISTENT:
            wanted = [p for p in known if p.consistency is Consistency.CRASH]
        case PointChoice.LATEST_APP_CONSISTENT:
            wanted = [p for p in known if p.consistency is Consistency.APPLICATION]
    if not wanted:
        raise FarshoreError(
            Code.POINT_NOT_CONSISTENT, f"{machine} keeps no point for {choice!r}.", subject=machine
        )
    return wanted[-1]
