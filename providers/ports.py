"""What a source site and a target site can do. Activities call these; adapters fill them.

Async throughout; bytes are the business of `replication.ports`. Every call is safe to repeat: it reads before it acts,
uses the deterministic names it is given, creates if absent, and re-reads an unknown outcome. SDK-level retries are
off: a call raises `FarshoreError` at once and the activity's retry policy decides. Times are aware UTC, sizes bytes,
durations seconds.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from enum import StrEnum
from typing import Any, Protocol

from farshore.replication.ports import DiskState, PointBytes, ReplicaStore, Source

Checkpoint = Callable[[Mapping[str, Any]], None]
"""Called by a long step with what a successor needs to resume (small, JSON-ready, no secrets); becomes the activity's
heartbeat. Called at least every few seconds while a step waits. May raise to cancel the step."""


class Severity(StrEnum):
    ERROR = "error"  # the run would fail
    WARNING = "warning"
    INFO = "info"


@dataclass(frozen=True, slots=True)
class Finding:
    """Something a readiness check found."""

    severity: Severity
    code: str
    subject: str
    message: str
    action: str


class Power(StrEnum):
    ON = "on"
    OFF = "off"
    SUSPENDED = "suspended"
    UNKNOWN = "unknown"


@dataclass(frozen=True, slots=True)
class SourceNic:
    label: str
    mac: str
    network: str
    addresses: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class SourceDisk:
    key: str
    label: str
    size: int
    eligible: bool
    reason: str  # why not, or a warning; else ""


@dataclass(frozen=True, slots=True)
class SourceMachine:
    """A machine as its source site shows it."""

    name: str
    id: str  # the provider's stable id (vSphere instanceUuid)
    power: Power
    tools_running: bool
    tracking: bool  # change tracking is on
    firmware: str  # "bios" | "efi"
    cpus: int
    memory_mib: int
    disks: tuple[SourceDisk, ...]
    nics: tuple[SourceNic, ...]
    findings: tuple[Finding, ...]


@dataclass(frozen=True, slots=True)
class Shutdown:
    """How a source machine went down."""

    already_off: bool
    graceful: bool  # the guest shut itself down
    at: datetime


@dataclass(frozen=True, slots=True)
class FenceProof:
    """Evidence that the source cannot write."""

    kind: str  # "powered-off" | "storage-detached"
    evidence: str  # one line for a person and for the report
    at: datetime


class SourceSite(Protocol):
    """A site whose machines are protected.

    `source` is a machine's name, inventory path or id; or `name#id` with `SourceMachine.id`, a UUID, behind the last `#`:
    then the machine of this id is meant, also when it was renamed. SourceMachineNotFound when there is none, or when it
    lost the name and another machine has it now: a name alone may come to mean another machine.
    """

    async def inspect(self, source: str) -> SourceMachine:
        """Find a machine by name, inventory path or id. SourceMachineNotFound, SourceUnreachable."""
        ...

    async def enable_tracking(self, source: str) -> None:
        """Switch change tracking on. SourceNotEligible names the disk and the reason."""
        ...

    async def shut_down(
        self, source: str, *, guest_timeout: float, force: bool, checkpoint: Checkpoint
    ) -> Shutdown:
        """Guest shutdown, waiting up to `guest_timeout`; then power off if `force`, else ShutdownFailed."""
        ...

    async def prove_off(self, source: str) -> FenceProof:
        """Read the power state from the site now. FenceNotProven when it is not off."""
        ...

    async def power_on(self, source: str) -> None: ...

    def open_source(self, machine: str, source: str) -> Source:
        """For the replication engine. Blocking; called from a thread."""
        ...

    async def reap(self, source: str) -> list[str]:
        """Remove every snapshot that Farshore took of this machine and left; returns their names. Idempotent.

        Only while nobody replicates the machine: before the first leg of a protection, after its last one.
        """
        ...

    async def close(self) -> None: ...


class Purpose(StrEnum):
    """Why a resource exists at the target. Test and failover never touch each other's resources."""

    TEST = "test"
    FAILOVER = "failover"


@dataclass(frozen=True, slots=True)
class Owner:
    """Who a resource at the target belongs to: written as tags, found again by tags, part of names."""

    plan: str
    run: str  # workflow id of the run
    machine: str  # "" for what belongs to the run as a whole (a test network)
    purpose: Purpose


@dataclass(frozen=True, slots=True)
class TargetNic:
    network: str
    subnet: str
    address: str | None = None  # static private address; None: the next free one
    public: bool = False
    security_group: str | None = None


@dataclass(frozen=True, slots=True)
class TargetSpec:
    """What a recovered machine shall look like."""

    machine: str  # Farshore's name
    name: str  # name of the VM at the target in a real failover; a test gets "<name>-test"
    size: str
    os: str  # "linux" | "windows"
    firmware: str  # "bios" | "efi"
    zone: str | None
    nics: tuple[TargetNic, ...]
    tags: Mapping[str, str] = field(default_factory=dict[str, str])


@dataclass(frozen=True, slots=True)
class Resource:
    """A resource at the target."""

    id: str
    kind: str  # "disk", "network-interface", "machine", "public-address", "network", "blob"
    name: str


@dataclass(frozen=True, slots=True)
class DiskRequest:
    """One disk to be made from a recovery point."""

    state: DiskState
    index: int  # 0 is the boot disk
    snapshot: str  # handle of the frozen replica that the point starts from; "": it starts from zeros
    digest: str
    point: str
    journal: PointBytes | None = (
        None  # what has to be written onto a copy of it; None: the point is that state
    )


@dataclass(frozen=True, slots=True)
class MachineView:
    """A recovered machine as the target shows it."""

    resource: Resource
    power: Power
    ready: bool  # running and, as far as the target can tell, booted
    addresses: tuple[str, ...]
    detail: str


@dataclass(frozen=True, slots=True)
class Removal:
    """What a clean-up did."""

    deleted: tuple[Resource, ...]
    leftovers: tuple[tuple[Resource, str], ...]  # with the reason


@dataclass(frozen=True, slots=True)
class ScriptResult:
    exit_code: int
    stdout: str
    stderr: str


class TargetSite(Protocol):
    """A site where machines are brought up."""

    async def check(self, specs: Sequence[TargetSpec], *, purpose: Purpose) -> list[Finding]:
        """Read-only: networks and subnets exist, addresses free, sizes known, quota left, names free."""
        ...

    async def ensure_test_network(self, owner: Owner, *, like: Sequence[str]) -> str:
        """Make (if absent) an isolated network with the address space and subnets of the networks `like`; returns its
        name."""
        ...

    async def check_isolated(self, network: str) -> None:
        """NetworkNotIsolated when a test network has a way into another network."""
        ...

    async def create_disk(
        self,
        owner: Owner,
        spec: TargetSpec,
        request: DiskRequest,
        *,
        resume: Mapping[str, Any],
        checkpoint: Checkpoint,
    ) -> Resource: ...

    async def create_nic(self, owner: Owner, spec: TargetSpec, index: int, nic: TargetNic) -> Resource: ...

    async def create_machine(
        self,
        owner: Owner,
        spec: TargetSpec,
        disks: Sequence[Resource],
        nics: Sequence[Resource],
        *,
        resume: Mapping[str, Any],
        checkpoint: Checkpoint,
    ) -> Resource:
        """Create and start the machine on its disks; create-only."""
        ...

    async def view_machine(self, machine: Resource) -> MachineView: ...

    async def stop_machine(self, machine: Resource, *, checkpoint: Checkpoint) -> None:
        """Stop and deallocate. A machine that is gone counts as stopped."""
        ...

    async def run_script(
        self, machine: Resource, script: str, *, timeout: float, checkpoint: Checkpoint
    ) -> ScriptResult: ...

    async def list_resources(
        self, *, plan: str = "", run: str = "", machine: str = "", purpose: Purpose
    ) -> list[Resource]:
        """What Farshore made, by tags; an empty argument matches all."""
        ...

    async def remove(
        self,
        *,
        purpose: Purpose,
        checkpoint: Checkpoint,
        plan: str = "",
        run: str = "",
        machine: str = "",
        except_run: str = "",
        run_level: bool = False,
    ) -> Removal:
        """Delete what Farshore made, by tags, in dependency order. Never touches anything without our tags.

        `run_level`: only what belongs to a run as a whole (a test network), nothing of any machine.
        """
        ...

    def open_store(self) -> ReplicaStore:
        """The replica store of this site. Blocking; called from a thread."""
        ...

    async def close(self) -> None: ...
