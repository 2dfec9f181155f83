"""Errors for the person on call: code, what happened, possible causes, what to do, who can resolve it.

The shape follows the error semantics of site recovery products (a service error with causes and a recommended
action). One catalogue holds every code with its defaults; an adapter raises `FarshoreError` with a code of the
catalogue and the particulars of the case. `retryable` tells the retry policy of the activity, never a person.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any


class Resolvability(StrEnum):
    """Who can resolve an error."""

    OPERATOR = "operator"  # whoever runs the recovery can do it now
    ADMINISTRATOR = (
        "administrator"  # needs rights or changes in an outside system (quota, permission, network)
    )
    AUTOMATIC = "automatic"  # Farshore goes on by itself; look only if it lasts
    SUPPORT = "support"  # a defect of Farshore


class Code(StrEnum):
    """Every error code that can leave Farshore. The value is the `type` of the Temporal ApplicationError."""

    # requests
    INVALID_INPUT = "InvalidInput"
    PLAN_NOT_FOUND = "PlanNotFound"
    PLAN_INVALID = "PlanInvalid"
    MACHINE_UNKNOWN = "MachineUnknown"
    MACHINE_NOT_PROTECTED = "MachineNotProtected"
    SITE_UNKNOWN = "SiteUnknown"
    OPERATION_NOT_ALLOWED = "OperationNotAllowed"
    SCENARIO_IN_PROGRESS = "ScenarioInProgress"
    NOT_READY = "NotReady"
    # source
    SOURCE_UNREACHABLE = "SourceUnreachable"
    SOURCE_MACHINE_NOT_FOUND = "SourceMachineNotFound"
    SOURCE_NOT_ELIGIBLE = "SourceNotEligible"
    SOURCE_BUSY = "SourceBusy"
    SHUTDOWN_FAILED = "ShutdownFailed"
    CHANGE_TRACKING_NOT_READY = "ChangeTrackingNotReady"
    SNAPSHOT_FAILED = "SnapshotFailed"
    SOURCE_READ_FAILED = "SourceReadFailed"
    # replication
    RESYNC_REQUIRED = "ResyncRequired"
    REPLICA_FENCED = "ReplicaFenced"
    REPLICA_DAMAGED = "ReplicaDamaged"
    POINT_NOT_FOUND = "PointNotFound"
    POINT_EXPIRED = "PointExpired"
    POINT_NOT_CONSISTENT = "PointNotConsistent"
    NO_RECOVERY_POINT = "NoRecoveryPoint"
    # promotion
    FENCE_NOT_PROVEN = "FenceNotProven"
    DATA_LOSS_NOT_APPROVED = "DataLossNotApproved"
    # target
    TARGET_UNREACHABLE = "TargetUnreachable"
    TARGET_THROTTLED = "TargetThrottled"
    TARGET_BUSY = "TargetBusy"
    TARGET_NOT_VISIBLE_YET = "TargetNotVisibleYet"
    TARGET_REJECTED = "TargetRejected"
    TARGET_OPERATION_FAILED = "TargetOperationFailed"
    QUOTA_EXCEEDED = "QuotaExceeded"
    CAPACITY_EXHAUSTED = "CapacityExhausted"
    ADDRESS_IN_USE = "AddressInUse"
    NETWORK_NOT_FOUND = "NetworkNotFound"
    NETWORK_NOT_ISOLATED = "NetworkNotIsolated"
    NAME_TAKEN = "NameTaken"
    ACCESS_DENIED = "AccessDenied"
    CLEANUP_LEFTOVERS = "CleanupLeftovers"
    MACHINE_NOT_RUNNING = "MachineNotRunning"
    # actions
    ACTION_FAILED = "ActionFailed"
    ACTION_TIMEOUT = "ActionTimeout"
    ACTION_REJECTED = "ActionRejected"
    NO_PENDING_ACTION = "NoPendingAction"
    RUN_ABORTED = "RunAborted"
    RUN_FAILED = "RunFailed"
    # ourselves
    SECRET_UNAVAILABLE = "SecretUnavailable"  # noqa: S105  the name of an error, not a secret
    CONFIGURATION_INVALID = "ConfigurationInvalid"
    TEMPORAL_UNREACHABLE = "TemporalUnreachable"
    INTERNAL = "InternalError"


@dataclass(frozen=True, slots=True)
class _Entry:
    causes: tuple[str, ...]
    action: str
    resolvability: Resolvability
    retryable: bool = False


_O, _A, _U, _S = (
    Resolvability.OPERATOR,
    Resolvability.ADMINISTRATOR,
    Resolvability.AUTOMATIC,
    Resolvability.SUPPORT,
)

CATALOGUE: Mapping[Code, _Entry] = {
    Code.INVALID_INPUT: _Entry(
        ("A field is missing, misspelt or has a wrong value.",), "Correct the input and start again.", _O
    ),
    Code.PLAN_NOT_FOUND: _Entry(
        ("The name is misspelt.", "The plan file is not in the plans folder of the workers."),
        "Check the name against the list of plans.",
        _O,
    ),
    Code.PLAN_INVALID: _Entry(
        ("The plan file has an error at the line that is named.",),
        "Correct the plan (`farshore plan lint`) and start again.",
        _O,
    ),
    Code.MACHINE_UNKNOWN: _Entry(
        ("The name is misspelt.", "The machine is not in this plan."), "Use a machine of the plan.", _O
    ),
    Code.MACHINE_NOT_PROTECTED: _Entry(
        ("Protection was never enabled, or it was disabled.",),
        "Run protect for the plan and wait for initial replication.",
        _O,
    ),
    Code.SITE_UNKNOWN: _Entry(
        ("The plan names a site that the workers' settings do not have.",),
        "Correct the site's name in the plan, or add the site to the settings.",
        _A,
    ),
    Code.OPERATION_NOT_ALLOWED: _Entry(
        ("The machine is in a state in which this operation has no meaning.",),
        "Use one of the allowed operations.",
        _O,
    ),
    Code.SCENARIO_IN_PROGRESS: _Entry(
        ("Another run works on this machine.",), "Wait for the run that is named to end, or stop it.", _O
    ),
    Code.NOT_READY: _Entry(
        ("A readiness check found something that would make the run fail.",),
        "Resolve the findings and start again.",
        _O,
    ),
    Code.SOURCE_UNREACHABLE: _Entry(
        (
            "The source site or its management server is down.",
            "The network between worker and source is cut.",
            "The site's worker is not running.",
        ),
        "If the site is lost, run an unplanned failover; else restore the connection.",
        _O,
        True,
    ),
    Code.SOURCE_MACHINE_NOT_FOUND: _Entry(
        ("The machine was deleted or renamed at the source.",),
        "Correct the machine's source in the plan.",
        _O,
    ),
    Code.SOURCE_NOT_ELIGIBLE: _Entry(
        ("A disk or setting of the machine cannot be replicated.",),
        "Change what is named on the source machine, then protect again.",
        _A,
    ),
    Code.SOURCE_BUSY: _Entry(
        ("Another task works on the machine at the source.",),
        "None needed: the step is tried again.",
        _U,
        True,
    ),
    Code.SHUTDOWN_FAILED: _Entry(
        (
            "The guest did not shut down in time.",
            "Guest tools are not running.",
            "The source site cannot be reached.",
        ),
        "Shut the machine down by hand and run the planned failover again, or run an unplanned failover.",
        _O,
    ),
    Code.CHANGE_TRACKING_NOT_READY: _Entry(
        ("Change tracking takes effect after a power cycle on this host.",),
        "Power-cycle the machine when convenient; until then each cycle compares in full.",
        _O,
        True,
    ),
    Code.SNAPSHOT_FAILED: _Entry(
        (
            "The hypervisor refused the snapshot.",
            "The datastore is full.",
            "The guest could not be quiesced.",
        ),
        "Look at the task in the source system; the cycle is tried again.",
        _A,
        True,
    ),
    Code.SOURCE_READ_FAILED: _Entry(
        ("The source stopped answering in the middle of a read.", "The extent is locked by another program."),
        "None needed: the cycle is tried again from the last committed point.",
        _U,
        True,
    ),
    Code.RESYNC_REQUIRED: _Entry(
        ("Change tracking was reset, a disk was resized or replaced, or the machine was reverted.",),
        "None needed: the next cycle compares the disk in full. Older points stay valid.",
        _U,
        True,
    ),
    Code.REPLICA_FENCED: _Entry(
        ("Another writer took over this replica.",), "None needed: the newer writer goes on.", _U
    ),
    Code.REPLICA_DAMAGED: _Entry(
        ("A stored object is missing or its digest is wrong.",),
        "Choose another point; run a resync if the source lives.",
        _O,
    ),
    Code.POINT_NOT_FOUND: _Entry(
        ("The id is misspelt.", "The point was pruned by retention."), "Choose a point of the list.", _O
    ),
    Code.POINT_EXPIRED: _Entry(
        ("Retention removed the point before the run began.",), "Choose a newer point.", _O
    ),
    Code.POINT_NOT_CONSISTENT: _Entry(
        ("No point of the wanted consistency is kept.",),
        "Choose crash-consistent, or wait for the next app-consistent point.",
        _O,
    ),
    Code.NO_RECOVERY_POINT: _Entry(
        ("Initial replication has not finished.",), "Wait until the machine is Protected.", _O
    ),
    Code.FENCE_NOT_PROVEN: _Entry(
        ("The source machine may still be running and writing.",),
        "Power the source off, or let two people confirm that it cannot come back (break-glass).",
        _O,
    ),
    Code.DATA_LOSS_NOT_APPROVED: _Entry(
        ("The operation gives up data that the planned failover had saved.",),
        "Start it again with the confirmation that the message names.",
        _O,
    ),
    Code.TARGET_UNREACHABLE: _Entry(
        ("The cloud's endpoint does not answer.", "The site's worker is not running."),
        "None needed while it is short: the step is tried again.",
        _U,
        True,
    ),
    Code.TARGET_THROTTLED: _Entry(
        ("The subscription's request rate is used up.",),
        "None needed: the step waits as long as the cloud asks.",
        _U,
        True,
    ),
    Code.TARGET_BUSY: _Entry(
        ("Another operation works on the same resource.",), "None needed: the step is tried again.", _U, True
    ),
    Code.TARGET_NOT_VISIBLE_YET: _Entry(
        ("The cloud does not show a resource yet that it has just made.",),
        "None needed: the step is tried again.",
        _U,
        True,
    ),
    Code.TARGET_REJECTED: _Entry(
        ("The cloud refused the request: see its code and text.",),
        "Correct what the cloud names, then run again.",
        _A,
    ),
    Code.TARGET_OPERATION_FAILED: _Entry(
        ("The cloud accepted the request and failed later: see its code and text.",),
        "Run again; if it fails again, correct what the cloud names.",
        _A,
        True,
    ),
    Code.QUOTA_EXCEEDED: _Entry(
        ("The subscription's quota for cores, addresses or disks is used up.",),
        "Raise the quota or free resources, then run again.",
        _A,
    ),
    Code.CAPACITY_EXHAUSTED: _Entry(
        ("The region or zone has no machine of this size now.",),
        "Choose another size or zone in the plan, or wait and run again.",
        _O,
        True,
    ),
    Code.ADDRESS_IN_USE: _Entry(
        ("An earlier test was not cleaned up.", "Another machine has the address."),
        "Clean up the earlier test or free the address, then run again.",
        _O,
    ),
    Code.NETWORK_NOT_FOUND: _Entry(
        ("The network or subnet of the plan does not exist at the target.",),
        "Create it, or correct the plan.",
        _A,
    ),
    Code.NETWORK_NOT_ISOLATED: _Entry(
        ("The test network has a peering or gateway into production.",),
        "Choose an isolated network for tests.",
        _A,
    ),
    Code.NAME_TAKEN: _Entry(
        ("A resource of this name exists and was not made by this run.",),
        "Rename or remove it, or change the plan.",
        _O,
    ),
    Code.ACCESS_DENIED: _Entry(
        ("The identity lacks a permission.", "A password or secret has changed or expired."),
        "Give the identity the permission that is named, or renew its secret.",
        _A,
    ),
    Code.CLEANUP_LEFTOVERS: _Entry(
        ("Some resources of the test could not be deleted.",),
        "Delete what is listed by hand, or run clean-up again.",
        _O,
    ),
    Code.MACHINE_NOT_RUNNING: _Entry(
        ("The recovered machine was created but did not start.",),
        "Look at its boot diagnostics; change the recovery point if the disk is bad.",
        _O,
        True,
    ),
    Code.ACTION_FAILED: _Entry(
        ("The script ended with an error: see its output.",),
        "Correct the script or its target, then run again.",
        _O,
    ),
    Code.ACTION_TIMEOUT: _Entry(
        ("Nobody decided, or the script did not end, within the time of the plan.",),
        "Decide sooner or raise the timeout in the plan, then run again.",
        _O,
    ),
    Code.ACTION_REJECTED: _Entry(
        ("A person rejected the manual action.",),
        "Read the observation; start a new run when its cause is gone.",
        _O,
    ),
    Code.NO_PENDING_ACTION: _Entry(
        ("The action was decided already, or has not been reached.",),
        "Look at the run's current details for what it waits for.",
        _O,
    ),
    Code.RUN_ABORTED: _Entry(
        ("A person stopped the run.",),
        "Look at the state of each machine, then run again or cancel the failover.",
        _O,
    ),
    Code.RUN_FAILED: _Entry(
        ("One or more machines or actions failed: see the list.",),
        "Resolve what the list names, then run the same failover again: finished machines are kept.",
        _O,
    ),
    Code.SECRET_UNAVAILABLE: _Entry(
        ("The reference names a variable or file that the worker does not have.",),
        "Give the worker the secret, then run again.",
        _A,
    ),
    Code.CONFIGURATION_INVALID: _Entry(
        ("The worker's settings are wrong.",), "Correct the settings and restart the worker.", _A
    ),
    Code.TEMPORAL_UNREACHABLE: _Entry(
        ("The Temporal server is down or its address is wrong.",),
        "Start the server, or correct the address.",
        _A,
        True,
    ),
    Code.INTERNAL: _Entry(
        ("A defect in Farshore.",), "Report it with the run's id; the step is tried again.", _S, True
    ),
}


@dataclass(frozen=True, slots=True)
class ErrorInfo:
    """An error as data: what goes into results, evidence and the details of an ApplicationError."""

    code: str
    message: str
    possible_causes: tuple[str, ...]
    recommended_action: str
    resolvability: str
    subject: str = ""
    details: Mapping[str, Any] = field(default_factory=dict[str, Any])

    def text(self) -> str:
        """One paragraph for a person: what, why, what to do."""
        who = f" [{self.subject}]" if self.subject and self.subject not in self.message else ""
        causes = " ".join(self.possible_causes)
        return f"{self.message}{who} Possible causes: {causes} Recommended action: {self.recommended_action}"

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready form."""
        return {
            "code": self.code,
            "message": self.message,
            "possible_causes": list(self.possible_causes),
            "recommended_action": self.recommended_action,
            "resolvability": self.resolvability,
            "subject": self.subject,
            "details": dict(self.details),
        }


class FarshoreError(Exception):
    """The one exception that adapters, engine and model raise on purpose.

    `retry_after` is in seconds and is honoured by the activity (`next_retry_delay`). `details` must be JSON-ready and
    free of secrets. Defaults for causes, action, resolvability and retryability come from `CATALOGUE`.
    """

    def __init__(
        self,
        code: Code,
        message: str,
        *,
        subject: str = "",
        causes: Sequence[str] | None = None,
        action: str | None = None,
        resolvability: Resolvability | None = None,
        retryable: bool | None = None,
        retry_after: float | None = None,
        details: Mapping[str, Any] | None = None,
    ) -> None:
        entry = CATALOGUE[code]
        super().__init__(message)
        self.code = code
        self.retryable = entry.retryable if retryable is None else retryable
        self.retry_after = retry_after
        self.info = ErrorInfo(
            code=code.value,
            message=message,
            possible_causes=tuple(causes) if causes is not None else entry.causes,
            recommended_action=action or entry.action,
            resolvability=(resolvability or entry.resolvability).value,
            subject=subject,
            details=dict(details or {}),
        )

    def __str__(self) -> str:
        return self.info.message
