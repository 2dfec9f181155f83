"""Messages of the MachineProtection workflow: the only writer of a machine's state."""

from __future__ import annotations

from datetime import datetime
from enum import StrEnum

from pydantic import Field

from farshore.contract.runs import ErrorView, Message, PointView, ResourceView
from farshore.domain.machine import MachineState, Operation


class ReplicationPolicy(Message):
    """How a machine is replicated. Seconds."""

    interval: float = 30.0
    app_consistent_every: float | None = None
    rpo_threshold: float = 900.0
    retention: tuple[tuple[float, float], ...] = ((7200.0, 0.0), (86400.0, 3600.0), (604800.0, 7200.0))
    leg: float = Field(default=3600.0, description="seconds of one replication activity")


class MachineSpec(Message):
    """What is needed to replicate a machine. Queues are resolved when protection is enabled."""

    machine: str
    plan: str
    source: str
    source_site: str
    source_queue: str
    target_site: str
    target_queue: str
    policy: ReplicationPolicy = ReplicationPolicy()


class FenceKind(StrEnum):
    POWERED_OFF = "powered-off"
    STORAGE_DETACHED = "storage-detached"
    BREAK_GLASS = "break-glass"


class FenceToken(Message):
    """Proof that the source can't write. Without one, no machine is promoted."""

    machine: str
    run: str
    kind: FenceKind
    evidence: str
    at: datetime
    approvers: tuple[str, ...] = ()


class Begin(Message):
    """Take the machine's lock and enter an operation's transitional state."""

    operation: Operation
    run: str
    reason: str = ""
    source_site: str = ""  # the sites the run works with; they must be those of the protection
    target_site: str = ""
    accept_data_loss: bool = False  # change of point after a planned failover: give up its zero loss


class Advance(Message):
    """Go to the operation's second transitional state; a failover's needs the fence token."""

    run: str
    fence: FenceToken | None = None


class SettleOutcome(StrEnum):
    SUCCESS = "success"
    FAILURE = "failure"
    CANCELLED = "cancelled"


class Settle(Message):
    """End the operation: settled state, lock released."""

    run: str
    outcome: SettleOutcome
    error: ErrorView | None = None
    point: PointView | None = None
    made: tuple[ResourceView, ...] = ()
    source_stopped: bool = False  # this run has shut the source down, or may have
    source_may_lack_changes: bool = False  # cancel: asks for a resync; no run of this build sets it


class Halt(Message):
    """Stop the replication loop for the failover that holds the lock; answered when it has stopped."""

    run: str
    wait: bool = True


class Abandon(Message):
    """Take the lock from a run that has ended without settling."""

    holder: str
    reason: str


class MachineStatus(Message):
    """Answer of the `status` query, and of every update."""

    machine: str
    plan: str
    state: MachineState
    allowed_operations: tuple[str, ...] = ()
    holder: str = ""
    replicating: bool = False
    newest_point: PointView | None = None
    point_in_use: PointView | None = None
    recovered: tuple[ResourceView, ...] = ()
    last_test_at: datetime | None = None
    last_failover_at: datetime | None = None
    fence: FenceToken | None = None
    error: ErrorView | None = None
    target_site: str = ""
    source_site: str = ""
    source: str = ""  # name at the source, and behind "#" the id that was pinned when protection was enabled
    source_off: bool = False  # a failover shut the source down, or may have; none has started it since
    tested: tuple[ResourceView, ...] = ()  # what the open test made


class ProtectionState(Message):
    """Everything a MachineProtection hands to its next run when it continues as new."""

    spec: MachineSpec
    state: MachineState = Field(default_factory=MachineState.initial)
    holder: str = ""
    operation: Operation | None = None
    halted: bool = False
    source_off: bool = (
        False  # a failover shut the source down, or may have; kept until a cancel has started it
    )
    settled: tuple[str, str] = ("", "")  # last settled run and outcome: makes a repeated Settle harmless
    newest_point: PointView | None = None
    point_in_use: PointView | None = None
    recovered: tuple[ResourceView, ...] = ()
    tested: tuple[ResourceView, ...] = ()
    fence: FenceToken | None = None
    error: ErrorView | None = None
    failures: int = 0
    last_test_at: datetime | None = None
    last_failover_at: datetime | None = None
    force_full: bool = False
    watcher: str = ""  # the Protection run that waits for the end of initial replication
    disabled: bool = False
