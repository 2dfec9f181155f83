"""What the replication engine needs from the outside: a source to cut and read, a store to keep points in.

Everything here is synchronous and called from threads: bytes are moved by threads, never by the event loop, and never
by Temporal. Sizes and offsets are bytes; times are aware UTC. All failures are `FarshoreError`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING, Protocol

from farshore.domain.errors import Code, FarshoreError
from farshore.domain.points import Consistency, RecoveryPoint

if TYPE_CHECKING:
    from farshore.replication.journal.entries import Manifest
    from farshore.replication.journal.reader import PointReader
    from farshore.replication.journal.writer import Writer

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

    @property
    def whole(self) -> bool:
        """Whether every byte of the disks can be read, and not only what `changed` told. If not, nothing is read along with
        changes, and the source is not audited."""
        ...

    @property
    def left_out(self) -> Mapping[str, str]:
        """Disks that the machine has and this cut does not, by key, with the reason. A disk that was part of the newest
        point must not be left out of the next one in silence."""
        ...

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

    def confirm(self) -> None:
        """Called once after the last read and before anything is committed: an error if what was read may not have been
        of this instant, where `read` itself cannot tell. SourceReadFailed."""
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


class NoCommonInstant(FarshoreError):
    """A machine that is cut by itself only was asked for its part of an instant of several machines.

    It is an error and not a weaker point: members that are cut one after the other may contradict each other."""

    def __init__(self, reasons: Mapping[str, str]) -> None:
        """`reasons`: why, by machine."""
        self.reasons = dict(reasons)
        super().__init__(
            Code.SOURCE_NOT_ELIGIBLE,
            "No points of one instant with "
            + "; ".join(f"{machine}: {why}" for machine, why in self.reasons.items())
            + ".",
            subject=", ".join(self.reasons),
            causes=("The source of the machine cannot stop its writes while other machines are cut.",),
            action="Take the machine out of the group (it keeps points of its own), or protect it by a source that can "
            "hold it.",
            retryable=False,
            details={"machines": sorted(self.reasons)},
        )


class PointBytes(Protocol):
    """A disk of a recovery point, to be written somewhere."""

    @property
    def size(self) -> int: ...
    def write_out(
        self,
        sink: Callable[[int, bytes | memoryview], None],
        *,
        clear: Callable[[int, int], None] | None = None,
        on_base: bool = False,
        look: Callable[[], None] = ...,
        workers: int | None = None,
    ) -> None:
        """Hand every byte that is not zero to `sink`, from several threads; the target holds zeros. With `on_base` the
        target holds a copy of the frozen state from which the point starts: only what differs is written or cleared.
        Everything is verified; the target may be used only if this returns. ReplicaDamaged."""
        ...


class ReplicaStore(Protocol):
    """All points of all machines of one target."""

    def acquire(
        self, machine: str, owner: str, *, succeeding: int | None = None, asked_at: datetime | None = None
    ) -> Writer:
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

    def manifest(self, machine: str, point: str) -> Manifest:
        """PointNotFound; ReplicaDamaged when the stored bytes do not match their digest."""
        ...

    def read_point(self, machine: str, point: str, disk: str) -> PointReader:
        """The bytes of a disk of a point, for verification or restore."""
        ...

    def hold(self, machine: str, point: str, holder: str, seconds: float | None = None) -> None:
        """Protect a point from retention while a run uses it: until it is given back, or as a lease for so many seconds,
        which the same call renews. Idempotent. PointExpired when retention was faster."""
        ...

    def release(self, machine: str, holder: str) -> None:
        """Give back every hold of `holder`. Idempotent."""
        ...

    def keep_only(self, machine: str, point: str) -> list[str]:
        """Commit of a failover: fence the writer, delete all other points that no holder uses. Returns the ids that were
        deleted."""
        ...

    def known_damage(self, machine: str) -> dict[str, str]:
        """Points that are known to be damaged, by id, and why. Reads no data."""
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
    newest_taken_at: datetime | None = None  # instant of the newest point: captured
    newest_applied_at: datetime | None = (
        None  # instant of the newest point that the replica disks have reached
    )


ProgressSink = Callable[[Progress], None]
"""Called from the copying thread, often; must return quickly. May raise to cancel the copy."""
