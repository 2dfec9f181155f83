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
    def powered_off(self) -> bool:
        """Whether the machine is known to have been off at this instant. In doubt: False."""
        ...

    @property
    def disks(self) -> Sequence[DiskState]: ...

    def changed(self, disk_key: str, since: DiskState | None) -> Iterator[Extent]:
        """Extents changed since the committed state `since`, ordered, clamped to the disk, a superset of the truth.

        None means a first copy: allocated extents or the whole disk. Raises FullCopyNeeded when tracking cannot be
        trusted (the resync rules of the source).
        """
        ...

    def read(self, disk_key: str, offset: int, length: int) -> bytes:
        """Exactly `length` bytes, or an error; never short, never other bytes.

        `offset` and `length` are multiples of 512 but at the disk's end. The engine calls this from several threads at
        once.
        """
        ...

    def release(self) -> None:
        """Remove the snapshot. Idempotent. Called always, also after errors."""
        ...


class Source(Protocol):
    """A machine that can be cut."""

    def cut(self, name: str, *, want: Consistency) -> SourceCut:
        """Take one snapshot over all disks. `name` is deterministic (`farshore-<machine>-<epoch>-<cycle>`)."""
        ...

    def reap(self, upto: str = "") -> list[str]:
        """Release what dead predecessors left (snapshots that we made); returns their names.

        With `upto`, a cut's name, nothing of a higher epoch than that name's is touched: it belongs to a successor, who
        may be at work. A source that can tell raises SourceBusy then.
        """
        ...

    def close(self) -> None: ...


@dataclass(frozen=True, slots=True)
class DiskPoint:
    """A disk inside a manifest."""

    state: DiskState
    digest: str  # root over the leaf table, "b3:<hex>"
    snapshot: str  # the store's handle of the frozen replica (blob snapshot id, file name)
    leaves: str = ""  # the store's handle of the leaf table frozen with it


@dataclass(frozen=True, slots=True)
class Manifest:
    """What a committed point consists of. Its creation-if-absent under its cycle number is the commit.

    Cycle numbers rise by one from entry to entry of the machine's log, but some entries are no points: each new owner
    opens its epoch with an entry of its own (`manifest.Opening`).
    """

    machine: str
    cycle: int
    epoch: int
    parent: str  # digest of the log's previous entry
    taken_at: datetime
    committed_at: datetime
    consistency: Consistency
    final: bool
    full: bool  # at least one disk was compared in full
    reason: str  # why full, else ""
    cut: str  # name of the source snapshot
    bytes_changed: int  # what the source reported as changed, or the whole disk in a full comparison
    bytes_shipped: int  # what was written to the replica, clears not counted
    disks: tuple[DiskPoint, ...]
    tags: dict[str, str] = field(default_factory=dict[str, str])


@dataclass(frozen=True, slots=True)
class Frozen:
    """A replica disk frozen for a cycle: the store's handles of the disk and of its leaf table."""

    snapshot: str
    leaves: str


@dataclass(frozen=True, slots=True)
class Leftover:
    """What dead cycles may have left in a replica disk since the last committed point that contains it."""

    touched: tuple[Extent, ...]  # may differ from the last committed point
    torn: tuple[Extent, ...]  # of these the leaf table may be wrong as well
    strayed: bool = (
        False  # replica or leaf table differ from the newest point without explanation: trust neither
    )


class ReplicaDisk(Protocol):
    """One replica disk, open for writing under an epoch. Every call fails with ReplicaFenced once a newer epoch exists.

    Order within a cycle: `intend` → write and clear → `flush` → `put_leaves` → `settle` or the next `intend` or freeze.
    `write`, `clear` and `read` are safe to call from several threads.
    """

    @property
    def size(self) -> int: ...
    def leftover(self) -> Leftover:
        """What has to be visited again although the source may not report it as changed."""
        ...

    def intend(self, extents: Sequence[Extent]) -> None:
        """Make durable which extents are about to be written. Must precede the first write into them."""
        ...

    def settle(self) -> None:
        """Make durable that leaf table and disk agree again in the extents last intended."""
        ...

    def write(self, offset: int, data: bytes | memoryview) -> None: ...
    def clear(self, offset: int, length: int) -> None: ...
    def read(self, offset: int, length: int) -> bytes: ...
    def leaves(self) -> bytearray:
        """The leaf table: 16 bytes a leaf, zeros for a leaf of zeros. The caller changes it in place and stores it with
        `put_leaves`; it is the same object until the disk is opened anew."""
        ...

    def put_leaves(self, changed: Sequence[Extent]) -> None:
        """Store these byte ranges of the table."""
        ...

    def flush(self) -> None: ...


class ReplicaWriter(Protocol):
    """The one writer of a machine's replica, under an epoch."""

    @property
    def epoch(self) -> int: ...
    @property
    def cycle(self) -> int:
        """The number the next commit will have."""
        ...

    @property
    def parent(self) -> str:
        """Digest of the log's newest entry: what the next manifest names as its parent."""
        ...

    def head(self) -> Manifest | None:
        """The newest committed manifest whose chain is intact."""
        ...

    def open_disk(self, state: DiskState) -> ReplicaDisk:
        """Open or create (or resize) the replica of a disk."""
        ...

    def rebuild_leaves(self, disk_key: str, should_stop: Callable[[], bool]) -> None:
        """Compute the leaf table of an open disk anew from the replica's own bytes."""
        ...

    def forget(self) -> None:
        """Drop what is held in memory about disks: after a failed cycle they are opened anew."""
        ...

    def freeze(self, cycle: int, disk_key: str) -> Frozen:
        """Snapshot the replica of one disk, and its leaf table, for a cycle."""
        ...

    def commit(self, manifest: Manifest) -> RecoveryPoint:
        """Create the manifest if absent. ReplicaFenced if another writer won the number."""
        ...

    def points(self) -> list[RecoveryPoint]:
        """Committed points, oldest first."""
        ...

    def remove_points(self, cycles: Sequence[int]) -> list[int]:
        """Delete manifests, then snapshots, of these cycles; those in use are kept. Returns what was removed."""
        ...

    def keep_alive(self) -> None:
        """Raises ReplicaFenced when a newer epoch exists."""
        ...

    def close(self) -> None: ...


class PointReader(Protocol):
    """The frozen bytes of one disk of a point."""

    @property
    def size(self) -> int: ...
    def data(self) -> Sequence[Extent]:
        """Extents that may hold other bytes than zeros, ordered."""
        ...

    def read(self, offset: int, length: int) -> bytes: ...
    def leaves(self) -> bytes:
        """The leaf table frozen with the disk."""
        ...


class ReplicaStore(Protocol):
    """All points of all machines of one target."""

    def acquire(
        self, machine: str, owner: str, *, succeeding: int | None = None, asked_at: datetime | None = None
    ) -> ReplicaWriter:
        """Become the writer: raises the epoch, so that every earlier writer is fenced. Orphans of dead writers are
        reaped. Needs no consent of the former writer and never waits for it.

        With `succeeding` the epoch is taken only if the newest one is that epoch or was opened by the same `owner`;
        else ReplicaFenced. It is how a leg goes on after an error without stealing from a legitimate successor. A
        machine whose log is gone was removed: ReplicaFenced as well.

        `asked_at` is when the caller was asked to start. If another owner opened an epoch after that instant, the caller
        is late, e.g. a leg that slept over a promotion: ReplicaFenced. Other owners are those that are neither `owner`
        nor another attempt of the same activity (`owner` up to a leg's token, see `loop`). An opening without a token
        under the same name is another step of the run, not an attempt: it fences. What has to win whatever happens (the
        fencing step of a failover) passes None. Both instants are clock times: opener and asker may differ by the skew.
        """
        ...

    def points(self, machine: str) -> list[RecoveryPoint]:
        """Committed points, oldest first. Needs no writer; works when the source site is gone."""
        ...

    def manifest(self, machine: str, point_id: str) -> Manifest:
        """PointNotFound; ReplicaDamaged when the stored bytes do not match their digest."""
        ...

    def read_point(self, machine: str, point_id: str, disk_key: str) -> PointReader:
        """The frozen bytes of a disk, for verification or restore."""
        ...

    def hold(self, machine: str, point_id: str, holder: str) -> None:
        """Protect a point from retention while a run uses it. Idempotent. PointExpired when retention was faster."""
        ...

    def release(self, machine: str, holder: str) -> None:
        """Give back every hold of `holder`. Idempotent."""
        ...

    def keep_only(self, machine: str, point_id: str) -> list[str]:
        """Commit of a failover: fence the writer, delete all other points that no holder uses. Returns the ids that were
        deleted."""
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
