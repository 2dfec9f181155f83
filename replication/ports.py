"""What the replication engine needs from the outside: a source to cut and read, a store to keep points in.

Everything here is synchronous and called from threads: bytes are moved by threads, never by the event loop, and never
by Temporal. Sizes and offsets are bytes; times are aware UTC. All failures are `FarshoreError`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Protocol

from farshore.domain.points import Consistency, RecoveryPoint

LEAF = 65536  # bytes of a leaf: the unit of change tracking, hashing and alignment


@dataclass(frozen=True, slots=True)
class Extent:
    """A run of bytes of a disk."""

    start: int
    length: int


@dataclass(frozen=True, slots=True)
class DiskState:
    """A disk as one cut saw it. Two states with a different `identity` or `size` or tracker epoch need a resync."""

    key: str  # stable within the machine, e.g. the vSphere device key "2000"
    label: str
    size: int
    identity: str  # what must stay equal for deltas to be valid, e.g. "uuid|path"
    tracker: str | None  # opaque id of change tracking at this cut, e.g. a CBT changeId
    boot: bool = False


class FullCopyNeeded(Exception):
    """`SourceCut.changed` cannot answer: every byte must be compared. `reason` is for a person."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class SourceCut(Protocol):
    """One instant of a machine, over all its disks, readable until released."""

    @property
    def name(self) -> str: ...
    @property
    def taken_at(self) -> datetime: ...
    @property
    def consistency(self) -> Consistency: ...
    @property
    def disks(self) -> Sequence[DiskState]: ...

    def changed(self, disk_key: str, since: DiskState | None) -> Iterator[Extent]:
        """Extents changed since the committed state `since`, ordered, clamped to the disk, a superset of the truth.

        None means a first copy: allocated extents or the whole disk. Raises FullCopyNeeded when tracking cannot be
        trusted (the resync rules of the source).
        """
        ...

    def read(self, disk_key: str, offset: int, length: int) -> bytes:
        """Exactly `length` bytes, or an error; never short, never other bytes."""
        ...

    def release(self) -> None:
        """Remove the snapshot. Idempotent. Called always, also after errors."""
        ...


class Source(Protocol):
    """A machine that can be cut."""

    def cut(self, name: str, *, want: Consistency) -> SourceCut:
        """Take one snapshot over all disks. `name` is deterministic (`farshore-<machine>-<epoch>-<cycle>`)."""
        ...

    def reap(self) -> list[str]:
        """Release what a dead predecessor left (snapshots with our prefix); returns their names."""
        ...

    def close(self) -> None: ...


@dataclass(frozen=True, slots=True)
class DiskPoint:
    """A disk inside a manifest."""

    state: DiskState
    digest: str  # root over the leaf table, "b3:<hex>"
    snapshot: str  # the store's handle of the frozen replica (blob snapshot id, file name)


@dataclass(frozen=True, slots=True)
class Manifest:
    """What a committed point consists of. Its creation-if-absent under its cycle number is the commit."""

    machine: str
    cycle: int
    epoch: int
    parent: str  # digest of the previous manifest, "" for the first
    taken_at: datetime
    committed_at: datetime
    consistency: Consistency
    final: bool
    full: bool  # at least one disk was compared in full
    reason: str  # why full, else ""
    cut: str  # name of the source snapshot
    bytes_changed: int
    bytes_shipped: int
    disks: tuple[DiskPoint, ...]
    tags: dict[str, str] = field(default_factory=dict[str, str])


class ReplicaDisk(Protocol):
    """One replica disk, open for writing under an epoch. Every call fails with ReplicaFenced once a newer epoch exists."""

    @property
    def size(self) -> int: ...
    def write(self, offset: int, data: bytes | memoryview) -> None: ...
    def clear(self, offset: int, length: int) -> None: ...
    def read(self, offset: int, length: int) -> bytes: ...
    def leaves(self) -> bytearray:
        """The leaf table as last flushed: 16 bytes a leaf, zeros where never written."""
        ...

    def put_leaves(self, table: bytes | bytearray | memoryview, changed: Sequence[Extent]) -> None:
        """Store the table; `changed` are byte ranges of the table."""
        ...

    def flush(self) -> None: ...


class ReplicaWriter(Protocol):
    """The one writer of a machine's replica, under an epoch."""

    @property
    def epoch(self) -> int: ...
    def head(self) -> Manifest | None:
        """The newest committed manifest whose chain is intact."""
        ...

    def open_disk(self, state: DiskState) -> ReplicaDisk:
        """Open or create (or resize) the replica of a disk."""
        ...

    def freeze(self, cycle: int, disk_key: str) -> str:
        """Snapshot the replica of one disk for a cycle; returns the handle that goes into the manifest."""
        ...

    def commit(self, manifest: Manifest) -> RecoveryPoint:
        """Create the manifest if absent. ReplicaFenced if another writer won the number."""
        ...

    def remove_points(self, cycles: Sequence[int]) -> list[int]:
        """Delete manifests, then snapshots, of these cycles; those in use are kept. Returns what was removed."""
        ...

    def keep_alive(self) -> None:
        """Renew the lease. Raises ReplicaFenced when it was lost."""
        ...

    def close(self) -> None: ...


class ReplicaStore(Protocol):
    """All points of all machines of one target."""

    def acquire(self, machine: str, owner: str) -> ReplicaWriter:
        """Become the writer: raises the epoch, so that every earlier writer is fenced. Orphans of dead writers are
        reaped."""
        ...

    def points(self, machine: str) -> list[RecoveryPoint]:
        """Committed points, oldest first. Needs no writer; works when the source site is gone."""
        ...

    def manifest(self, machine: str, point_id: str) -> Manifest: ...

    def hold(self, machine: str, point_id: str, holder: str) -> None:
        """Protect a point from retention while a run uses it. Idempotent."""
        ...

    def release(self, machine: str, holder: str) -> None:
        """Give back every hold of `holder`. Idempotent."""
        ...

    def keep_only(self, machine: str, point_id: str) -> list[str]:
        """Commit of a failover: delete all other points. Returns the ids that were deleted."""
        ...

    def remove_machine(self, machine: str) -> None:
        """Delete the replica and all points. Idempotent."""
        ...

    def close(self) -> None: ...


@dataclass(frozen=True, slots=True)
class Progress:
    """What a long copy tells while it runs. Bytes; `stage` in words a person understands."""

    stage: str
    disk: str
    done: int
    total: int
    cycle: int
    points: int = 0
    newest_point: str = ""
    newest_taken_at: datetime | None = None


ProgressSink = Callable[[Progress], None]
"""Called from the copying thread, often; must return quickly. May raise to cancel the copy."""
