"""From a plan's settings to what replicates a machine."""

from __future__ import annotations

from farshore.activities.messages import PinnedPlan
from farshore.contract.machine import MachineSpec, ReplicationPolicy


def machine_spec(pinned: PinnedPlan, machine: str) -> MachineSpec:
    """How `machine` is replicated under this plan."""
    plan = pinned.plan
    replication = plan.replication
    return MachineSpec(
        machine=machine,
        plan=plan.plan,
        source=plan.machines[machine].source or machine,
        source_site=plan.sites.source,
        source_queue=pinned.source_queue,
        target_site=plan.sites.target,
        target_queue=pinned.target_queue,
        policy=ReplicationPolicy(
            interval=replication.interval,
            app_consistent_every=replication.app_consistent_every,
            rpo_threshold=replication.rpo_threshold,
            retention=replication.buckets,
            leg=pinned.leg_seconds,
        ),
    )
