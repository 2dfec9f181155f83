"""Temporal workflows: order, waiting, deciding. Deterministic; activities are known by their signatures only.

Failover (a run of a plan) → FailoverGroup (at most 50 machines) → MachineFailover; Protection (protect, disable);
MachineProtection, the long-running owner of a machine's state and of its replication loop; RecoveryPoints.
"""
