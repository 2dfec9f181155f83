"""What retention keeps, and what it never gives up."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from farshore.domain.points import Consistency, RecoveryPoint
from farshore.domain.retention import DAY, HOUR, RetentionPolicy, gently, keep_all, prune

NOW = datetime(2026, 5, 20, 10, 30, tzinfo=UTC)


def point(cycle: int, age: float, *, app: bool = False, pinned: bool = False) -> RecoveryPoint:
    return RecoveryPoint(
        id=f"p-{cycle:010d}-00000000",
        machine="vm",
        cycle=cycle,
        taken_at=NOW - timedelta(seconds=age),
        consistency=Consistency.APPLICATION if app else Consistency.CRASH,
        digest="",
        size_bytes=1,
        pinned=pinned,
    )


ages = st.lists(st.floats(0, 20 * DAY), min_size=1, max_size=80, unique=True)


@st.composite
def machines(draw) -> list[RecoveryPoint]:
    return [
        point(number, age, app=draw(st.booleans()), pinned=draw(st.integers(0, 9)) == 0)
        for number, age in enumerate(sorted(draw(ages), reverse=True))
    ]


def test_a_five_minute_policy_keeps_about_166_points_in_the_long_run() -> None:
    kept: list[RecoveryPoint] = []
    start = NOW
    for step in range(16 * 288):
        now = start + timedelta(minutes=5 * step)
        new = point(step, 0)
        kept.append(RecoveryPoint(new.id, "vm", step, now, Consistency.CRASH, "", 1))
        if step % 24 and step != 16 * 288 - 1:
            continue
        gone = {p.id for p in prune(kept, RetentionPolicy(), now)}
        kept = [p for p in kept if p.id not in gone]
    assert 162 <= len(kept) <= 170


@settings(deadline=None, max_examples=60)
@given(machines())
def test_the_newest_the_pinned_the_held_and_the_last_app_consistent_stay(points: list[RecoveryPoint]) -> None:
    held = {points[len(points) // 2].id}
    victims = {p.id for p in prune(points, RetentionPolicy(), NOW, held=held)}
    assert points[-1].id not in victims
    assert not victims & held
    assert not victims & {p.id for p in points if p.pinned}
    app = [p for p in points if p.consistency is Consistency.APPLICATION]
    assert not app or app[-1].id not in victims


@settings(deadline=None, max_examples=60)
@given(machines())
def test_what_is_pruned_has_a_better_one_in_its_window_or_is_too_old(points: list[RecoveryPoint]) -> None:
    policy = RetentionPolicy()
    victims = prune(points, policy, NOW)
    kept = [p for p in points if p not in victims]
    for victim in victims:
        age = (NOW - victim.taken_at).total_seconds()
        if age >= 15 * DAY:
            continue
        assert age >= 2 * HOUR, "everything of the first two hours is kept"
        every = next(every for end, every in policy.buckets if age < end)
        window = victim.taken_at.timestamp() // every
        better = [p for p in kept if p.taken_at.timestamp() // every == window]
        assert better
        if victim.consistency is Consistency.APPLICATION:
            assert any(p.consistency is Consistency.APPLICATION and p.cycle > victim.cycle for p in better)


@settings(deadline=None, max_examples=60)
@given(machines())
def test_pruning_twice_prunes_nothing_more(points: list[RecoveryPoint]) -> None:
    gone = {p.id for p in prune(points, RetentionPolicy(), NOW)}
    assert prune([p for p in points if p.id not in gone], RetentionPolicy(), NOW) == []


def test_an_app_consistent_point_wins_its_window() -> None:
    points = [point(1, 5.2 * HOUR, app=True), point(2, 5.1 * HOUR), point(3, 4.1 * HOUR), point(4, 0)]
    assert prune(points, RetentionPolicy(((DAY, DAY),)), NOW) == [points[1], points[2]]


def test_one_pruning_removes_the_oldest_and_at_most_half() -> None:
    points = [point(number, 1000 - number) for number in range(7)]
    jumped = NOW + timedelta(days=400)
    victims = prune(points, RetentionPolicy(), jumped)
    assert len(victims) == 6
    assert gently(points, reversed(victims)) == points[:3]
    assert gently(points, points[2:4]) == points[2:4]
    assert gently([], []) == []


def test_points_from_the_future_of_a_wrong_clock_stay() -> None:
    points = [point(1, -5000), point(2, -4000), point(3, -1)]
    assert prune(points, RetentionPolicy(((60, 10),)), NOW) == []


def test_no_points_and_short_policies() -> None:
    assert prune([], RetentionPolicy(), NOW) == []
    points = [point(1, 100), point(2, 50), point(3, 1)]
    assert prune(points, keep_all(60), NOW) == points[:1]
    assert RetentionPolicy.within(DAY).buckets == ((2 * HOUR, 0.0), (DAY, HOUR))
    assert RetentionPolicy.within(HOUR).buckets == ((HOUR, 0.0),)
    assert RetentionPolicy.within(30 * DAY).buckets[-1] == (30 * DAY, 4 * HOUR)


@pytest.mark.parametrize("buckets", [(), ((0, 0),), ((10, 0), (10, 1)), ((10, -1),)])
def test_senseless_buckets_are_refused(buckets) -> None:
    with pytest.raises(ValueError):
        RetentionPolicy(buckets)
