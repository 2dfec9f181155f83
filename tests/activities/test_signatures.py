"""The table that workflows see and the activities that workers run are the same thing."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, get_type_hints

import pytest
from temporalio import activity

from farshore.activities import signatures as s
from farshore.activities.control import ControlActivities
from farshore.activities.source import SourceActivities
from farshore.activities.target import TargetActivities
from farshore.contract.machine import ReplicationPolicy

CLASSES = (ControlActivities, SourceActivities, TargetActivities)
SITES = (SourceActivities, TargetActivities)


def implementations() -> list[tuple[type, str, Callable[..., Any]]]:
    found: list[tuple[type, str, Callable[..., Any]]] = []
    for of in CLASSES:
        for method in vars(of).values():
            definition = activity._Definition.from_callable(method) if callable(method) else None
            if definition is not None and definition.name is not None:
                found.append((of, definition.name, method))
    return found


@pytest.mark.parametrize("step", s.STEPS, ids=lambda step: step.name)
def test_every_step_has_exactly_one_implementation_with_its_types(step: s.Step[Any, Any]) -> None:
    mine = [method for _, name, method in implementations() if name == step.name]
    assert len(mine) == 1
    hints = get_type_hints(mine[0])
    assert hints.pop("return") == step.output
    assert list(hints.values()) == [step.input]
    assert inspect.iscoroutinefunction(mine[0])


def test_no_activity_is_missing_from_the_table() -> None:
    assert sorted(name for _, name, _ in implementations()) == sorted(step.name for step in s.STEPS)


def test_no_name_stands_twice() -> None:
    names = [step.name for step in s.STEPS]
    assert len(names) == len(set(names))


@pytest.mark.parametrize("step", s.STEPS, ids=lambda step: step.name)
def test_every_step_ends_some_day_and_a_dead_worker_is_noticed(step: s.Step[Any, Any]) -> None:
    rules = step.rules
    where = next(of for of, name, _ in implementations() if name == step.name)
    limited = rules.attempts > 0 or rules.schedule_to_close is not None
    assert limited, "without either, a step that can't succeed is tried for ever"
    if where in SITES:
        assert rules.heartbeat is not None, "long steps at a site must show that they live"
        assert rules.heartbeat <= 30


def test_a_dead_source_is_given_up_within_seconds_where_effort_is_best() -> None:
    rules = s.SOURCE_BEST_EFFORT
    assert rules.schedule_to_start is not None
    assert rules.schedule_to_start <= 30
    assert rules.attempts in (1, 2)


def test_a_leg_ends_by_itself_before_its_limit() -> None:
    assert ReplicationPolicy().leg + 600 < s.LEG.start_to_close
