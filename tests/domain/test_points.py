"""Which point a choice means: never one that is known to be damaged."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest

from farshore.domain.errors import Code, FarshoreError
from farshore.domain.points import Consistency, PointChoice, RecoveryPoint, choose

START = datetime(2026, 11, 22, tzinfo=UTC)


def point(cycle: int, consistency: Consistency = Consistency.CRASH) -> RecoveryPoint:
    return RecoveryPoint(f"p-{cycle}", "db1", cycle, START + timedelta(minutes=cycle), consistency, "", 1)


POINTS = [point(1), point(2, Consistency.APPLICATION), point(3), point(4, Consistency.APPLICATION)]


@pytest.mark.parametrize(
    ("choice", "damaged", "meant"),
    [
        (PointChoice.LATEST, (), "p-4"),
        (PointChoice.LATEST, ("p-4",), "p-3"),
        (PointChoice.LATEST_PROCESSED, ("p-4", "p-3"), "p-2"),
        (PointChoice.LATEST_APP_CONSISTENT, (), "p-4"),
        (PointChoice.LATEST_APP_CONSISTENT, ("p-4",), "p-2"),
        (PointChoice.LATEST_CRASH_CONSISTENT, ("p-3",), "p-1"),
        ("p-2", ("p-4",), "p-2"),
    ],
)
def test_a_choice_passes_over_damage(choice, damaged, meant):
    assert choose(POINTS, choice, machine="db1", damaged=dict.fromkeys(damaged, "bad.")).id == meant


@pytest.mark.parametrize(
    ("points", "choice", "damaged", "code"),
    [
        ([], PointChoice.LATEST, (), Code.NO_RECOVERY_POINT),
        (POINTS, "p-9", (), Code.POINT_NOT_FOUND),
        (POINTS, PointChoice.LATEST_APP_CONSISTENT, ("p-2", "p-4"), Code.POINT_NOT_CONSISTENT),
        (POINTS, "p-3", ("p-3",), Code.REPLICA_DAMAGED),
        (POINTS, PointChoice.LATEST, ("p-1", "p-2", "p-3", "p-4"), Code.REPLICA_DAMAGED),
    ],
)
def test_what_cannot_be_meant_is_told(points, choice, damaged, code):
    with pytest.raises(FarshoreError) as caught:
        choose(points, choice, machine="db1", damaged=dict.fromkeys(damaged, "Segment s1 is torn."))
    assert caught.value.code is code


def test_the_words_for_a_damaged_point_name_the_cause_and_a_sound_one():
    with pytest.raises(FarshoreError) as caught:
        choose(POINTS, "p-4", machine="db1", damaged={"p-4": "Segment s1 is torn."})
    assert "Segment s1 is torn. Of 4 points 3 are sound, the newest is p-3." in str(caught.value)
