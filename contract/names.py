"""Names that callers, workers and the Temporal UI share. Never change a value: running workflows carry them."""

from __future__ import annotations

from temporalio.common import SearchAttributeKey

CONTROL_QUEUE = "farshore"
"""Runs, and activities that touch no site. Runs are pinned to the build that began them, where builds are deployed as
versions."""

PROTECTION_QUEUE = "farshore.protection"
"""MachineProtection workflows: they outlive every deployment, so they move on to each new build."""

FAILOVER = "Failover"
FAILOVER_GROUP = "FailoverGroup"
MACHINE_FAILOVER = "MachineFailover"
PROTECTION = "Protection"
MACHINE_PROTECTION = "MachineProtection"
RECOVERY_POINTS = "RecoveryPoints"

PLAN = SearchAttributeKey.for_keyword("FarshorePlan")
KIND = SearchAttributeKey.for_keyword("FarshoreKind")
MACHINE = SearchAttributeKey.for_keyword("FarshoreMachine")
STATE = SearchAttributeKey.for_keyword("FarshoreState")
SITE = SearchAttributeKey.for_keyword("FarshoreSite")
SEARCH_ATTRIBUTES = (PLAN, KIND, MACHINE, STATE, SITE)


def site_queue(site: str, provider: str) -> str:
    """The task queue of the workers that can reach `site` with `provider`."""
    return f"site.{site}.{provider}"


def legs_queue(queue: str) -> str:
    """Beside a source site's queue, the one for its replication: legs last an hour, and must never keep the slots that
    a failover's steps need."""
    return f"{queue}.legs"


def lock_holder(workflow_id: str, first_run_id: str) -> str:
    """How a run names itself to the machines' locks and in tags: the id may come again, with the first run id it can't."""
    return f"{workflow_id}#{first_run_id}"


def holder_id(holder: str) -> str:
    """The workflow id of a lock's holder, as people know it."""
    return holder.rpartition("#")[0] or holder


def protection_id(machine: str) -> str:
    """Workflow id of the one MachineProtection of a machine: the lock, the state and the replication loop."""
    return f"machine/{machine}"


def run_id(plan: str, kind: str, stamp: str) -> str:
    """Workflow id that the CLI and the typed client give to a run; `stamp` is UTC `YYYYmmdd-HHMMSS`."""
    return f"{plan}/{kind}/{stamp}"
