"""The model of a plan: what the file's keys become, and that it survives its way through Temporal."""

from __future__ import annotations

import pytest
from pydantic import ValidationError
from temporalio.contrib.pydantic import pydantic_data_converter

from farshore.domain.errors import Code, FarshoreError
from farshore.domain.retention import RetentionPolicy
from farshore.plans.loader import load_text
from farshore.plans.model import KINDS, MachinePlan, ManualAction, Plan, ScriptAction, Target


@pytest.fixture
def plan(crm: str) -> Plan:
    return load_text(crm, "crm.yaml").plan


def test_the_example_has_the_values_of_its_file(plan: Plan):
    assert (plan.plan, plan.sites.source, plan.sites.target) == ("crm", "east", "westeurope")
    assert (plan.replication.interval, plan.replication.app_consistent_every) == (30.0, 3600.0)
    assert plan.replication.rpo_threshold == 900.0
    assert plan.replication.buckets == ((7200.0, 0.0), (86400.0, 3600.0), (604800.0, 7200.0))
    assert (plan.network.failover, plan.network.test) == ("dr-vnet", "isolated")
    assert list(plan.machines) == ["crm-db01", "crm-app01", "crm-web01"]
    db = plan.machines["crm-db01"]
    assert (db.source, db.target.name, db.target.zone) == ("crm-db01", "crm-db01", "1")
    assert (plan.shutdown.order, plan.shutdown.guest_timeout, plan.shutdown.force) == (
        "reverse",
        300.0,
        False,
    )
    assert [(g.group, g.machines) for g in plan.boot] == [
        ("data", ("crm-db01",)),
        ("application", ("crm-app01",)),
        ("web", ("crm-web01",)),
    ]
    check, smoke = plan.boot[0].after[0], plan.boot[2].after[0]
    assert isinstance(check, ManualAction)
    assert isinstance(smoke, ScriptAction)
    assert (check.title, check.timeout, check.on) == ("Check the database", 28800.0, ("planned", "unplanned"))
    assert (smoke.title, smoke.args, smoke.timeout, smoke.where) == ("smoke.sh", ("crm",), 300.0, "worker")
    assert smoke.on == KINDS


def test_retention_fits_the_policy_of_the_engine(plan: Plan):
    assert RetentionPolicy(plan.replication.buckets).buckets == plan.replication.buckets


async def test_a_plan_survives_as_a_temporal_payload(plan: Plan):
    payloads = await pydantic_data_converter.encode([plan, plan.machines["crm-db01"], plan.boot[0]])
    again = await pydantic_data_converter.decode(payloads, [Plan, MachinePlan, type(plan.boot[0])])
    assert again == [plan, plan.machines["crm-db01"], plan.boot[0]]


def test_a_machine_by_itself_survives_too():
    machine = MachinePlan(target=Target(size="S"))
    assert MachinePlan.model_validate_json(machine.model_dump_json()) == machine


def test_a_machine_knows_its_group_and_a_stranger_is_named(plan: Plan):
    assert plan.group_of("crm-app01").group == "application"
    with pytest.raises(FarshoreError, match="has no machine crm-x") as caught:
        plan.group_of("crm-x")
    assert caught.value.code is Code.MACHINE_UNKNOWN


@pytest.mark.parametrize(
    ("on_failure", "stops"),
    [(None, {"planned"}), ("stop", {"planned", "unplanned", "test"}), ("continue", set())],
)
def test_a_failed_script_stops_a_planned_run_unless_the_plan_says_otherwise(on_failure, stops):
    action = ScriptAction(script="x", on_failure=on_failure)
    assert {kind for kind in KINDS if action.stops(kind)} == stops


def test_a_plan_is_frozen_and_takes_no_unknown_field(plan: Plan):
    with pytest.raises(ValidationError):
        plan.plan = "other"  # type: ignore[misc]
    with pytest.raises(ValidationError):
        Target.model_validate({"size": "S", "colour": "red"})
