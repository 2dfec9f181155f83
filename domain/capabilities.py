"""What a provider can do, by direction, as data: §3 of the recovery semantics. No code asks for a provider's name."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum


class Location(StrEnum):
    """Where the machine runs for its users."""

    PRIMARY = "Primary"
    RECOVERY = "Recovery"


class Direction(StrEnum):
    """Which way the machine's data flows, or flowed last."""

    PRIMARY_TO_RECOVERY = "PrimaryToRecovery"
    RECOVERY_TO_PRIMARY = "RecoveryToPrimary"

    @property
    def source(self) -> Location:
        """The side that data comes from."""
        return Location.PRIMARY if self is Direction.PRIMARY_TO_RECOVERY else Location.RECOVERY

    @property
    def target(self) -> Location:
        """The side that data goes to."""
        return Location.RECOVERY if self is Direction.PRIMARY_TO_RECOVERY else Location.PRIMARY

    @property
    def reversed(self) -> Direction:
        """The other direction."""
        if self is Direction.PRIMARY_TO_RECOVERY:
            return Direction.RECOVERY_TO_PRIMARY
        return Direction.PRIMARY_TO_RECOVERY


@dataclass(frozen=True, slots=True)
class Row:
    """What is offered in one direction. Enable, disable and commit belong to every provider and have no flag."""

    test: bool = False
    planned: bool = False
    unplanned: bool = False
    change_point: bool = False
    cancel: bool = False
    repair: bool = False  # resynchronise on request
    reverse_replicate: bool = False  # after commit: protect in the other direction
    failback: bool = False  # after commit: home without reverse protection (Azure to Hyper-V)
    complete_migration: bool = False
    auto_commit: bool = False  # SAN: a failover is committed at once


@dataclass(frozen=True, slots=True)
class Capabilities:
    """A provider's two rows. `forward` is PrimaryToRecovery."""

    provider: str
    forward: Row
    backward: Row = field(default_factory=Row)

    def row(self, direction: Direction) -> Row:
        """The row of a direction."""
        return self.forward if direction is Direction.PRIMARY_TO_RECOVERY else self.backward


# Farshore's adapters. A flag is set when the product really does it, not when it could.
VSPHERE_TO_AZURE = Capabilities(
    "vsphere-to-azure",
    forward=Row(test=True, planned=True, unplanned=True, change_point=True, cancel=True, repair=True),
)

# Azure Site Recovery's rows, for strict agreement with its clients. InMage to a secondary site is not established.
_PAIR = Row(test=True, planned=True, unplanned=True, change_point=True, cancel=True, reverse_replicate=True)
_SAN = Row(test=True, planned=True, unplanned=True, reverse_replicate=True, auto_commit=True)
_A2A = Row(test=True, unplanned=True, change_point=True, repair=True, reverse_replicate=True)
_VMWARE_TO_AZURE = Row(
    test=True, unplanned=True, change_point=True, reverse_replicate=True, complete_migration=True
)
_RCM_HOME = Row(planned=True, cancel=True, reverse_replicate=True)

HYPERV_REPLICA_2012 = Capabilities("HyperVReplica2012", forward=_PAIR, backward=_PAIR)
HYPERV_REPLICA_2012_R2 = Capabilities("HyperVReplica2012R2", forward=_PAIR, backward=_PAIR)
HYPERV_REPLICA_SAN = Capabilities("HyperVReplica2012R2/SAN", forward=_SAN, backward=_SAN)
HYPERV_REPLICA_AZURE = Capabilities(
    "HyperVReplicaAzure",
    forward=Row(
        test=True, planned=True, unplanned=True, change_point=True, failback=True, complete_migration=True
    ),
    backward=Row(planned=True, reverse_replicate=True),
)
# The classic way home is an unplanned failover from the chosen point (§4.11).
INMAGE_AZURE_V2 = Capabilities(
    "InMageAzureV2", forward=_VMWARE_TO_AZURE, backward=Row(unplanned=True, reverse_replicate=True)
)
INMAGE_RCM = Capabilities("InMageRcm", forward=_VMWARE_TO_AZURE, backward=_RCM_HOME)
# ASR shows the way home as a pair of its own, whose "Primary" is Azure.
INMAGE_RCM_FAILBACK = Capabilities("InMageRcmFailback", forward=_RCM_HOME)
A2A = Capabilities("A2A", forward=_A2A, backward=_A2A)

ALL: tuple[Capabilities, ...] = (
    VSPHERE_TO_AZURE,
    HYPERV_REPLICA_2012,
    HYPERV_REPLICA_2012_R2,
    HYPERV_REPLICA_SAN,
    HYPERV_REPLICA_AZURE,
    INMAGE_AZURE_V2,
    INMAGE_RCM,
    INMAGE_RCM_FAILBACK,
    A2A,
)
