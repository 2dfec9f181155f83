"""The ledger: a workload that can tell afterwards exactly what survived.

A guest writes numbered, hash-chained records of 512 bytes (one sector: a device writes it whole or not at all) across
all disks of its machine, strictly one after the other: record `n + 1` is issued only after record `n` is acknowledged.
Any cut that is consistent across the disks therefore holds an unbroken prefix 1…n (or, once the rings have wrapped, an
unbroken window that ends at n). A cut that took its disks at different instants has a hole, and `verify` says so.

Layout of each disk (offsets relative to `area_offset`, all integers little-endian):

    0     superblock, 512 bytes: magic, disk index, disk count, slots, ledger id, machine name, SHA-256 of the rest
    4096  ring of `slots` records of 512 bytes

Record `n` (from 1) lies on disk `n mod k`, slot `(n div k) mod slots`.

    0   8s  magic         8   B  kind         9   B  length of the machine's name   10  H  disk index
    12  I   reserved     16   Q  number      24   Q  UTC time, ns                   32 16s ledger id
    48 32s  hash of the previous record (record 1: SHA-256 of the ledger id)        80 64s machine name, UTF-8
    144     filler (anything)                480 32s SHA-256 of bytes 0…479

This module does no I/O of its own: a disk is anything with `read(offset, length)` and `write(offset, data)`.
"""

from __future__ import annotations

import enum
import hashlib
import struct
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

RECORD_SIZE = 512
RING_OFFSET = 4096
DEFAULT_AREA_OFFSET = 1 << 20
DEFAULT_AREA_SIZE = 16 << 20
MAX_LISTED = 1000
"""Holes and bad records listed by a report at most; the counts are always complete."""

_SUPER_MAGIC = b"FSLEDG01"
_RECORD_MAGIC = b"FSREC001"
_SUPER = struct.Struct("<8sHHIQ16sB64s")
_HEAD = struct.Struct("<8sBBHIQQ16s32s64s")
_BODY = RECORD_SIZE - 32
_READ_STEP = 1 << 20
_ZERO_RECORD = bytes(RECORD_SIZE)


class Device(Protocol):
    """A disk as the ledger sees it; offsets and lengths in bytes."""

    def read(self, offset: int, length: int, /) -> bytes: ...

    def write(self, offset: int, data: bytes, /) -> object: ...


class ReadableDevice(Protocol):
    """A disk that can only be read: enough for `verify`."""

    def read(self, offset: int, length: int, /) -> bytes: ...


class Kind(enum.IntEnum):
    """What a record stands for."""

    WORK = 0
    BOOT = 1
    """First record after a power on."""
    SHUTDOWN = 2
    """Last record of an orderly shutdown."""


class LedgerError(ValueError):
    """The disks hold no ledger, or not this one."""


@dataclass(frozen=True, slots=True)
class Record:
    """One record as read."""

    number: int
    kind: Kind
    time_ns: int
    disk: int
    machine: str
    ledger_id: bytes
    previous: bytes
    digest: bytes


@dataclass(frozen=True, slots=True)
class Acknowledged:
    """What the guest was promised: record `number` is on its disks."""

    number: int
    time_ns: int
    kind: Kind


@dataclass(frozen=True, slots=True)
class LedgerReport:
    """Which records survived.

    `first_number`…`prefix_end` is the unbroken, verified run that starts at the oldest record the rings should hold.
    `intact` means that this run reaches `last_number` and that nothing else is wrong.
    """

    machine: str
    ledger_id: str
    first_number: int
    """0 when there is no record."""
    last_number: int
    """Highest number among valid records; 0 when there is none."""
    prefix_end: int
    intact: bool
    holes: tuple[int, ...]
    """Missing numbers below `last_number`, the first `MAX_LISTED` of them."""
    hole_count: int
    torn: tuple[tuple[int, int], ...]
    """(disk, slot) of sectors that hold neither zeros nor a valid record of this ledger in its place."""
    problems: tuple[str, ...]
    last_time_ns: int
    """UTC time in the record `last_number`, ns; 0 when there is none."""
    last_kind: Kind | None

    @property
    def last_time(self) -> float:
        """UTC time of the last record in seconds since the epoch."""
        return self.last_time_ns / 1e9


@dataclass(frozen=True, slots=True)
class _Super:
    index: int
    count: int
    slots: int
    ledger_id: bytes
    machine: str


def is_formatted(disks: Sequence[ReadableDevice], *, area_offset: int = DEFAULT_AREA_OFFSET) -> bool:
    """Whether every disk carries a ledger superblock."""
    return all(disk.read(area_offset, 8) == _SUPER_MAGIC for disk in disks)


def format_ledger(
    disks: Sequence[Device],
    machine: str,
    *,
    area_size: int = DEFAULT_AREA_SIZE,
    area_offset: int = DEFAULT_AREA_OFFSET,
    ledger_id: bytes | None = None,
) -> None:
    """Lay an empty ledger on `disks`; `area_size` bytes each, from `area_offset`.

    16 MiB hold 32,760 records a disk; 512 MiB on two disks hold more than two million.
    """
    slots = (area_size - RING_OFFSET) // RECORD_SIZE
    name = machine.encode()
    if slots < 1 or not disks:
        raise LedgerError("a ledger needs a disk and room for a record")
    if len(name) > 64:
        raise LedgerError("machine name longer than 64 bytes")
    identity = ledger_id or uuid.uuid4().bytes
    for index, disk in enumerate(disks):
        for offset in range(area_offset, area_offset + area_size, _READ_STEP):
            length = min(_READ_STEP, area_offset + area_size - offset)
            if disk.read(offset, length).strip(b"\0"):
                disk.write(offset, bytes(length))
        head = _SUPER.pack(_SUPER_MAGIC, index, len(disks), slots, area_offset, identity, len(name), name)
        body = head.ljust(_BODY, b"\0")
        disk.write(area_offset, body + hashlib.sha256(body).digest())


class LedgerWriter:
    """Appends records; one writer a ledger. Not safe for concurrent use."""

    def __init__(
        self,
        disks: Sequence[Device],
        *,
        area_offset: int = DEFAULT_AREA_OFFSET,
        clock_ns: Callable[[], int] = time.time_ns,
        filler: Callable[[int], bytes] | None = None,
    ) -> None:
        """Continue the ledger found on `disks`. Raises `LedgerError` where there is none."""
        self._disks = disks
        self._area_offset = area_offset
        self._clock_ns = clock_ns
        self._filler = filler
        supers = _read_supers(disks, area_offset)
        self._super = supers[0]
        self._name = self._super.machine.encode()
        scan = _scan(disks, area_offset, supers)
        last = max(scan.records.values(), key=lambda r: r.number, default=None)
        self.last_number = last.number if last else 0
        self.last_time_ns = last.time_ns if last else 0
        self.last_kind = last.kind if last else None
        self._previous = last.digest if last else hashlib.sha256(self._super.ledger_id).digest()

    @property
    def area_end(self) -> int:
        """First byte behind the ledger's area, the same on all disks."""
        return self._area_offset + RING_OFFSET + self._super.slots * RECORD_SIZE

    def append(self, kind: Kind = Kind.WORK) -> Acknowledged:
        """Write the next record and return once the device has taken it."""
        number = self.last_number + 1
        count = len(self._disks)
        index = number % count
        now = max(self._clock_ns(), self.last_time_ns + 1)
        data, digest = _encode(
            number=number,
            kind=kind,
            time_ns=now,
            disk=index,
            identity=self._super.ledger_id,
            previous=self._previous,
            name=self._name,
            filler=self._filler,
        )
        slot = (number // count) % self._super.slots
        self._disks[index].write(self._area_offset + RING_OFFSET + slot * RECORD_SIZE, data)
        self.last_number, self.last_time_ns, self.last_kind, self._previous = number, now, kind, digest
        return Acknowledged(number, now, kind)


def verify(disks: Sequence[ReadableDevice], *, area_offset: int = DEFAULT_AREA_OFFSET) -> LedgerReport:
    """Read the ledger on `disks` (in the machine's order) and say which prefix of it survived.

    Raises `LedgerError` when a disk has no superblock or the disks belong to different ledgers.
    """
    supers = _read_supers(disks, area_offset)
    head = supers[0]
    problems = [
        f"disk {place} of the machine holds the ledger's disk {found.index}"
        for place, found in enumerate(supers)
        if found.index != place
    ]
    if head.count != len(disks):
        problems.append(f"the ledger spans {head.count} disks, {len(disks)} were given")
    scan = _scan(disks, area_offset, supers)
    by_number = {record.number: record for record in scan.records.values()}
    last = max(by_number, default=0)
    first = max(1, last - head.count * head.slots + 1) if last else 0
    problems.extend(scan.problems)
    holes: list[int] = []
    hole_count = 0
    prefix_end = max(0, first - 1)
    unbroken = True
    previous = hashlib.sha256(head.ledger_id).digest() if first == 1 else None
    for number in range(first, last + 1) if last else ():
        record = by_number.get(number)
        if record is None:
            hole_count += 1
            if len(holes) < MAX_LISTED:
                holes.append(number)
            unbroken, previous = False, None
            continue
        if previous is not None and record.previous != previous:
            problems.append(f"record {number} does not continue record {number - 1}")
            unbroken = False
        if unbroken:
            prefix_end = number
        previous = record.digest
    if hole_count:
        problems.append(f"{hole_count} records are missing below record {last}, the first is {holes[0]}")
    newest = by_number.get(last)
    return LedgerReport(
        machine=head.machine,
        ledger_id=head.ledger_id.hex(),
        first_number=first,
        last_number=last,
        prefix_end=prefix_end if last else 0,
        intact=not problems and not hole_count and not scan.torn,
        holes=tuple(holes),
        hole_count=hole_count,
        torn=tuple(scan.torn[:MAX_LISTED]),
        problems=tuple(problems[:MAX_LISTED]),
        last_time_ns=newest.time_ns if newest else 0,
        last_kind=newest.kind if newest else None,
    )


@dataclass(slots=True)
class _Scan:
    records: dict[tuple[int, int], Record]
    torn: list[tuple[int, int]]
    problems: list[str]


def _scan(disks: Sequence[ReadableDevice], area_offset: int, supers: Sequence[_Super]) -> _Scan:
    """Read all rings; keep the valid records that lie where they belong."""
    found = _Scan({}, [], [])
    for place, disk in enumerate(disks):
        head = supers[place]
        start = area_offset + RING_OFFSET
        end = start + head.slots * RECORD_SIZE
        for offset in range(start, end, _READ_STEP):
            chunk = disk.read(offset, min(_READ_STEP, end - offset))
            base = (offset - start) // RECORD_SIZE
            if not chunk.strip(b"\0"):
                continue
            for i in range(len(chunk) // RECORD_SIZE):
                raw = chunk[i * RECORD_SIZE : (i + 1) * RECORD_SIZE]
                if raw == _ZERO_RECORD:
                    continue
                slot = base + i
                record = _decode(raw)
                if record is None or record.ledger_id != head.ledger_id:
                    found.torn.append((place, slot))
                    found.problems.append(f"disk {place} slot {slot}: torn or forged record")
                elif (
                    record.number % head.count != head.index
                    or (record.number // head.count) % head.slots != slot
                    or record.disk != head.index
                    or record.machine != head.machine
                ):
                    found.torn.append((place, slot))
                    found.problems.append(f"disk {place} slot {slot}: record {record.number} is out of place")
                else:
                    found.records[(place, slot)] = record
    return found


def _read_supers(disks: Sequence[ReadableDevice], area_offset: int) -> list[_Super]:
    if not disks:
        raise LedgerError("no disks given")
    supers: list[_Super] = []
    for place, disk in enumerate(disks):
        raw = disk.read(area_offset, RECORD_SIZE)
        if raw[:8] != _SUPER_MAGIC or hashlib.sha256(raw[:_BODY]).digest() != raw[_BODY:]:
            raise LedgerError(f"disk {place} holds no ledger at offset {area_offset}")
        _, index, count, slots, _, identity, length, name = _SUPER.unpack_from(raw)
        supers.append(_Super(index, count, slots, identity, name[:length].decode()))
    if len({(s.ledger_id, s.count, s.slots) for s in supers}) != 1:
        raise LedgerError("the disks belong to different ledgers")
    return supers


def _encode(
    *,
    number: int,
    kind: Kind,
    time_ns: int,
    disk: int,
    identity: bytes,
    previous: bytes,
    name: bytes,
    filler: Callable[[int], bytes] | None,
) -> tuple[bytes, bytes]:
    head = _HEAD.pack(_RECORD_MAGIC, kind, len(name), disk, 0, number, time_ns, identity, previous, name)
    room = _BODY - len(head)
    pad = filler(room) if filler else hashlib.shake_128(head).digest(room)
    body = head + pad[:room].ljust(room, b"\0")
    digest = hashlib.sha256(body).digest()
    return body + digest, digest


def _decode(raw: bytes) -> Record | None:
    digest = raw[_BODY:]
    if raw[:8] != _RECORD_MAGIC or hashlib.sha256(raw[:_BODY]).digest() != digest:
        return None
    _, kind, length, disk, _, number, time_ns, identity, previous, name = _HEAD.unpack_from(raw)
    try:
        return Record(number, Kind(kind), time_ns, disk, name[:length].decode(), identity, previous, digest)
    except ValueError:  # a kind or a name that no writer makes
        return None
