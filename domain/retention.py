"""Which recovery points are kept: buckets by age, and what is never pruned. Pure.

The buckets follow the documented A2A policy: everything for two hours, then one an hour for a day, one per two hours
for a week, one per four hours up to fifteen days. Intervals are half-open, [from, to), and windows of a bucket are
aligned to the epoch of time and not to "now", so that the choice does not wander from cycle to cycle.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime
from itertools import pairwise

from farshore.domain.points import Consistency, RecoveryPoint

HOUR = 3600.0
DAY = 24 * HOUR


@dataclass(frozen=True, slots=True)
class RetentionPolicy:
    """`buckets` are (age at which the bucket ends, one point is kept per this many seconds; 0 keeps all), in seconds,
    ages ascending. Points older than the last bucket are pruned."""

    buckets: tuple[tuple[float, float], ...] = (
        (2 * HOUR, 0.0),
        (DAY, HOUR),
        (7 * DAY, 2 * HOUR),
        (15 * DAY, 4 * HOUR),
    )

    def __post_init__(self) -> None:
        ages = [age for age, _ in self.buckets]
        if not ages or ages[0] <= 0 or any(b <= a for a, b in pairwise(ages)):
            raise ValueError("retention buckets need ascending positive ages")
        if any(every < 0 for _, every in self.buckets):
            raise ValueError("a bucket cannot keep a point per a negative number of seconds")

    @staticmethod
    def within(seconds: float) -> RetentionPolicy:
        """The default buckets cut off at an age of `seconds`: what a plan's "keep for 24 h" means."""
        cut: list[tuple[float, float]] = []
        for age, every in RetentionPolicy().buckets:
            cut.append((min(age, seconds), every))
            if age >= seconds:
                break
        else:
            cut.append((seconds, cut[-1][1]))
        return RetentionPolicy(tuple(cut))


def keep_all(seconds: float) -> RetentionPolicy:
    """Keep every point for `seconds`, then none."""
    return RetentionPolicy(((seconds, 0.0),))


def prune(
    points: Iterable[RecoveryPoint], policy: RetentionPolicy, now: datetime, *, held: Iterable[str] = ()
) -> list[RecoveryPoint]:
    """The points that `policy` gives up at `now`, oldest first.

    Of each window of a bucket the newest app-consistent point stays, else the newest. Never pruned: the newest point,
    pinned points, those whose id is in `held`, the newest app-consistent point (it stays until a newer one exists), and
    points from the future of a wrong clock.
    """
    ordered = sorted(points, key=lambda point: point.cycle)
    if not ordered:
        return []
    keep: set[str] = {ordered[-1].id, *held}
    keep.update(point.id for point in ordered if point.pinned)
    consistent = [point for point in ordered if point.consistency is Consistency.APPLICATION]
    if consistent:
        keep.add(consistent[-1].id)
    chosen: dict[tuple[int, int], RecoveryPoint] = {}
    for point in ordered:
        age = (now - point.taken_at).total_seconds()
        if age < 0:
            keep.add(point.id)
            continue
        bucket = next((index for index, (end, _) in enumerate(policy.buckets) if age < end), None)
        if bucket is None:
            continue
        every = policy.buckets[bucket][1]
        if every == 0:
            keep.add(point.id)
            continue
        window = (bucket, int(point.taken_at.timestamp() // every))
        known = chosen.get(window)
        if known is None or _rank(point) >= _rank(known):
            chosen[window] = point
    keep.update(point.id for point in chosen.values())
    return [point for point in ordered if point.id not in keep]


def gently(points: Iterable[RecoveryPoint], victims: Iterable[RecoveryPoint]) -> list[RecoveryPoint]:
    """The oldest of `victims`, at most half of `points`: what one pruning may remove.

    Whatever a wrong clock makes of the ages, a single pruning leaves half of the history; a true backlog goes with the
    next ones.
    """
    most = sum(1 for _ in points) // 2
    return sorted(victims, key=lambda point: point.cycle)[:most]


def _rank(point: RecoveryPoint) -> tuple[bool, int]:
    return point.consistency is Consistency.APPLICATION, point.cycle
