"""The entries of a machine's log, and the pages of segment references behind large ones.

    {"digest":"b3:<64 hex>","body":{…}}\\n

The digest is BLAKE3 over exactly the stored bytes of the body and precedes it: a torn or altered entry shows without being
parsed. `parent` is the digest of the entry before: the log is a hash chain. Three kinds take numbers of the one sequence:

    epoch   a new owner (`Opening`)
    point   a recovery point (`Manifest`): per disk the segments of this cycle and the root of its leaf table
    base    frozen states of all replica disks as of a point (`Base`)

A disk lives from the point at which it appeared (`born`) to the one at which it is no longer there; one that returns, or
whose past cannot be relied on, lives anew, on a new image. `previous` is the number of the point from which this one's
changes count: it is not always the point before, because a failover can be committed to an older one.

A manifest lists at most `INLINE` segments a disk itself. More are in pages: objects of up to `ROWS` references each,
whose names carry the digest of their bytes, in the order in which they are to be redone, before those of the manifest.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, cast
from urllib.parse import quote

from blake3 import blake3

from farshore.domain.errors import Code, FarshoreError
from farshore.domain.points import Consistency, RecoveryPoint
from farshore.replication.backend import Backend
from farshore.replication.ports import DiskState

FORMAT = 2
ROWS = 4096  # references of a page
INLINE = 64  # references of a disk in the manifest itself
_PREFIX = b'{"digest":"'
_MIDDLE = b'","body":'
_SUFFIX = b"}\n"
_DIGEST = len("b3:") + 64


@dataclass(frozen=True, slots=True)
class SegmentRef:
    """A segment of a cycle. Bytes; `start` and `end` bound what it covers of the disk."""

    name: str  # below the machine's prefix
    start: int
    end: int
    length: int  # of the object
    index: int  # of these the index

    @property
    def digest(self) -> str:
        """Of the index."""
        return self.name.rpartition("-")[2]


@dataclass(frozen=True, slots=True)
class PageRef:
    """A page of segment references."""

    name: str
    start: int
    end: int
    rows: int


@dataclass(frozen=True, slots=True)
class DiskEntry:
    """A disk inside a manifest."""

    state: DiskState
    life: str  # names the images: "<number>-<epoch>" of the first manifest of this life
    born: int  # number of that manifest
    root: str  # over the leaf table, "k3:<hex>"
    segments: tuple[SegmentRef, ...] = ()
    pages: tuple[PageRef, ...] = ()
    origins: tuple[tuple[int, int], ...] = ()  # (epoch, cycle) of dead cycles whose segments were adopted


@dataclass(frozen=True, slots=True)
class Manifest:
    """A recovery point. That its entry was created is the commit."""

    machine: str
    cycle: int
    epoch: int
    parent: str
    previous: int  # 0: none
    taken_at: datetime
    committed_at: datetime
    consistency: Consistency
    final: bool
    full: bool  # at least one disk was compared in full
    reason: str  # why full, else ""
    cut: str  # name of the source snapshot
    bytes_changed: int  # what the source reported as changed, or the whole disk in a full comparison
    bytes_shipped: int  # of chunks before compression, zeros not counted
    bytes_stored: int  # of segments
    disks: tuple[DiskEntry, ...]
    tags: dict[str, str] = field(default_factory=dict[str, str])

    @property
    def number(self) -> int:
        return self.cycle

    def disk(self, key: str) -> DiskEntry | None:
        return next((disk for disk in self.disks if disk.state.key == key), None)


@dataclass(frozen=True, slots=True)
class Opening:
    """A new owner's first entry: it takes the former owner's next number, who can never commit again."""

    machine: str
    number: int
    epoch: int  # rises from opening to opening; at least the unix time, so that it rises over a machine's lives too
    parent: str
    owner: str
    opened_at: datetime


@dataclass(frozen=True, slots=True)
class BaseDisk:
    """A frozen replica disk and the leaf table frozen with it: handles of the store."""

    key: str
    life: str
    size: int
    root: str
    snapshot: str
    table: str


@dataclass(frozen=True, slots=True)
class Base:
    """Frozen states of the disks of point `cycle`."""

    machine: str
    number: int
    epoch: int
    parent: str
    cycle: int
    made_at: datetime
    disks: tuple[BaseDisk, ...]

    def disk(self, key: str, life: str) -> BaseDisk | None:
        return next((disk for disk in self.disks if disk.key == key and disk.life == life), None)


Entry = Manifest | Opening | Base


def digest(data: bytes) -> str:
    """`b3:<hex>` of bytes."""
    return "b3:" + blake3(data).hexdigest()


def encode(entry: Entry) -> bytes:
    """The stored form. The same entry always gives the same bytes."""
    return _framed(_body(entry))


def _framed(raw: Mapping[str, Any]) -> bytes:
    body = json.dumps(raw, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()
    return _PREFIX + digest(body).encode() + _MIDDLE + body + _SUFFIX


def digest_of(entry: Entry) -> str:
    """The digest that the stored entry begins with."""
    return encode(entry)[len(_PREFIX) : len(_PREFIX) + _DIGEST].decode()


def decode(data: bytes, *, name: str) -> tuple[Entry, str]:
    """The entry and its digest. ReplicaDamaged, naming `name`, when a byte is wrong or missing."""
    body, stated = _unframed(data, name)
    try:
        return _parse(json.loads(body)), stated
    except (KeyError, ValueError, TypeError) as error:
        raise FarshoreError(
            Code.REPLICA_DAMAGED,
            f"The entry {name} was written in a form that this version cannot read: {error}.",
            subject=name,
        ) from error


def _unframed(data: bytes, name: str) -> tuple[bytes, str]:
    start = len(_PREFIX) + _DIGEST + len(_MIDDLE)
    body = data[start : -len(_SUFFIX)]
    stated = data[len(_PREFIX) : len(_PREFIX) + _DIGEST]
    framed = data[:start] == _PREFIX + stated + _MIDDLE and data.endswith(_SUFFIX)
    if not framed or digest(body).encode() != stated:
        raise FarshoreError(Code.REPLICA_DAMAGED, f"{name} does not match its digest.", subject=name)
    return body, stated.decode()


def point_id(cycle: int, entry_digest: str) -> str:
    """`p-<cycle>-<first 8 hex of the manifest's digest>`."""
    return f"p-{cycle:010d}-{entry_digest.removeprefix('b3:')[:8]}"


def cycle_of(id_of_point: str) -> int | None:
    """The cycle inside a point id; None when it is not one."""
    parts = id_of_point.split("-")
    if len(parts) != 3 or parts[0] != "p" or not parts[1].isdecimal():
        return None
    return int(parts[1])


def to_point(manifest: Manifest, entry_digest: str, *, pinned: bool = False) -> RecoveryPoint:
    """What lists show of a manifest."""
    return RecoveryPoint(
        id=point_id(manifest.cycle, entry_digest),
        machine=manifest.machine,
        cycle=manifest.cycle,
        taken_at=manifest.taken_at,
        consistency=manifest.consistency,
        digest=entry_digest,
        size_bytes=sum(disk.state.size for disk in manifest.disks),
        pinned=pinned,
        final=manifest.final,
    )


# names ----------------------------------------------------------------------------------------------------------------


def safe_name(text: str) -> str:
    """A machine's or disk's name as one component of a path or blob name; different names stay different."""
    if not text:
        raise FarshoreError(Code.INVALID_INPUT, "A machine or disk without a name cannot be replicated.")
    quoted = quote(text, safe="")
    return "%2E" + quoted[1:] if quoted.startswith(".") else quoted


def entry_name(number: int) -> str:
    """Below the machine's prefix."""
    return f"m/{number:010d}.json"


def segment_name(epoch: int, cycle: int, disk: str, serial: int, digest: str) -> str:
    """Below the machine's prefix."""
    return f"s/{epoch:012d}/{cycle:010d}-{safe_name(disk)}-{serial:06d}-{digest}"


def origin(name: str) -> tuple[int, int, str] | None:
    """Epoch, cycle and (safe) disk of the name of a segment or page, None when it is none."""
    parts = name.split("/")
    if len(parts) != 3 or parts[0] not in ("s", "i") or not parts[1].isdecimal():
        return None
    cycle, _, rest = parts[2].partition("-")
    disk = rest.rsplit("-", 2)[0]
    return (int(parts[1]), int(cycle), disk) if cycle.isdecimal() and disk else None


# pages ----------------------------------------------------------------------------------------------------------------


def page(epoch: int, cycle: int, disk: str, rows: Sequence[SegmentRef]) -> tuple[PageRef, bytes]:
    """A page of references and its bytes."""
    data = _framed({"rows": [_row(row) for row in rows]})
    sum_ = blake3(data).hexdigest(length=16)
    name = f"i/{epoch:012d}/{cycle:010d}-{safe_name(disk)}-{rows[0].name.rsplit('-', 2)[1]}-{sum_}"
    return PageRef(name, min(row.start for row in rows), max(row.end for row in rows), len(rows)), data


def refs(
    backend: Backend, prefix: str, disk: DiskEntry, start: int = 0, end: int = 1 << 63
) -> Iterator[SegmentRef]:
    """The segments of a disk in a manifest that may cover bytes of [start, end), in the order of redo. ReplicaDamaged,
    naming the page, when one is missing or altered."""
    for ref in disk.pages:
        if ref.start >= end or ref.end <= start:
            continue
        for row in read_page(backend, prefix, disk.state.key, ref):
            if row.start < end and row.end > start:
                yield row
    for row in disk.segments:
        if row.start < end and row.end > start:
            yield row


def read_page(backend: Backend, prefix: str, disk: str, ref: PageRef) -> list[SegmentRef]:
    """The rows of a page."""
    data = backend.get(prefix + ref.name)
    if data is None or blake3(data).hexdigest(length=16) != ref.name.rpartition("-")[2]:
        raise FarshoreError(
            Code.REPLICA_DAMAGED,
            f"The list of segments {ref.name} is {'missing' if data is None else 'damaged'}.",
            subject=ref.name,
            details={"segment": ref.name, "disk": disk, "areas": [[ref.start, ref.end - ref.start]]},
        )
    raw = cast("dict[str, Any]", json.loads(_unframed(data, ref.name)[0]))
    return [_to_row(row) for row in raw["rows"]]


def _row(row: SegmentRef) -> list[Any]:
    return [row.name, row.start, row.end, row.length, row.index]


def _to_row(raw: Sequence[Any]) -> SegmentRef:
    name, start, end, length, index = raw
    return SegmentRef(str(name), int(start), int(end), int(length), int(index))


# JSON -----------------------------------------------------------------------------------------------------------------


def _time(moment: datetime) -> str:
    if moment.tzinfo is None:
        raise ValueError("times are aware")
    return moment.astimezone(UTC).isoformat(timespec="microseconds")


def _body(entry: Entry) -> dict[str, Any]:
    head: dict[str, Any] = {
        "format": FORMAT,
        "machine": entry.machine,
        "number": entry.number,
        "epoch": entry.epoch,
        "parent": entry.parent,
    }
    if isinstance(entry, Opening):
        return head | {"kind": "epoch", "owner": entry.owner, "opened_at": _time(entry.opened_at)}
    if isinstance(entry, Base):
        return head | {
            "kind": "base",
            "cycle": entry.cycle,
            "made_at": _time(entry.made_at),
            "disks": [
                {
                    "key": disk.key,
                    "life": disk.life,
                    "size": disk.size,
                    "root": disk.root,
                    "snapshot": disk.snapshot,
                    "table": disk.table,
                }
                for disk in entry.disks
            ],
        }
    return head | {
        "kind": "point",
        "previous": entry.previous,
        "taken_at": _time(entry.taken_at),
        "committed_at": _time(entry.committed_at),
        "consistency": entry.consistency.value,
        "final": entry.final,
        "full": entry.full,
        "reason": entry.reason,
        "cut": entry.cut,
        "bytes_changed": entry.bytes_changed,
        "bytes_shipped": entry.bytes_shipped,
        "bytes_stored": entry.bytes_stored,
        "disks": [_disk_body(disk) for disk in entry.disks],
        "tags": dict(entry.tags),
    }


def _disk_body(disk: DiskEntry) -> dict[str, Any]:
    return {
        "key": disk.state.key,
        "label": disk.state.label,
        "size": disk.state.size,
        "identity": disk.state.identity,
        "tracker": disk.state.tracker,
        "boot": disk.state.boot,
        "life": disk.life,
        "born": disk.born,
        "root": disk.root,
        "segments": [_row(row) for row in disk.segments],
        "pages": [[page.name, page.start, page.end, page.rows] for page in disk.pages],
        "origins": [list(pair) for pair in disk.origins],
    }


def _parse(raw: object) -> Entry:
    if not isinstance(raw, Mapping):
        raise TypeError("the body is not an object")
    body = cast("Mapping[str, Any]", raw)
    if body["format"] != FORMAT:
        raise ValueError(f"format {body['format']}")
    machine, number, epoch, parent = (
        str(body["machine"]),
        int(body["number"]),
        int(body["epoch"]),
        str(body["parent"]),
    )
    match body["kind"]:
        case "epoch":
            opened = datetime.fromisoformat(body["opened_at"])
            return Opening(machine, number, epoch, parent, body["owner"], opened)
        case "base":
            disks = tuple(
                BaseDisk(d["key"], d["life"], int(d["size"]), d["root"], d["snapshot"], d["table"])
                for d in body["disks"]
            )
            made = datetime.fromisoformat(body["made_at"])
            return Base(machine, number, epoch, parent, int(body["cycle"]), made, disks)
        case "point":
            return Manifest(
                machine=machine,
                cycle=number,
                epoch=epoch,
                parent=parent,
                previous=int(body["previous"]),
                taken_at=datetime.fromisoformat(body["taken_at"]),
                committed_at=datetime.fromisoformat(body["committed_at"]),
                consistency=Consistency(body["consistency"]),
                final=bool(body["final"]),
                full=bool(body["full"]),
                reason=body["reason"],
                cut=body["cut"],
                bytes_changed=int(body["bytes_changed"]),
                bytes_shipped=int(body["bytes_shipped"]),
                bytes_stored=int(body["bytes_stored"]),
                disks=tuple(_to_disk(disk) for disk in body["disks"]),
                tags=dict(body["tags"]),
            )
        case kind:
            raise ValueError(f"kind {kind!r}")


def _to_disk(raw: Mapping[str, Any]) -> DiskEntry:
    return DiskEntry(
        state=DiskState(
            key=raw["key"],
            label=raw["label"],
            size=int(raw["size"]),
            identity=raw["identity"],
            tracker=raw["tracker"],
            boot=bool(raw["boot"]),
        ),
        life=raw["life"],
        born=int(raw["born"]),
        root=raw["root"],
        segments=tuple(_to_row(row) for row in raw["segments"]),
        pages=tuple(PageRef(str(n), int(s), int(e), int(r)) for n, s, e, r in raw["pages"]),
        origins=tuple((int(epoch), int(cycle)) for epoch, cycle in raw["origins"]),
    )


def life_of(cycle: int, epoch: int) -> str:
    """Name of the life that a disk begins in a cycle."""
    return f"{cycle}-{epoch}"


def born(life: str) -> float:
    """When a life began, unix seconds: an epoch is at least the time of its opening, and hardly more."""
    return float(life.rpartition("-")[2])
