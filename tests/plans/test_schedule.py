"""The order of a run."""

from __future__ import annotations

import pytest

from farshore.domain.errors import Code, FarshoreError
from farshore.plans.loader import load_text
from farshore.plans.model import Plan
from farshore.plans.schedule import schedule

TEXT = """
farshore: 1
plan: p
sites: {source: a, target: b}
network: {failover: n}
machines:
  db1: {target: {size: S}}
  db2: {target: {size: S}}
  web: {target: {size: S}}
shutdown:
  before: [{script: stop-jobs.sh}]
  after: [{script: told.sh, on: [unplanned]}]
boot:
  - group: data
    machines: [db1, db2]
    before: [{script: one.sh, on: [test]}, {script: two.sh}]
  - group: pause
    before: [{manual: Look, instructions: Look well}]
  - group: front
    machines: [web]
    after: [{script: smoke.sh}]
"""


@pytest.fixture
def plan() -> Plan:
    return load_text(TEXT, "p.yaml").plan


@pytest.mark.parametrize("kind", ["planned", "unplanned"])
def test_the_source_goes_down_backwards_and_the_target_comes_up_forwards(plan: Plan, kind: str):
    run = schedule(plan, kind)
    assert [(g.name, g.machines) for g in run.shutdown] == [("front", ("web",)), ("data", ("db2", "db1"))]
    assert run.failover.machines == ("db1", "db2", "web")
    assert [g.name for g in run.boot] == ["data", "pause", "front"]


def test_a_test_shuts_nothing_down_and_runs_no_action_of_the_shutdown(plan: Plan):
    run = schedule(plan, "test")
    assert run.shutdown == ()
    assert [s.id for s in run.steps] == [
        "boot.data.before.1",
        "boot.data.before.2",
        "boot.pause.before.1",
        "boot.front.after.1",
    ]


def test_actions_of_other_kinds_are_left_out_and_ids_stay_the_same(plan: Plan):
    assert [s.id for s in schedule(plan, "planned").steps] == [
        "shutdown.before.1",
        "boot.data.before.2",
        "boot.pause.before.1",
        "boot.front.after.1",
    ]
    assert [s.id for s in schedule(plan, "unplanned").steps][:2] == ["shutdown.before.1", "shutdown.after.1"]


def test_a_parallel_shutdown_is_one_group():
    run = schedule(
        load_text(TEXT.replace("shutdown:\n", "shutdown:\n  order: parallel\n"), "p.yaml").plan, "planned"
    )
    assert [g.machines for g in run.shutdown] == [("db1", "db2", "web")]


def test_some_machines_only_take_their_groups_along_and_groups_of_mere_actions_stay(plan: Plan):
    run = schedule(plan, "planned", ["web"])
    assert run.failover.machines == ("web",)
    assert [g.name for g in run.boot] == ["pause", "front"]
    assert [g.name for g in run.shutdown] == ["front"]


def test_a_group_is_cut_into_parts_for_its_workflows(plan: Plan):
    group = schedule(plan, "test").boot[0]
    assert group.batches(1) == (("db1",), ("db2",))
    assert group.batches() == (("db1", "db2"),)


def test_a_stranger_and_an_unknown_kind_are_named(plan: Plan):
    with pytest.raises(FarshoreError, match="has no machine x; it has db1, db2, web") as caught:
        schedule(plan, "test", ["x"])
    assert caught.value.code is Code.MACHINE_UNKNOWN
    with pytest.raises(FarshoreError, match="kinds are planned, unplanned, test") as caught:
        schedule(plan, "commit")
    assert caught.value.code is Code.INVALID_INPUT
