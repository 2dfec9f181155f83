"""What a disk of a point consists of: its line of ancestors, and for every leaf the last chunk that wrote it.

`line` follows `previous` from the point down to the nearest base of the same life, or to the birth of the disk, which
began as zeros. `regions` then lays the journal of the line over the base, a few gigabytes of disk at a time, so that memory
is bounded whatever the disk's size. Only the last writer of each leaf is ever read: a damaged chunk that a later cycle
wrote over does no harm, which is how a resync heals.
"""

from __future__ import annotations

import threading
from array import array
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from farshore.domain.errors import Code, FarshoreError
from farshore.replication.backend import Backend
from farshore.replication.journal import entries, segment, table
from farshore.replication.journal.entries import Base, BaseDisk, DiskEntry, Manifest, SegmentRef
from farshore.replication.journal.keys import Keys
from farshore.replication.journal.log import View
from farshore.replication.journal.segment import Chunk, ChunkKind, Index
from farshore.replication.ports import LEAF, Extent

REGION = 4 << 30  # bytes of disk composed at a time: 65,536 leaves
_INDEXES = 32 << 20  # bytes of indexes kept in memory
_BASE = -1  # owner of a leaf: the base
_ZERO = -2  # owner of a leaf: zeros
_HOLE = -3  # owner of a leaf: unknown, and all below


class Journal:
    """Reads segments of one machine. Safe to share between threads."""

    def __init__(self, backend: Backend, prefix: str, machine: str, keys: Keys) -> None:
        self.backend = backend
        self.prefix = prefix
        self.machine = machine
        self.keys = keys
        self._lock = threading.Lock()
        self._cache: OrderedDict[str, Index] = OrderedDict()
        self._held = 0

    def index(self, disk: str, ref: SegmentRef) -> Index:
        """ReplicaDamaged, naming segment and area, when it is missing or altered."""
        with self._lock:
            known = self._cache.get(ref.name)
            if known is not None:
                self._cache.move_to_end(ref.name)
                return known
        data = self.backend.part(self.prefix + ref.name, 0, ref.index)
        found = self.parse(disk, ref, data)
        with self._lock:
            if ref.name not in self._cache:
                self._cache[ref.name] = found
                self._held += len(found)
                while self._held > _INDEXES and len(self._cache) > 1:
                    _, old = self._cache.popitem(last=False)
                    self._held -= len(old)
        return found

    def parse(self, disk: str, ref: SegmentRef, data: bytes | None) -> Index:
        """The index out of its bytes, verified."""
        if data is None or segment.index_digest(self.keys, self.machine, disk, data) != ref.digest:
            raise segment.damaged(ref.name, disk, ref.start, ref.end - ref.start)
        try:
            return Index(self.machine, disk, data)
        except ValueError as error:
            raise segment.damaged(ref.name, disk, ref.start, ref.end - ref.start) from error

    def payload(self, disk: str, ref: SegmentRef, index: Index, first: Chunk, last: Chunk) -> bytes:
        """Stored bytes from one chunk to another one behind it."""
        start = index.payload + first.position
        length = index.payload + last.position + last.stored - start
        data = self.backend.part(self.prefix + ref.name, start, length)
        if data is None or len(data) != length:
            raise segment.damaged(ref.name, disk, first.offset, first.length)
        return data

    def refs(self, disk: DiskEntry, start: int = 0, end: int = 1 << 63) -> Iterator[SegmentRef]:
        return entries.refs(self.backend, self.prefix, disk, start, end)


@dataclass(frozen=True, slots=True)
class Line:
    """A disk of a point: what it starts from and what has to be redone."""

    key: str
    life: str
    size: int
    base: BaseDisk | None  # None: zeros, or what is `present`
    base_cycle: int  # of the base or of what is present; 0: zeros
    steps: tuple[Manifest, ...]  # ascending
    present: bool = False  # it starts from the replica as it stands
    start_size: int | None = None  # of the base or of what is present


def line(
    view: View,
    cycle: int,
    key: str,
    *,
    stop_at: int | None = None,
    stop_size: int | None = None,
    usable: Callable[[Base], bool] = lambda _: True,
) -> Line:
    """The line of a disk of point `cycle`. With `stop_at` it ends at that ancestor, where the disk had `stop_size` bytes, or,
    if that is no ancestor, at the disk's birth. ReplicaDamaged when an entry of the line is missing."""
    top = view.manifests.get(cycle)
    disk = top[0].disk(key) if top is not None else None
    if disk is None:
        raise _broken(view, cycle, key)
    frozen: dict[int, BaseDisk] = {}
    for base in view.bases:
        found = base.disk(key, disk.life) if usable(base) else None
        if found is not None:
            frozen[base.cycle] = found
    steps: list[Manifest] = []
    at = cycle
    size = disk.state.size
    while True:
        if at == stop_at:
            return Line(
                key, disk.life, size, None, at, tuple(reversed(steps)), present=True, start_size=stop_size
            )
        if stop_at is None and at in frozen:
            start = frozen[at].size
            return Line(key, disk.life, size, frozen[at], at, tuple(reversed(steps)), start_size=start)
        pair = view.manifests.get(at)
        entry = pair[0].disk(key) if pair is not None else None
        if pair is None or entry is None or entry.life != disk.life:
            raise _broken(view, at, key)
        steps.append(pair[0])
        if at == entry.born:
            return Line(key, disk.life, size, None, 0, tuple(reversed(steps)))
        at = pair[0].previous


def _broken(view: View, cycle: int, key: str) -> FarshoreError:
    what = "damaged" if cycle in view.damaged else "missing"
    return FarshoreError(
        Code.REPLICA_DAMAGED,
        f"Entry {cycle} of the log, which disk {key} needs, is {what}.",
        details={"entry": cycle, "disk": key},
    )


@dataclass(slots=True)
class Piece:
    """A chunk, and which parts of it are visible (as extents of the disk)."""

    chunk: Chunk
    runs: list[Extent]


@dataclass(slots=True)
class Group:
    """Pieces of one segment, by position."""

    ref: SegmentRef
    index: Index
    pieces: list[Piece]


@dataclass(slots=True)
class Region:
    """A part of the disk, composed. Extents end at the disk's end."""

    start: int
    end: int
    table: bytearray  # the entries of its leaves
    kept: list[Extent] = field(default_factory=list[Extent])  # from the base, and not zeros
    zeros: list[Extent] = field(default_factory=list[Extent])  # zeros that the journal wrote
    groups: list[Group] = field(default_factory=list[Group])
    holes: list[tuple[Extent, FarshoreError]] = field(default_factory=list[tuple[Extent, FarshoreError]])

    @property
    def written(self) -> Iterator[Extent]:
        """Everything that the journal wrote."""
        for group in self.groups:
            for piece in group.pieces:
                yield from piece.runs
        yield from self.zeros


BaseTable = Callable[[int, int], bytes]
"""(first leaf, count) → entries of the base."""


def regions(
    journal: Journal,
    line: Line,
    base_table: BaseTable | None,
    *,
    only: Iterable[int] | None = None,
) -> Iterator[Region]:
    """The disk, region by region in order; with `only` those with these numbers. Damage does not raise: see `holes`."""
    count = -(-line.size // REGION)
    for number in range(count) if only is None else sorted(set(only)):
        if number < count:
            yield _region(journal, line, base_table, number * REGION, min(line.size, (number + 1) * REGION))


def touched(journal: Journal, line: Line) -> set[int] | None:
    """Numbers of the regions that the journal of the line touches; None: look at all of them."""
    numbers: set[int] = set()
    size: int | None = None
    for step in line.steps:
        disk = _disk(step, line)
        if disk.pages:
            return None
        if size is not None and disk.state.size < size:
            return None
        size = disk.state.size
        for ref in disk.segments:
            if ref.end - ref.start <= REGION or ref.index > 1 << 20:
                numbers.update(range(ref.start // REGION, (ref.end - 1) // REGION + 1))
                continue
            try:
                for chunk in journal.index(line.key, ref).chunks():
                    numbers.update(range(chunk.offset // REGION, (chunk.end - 1) // REGION + 1))
            except FarshoreError:
                return None  # damaged: whoever composes it will say so
    return numbers


def _disk(step: Manifest, line: Line) -> DiskEntry:
    disk = step.disk(line.key)
    if disk is None:
        raise AssertionError("a line holds manifests of its disk only")
    return disk


class _Overlay:
    """The owners of the leaves of a region while they are being found."""

    def __init__(self, start: int, end: int, entries: bytearray) -> None:
        self.start = start
        self.end = end
        self.first = start // LEAF
        self.count = table.leaf_count(end) - self.first
        self.entries = entries
        self.owner = array("i", [_BASE]) * self.count
        self.chunks: list[tuple[SegmentRef, Index, Chunk]] = []
        self.errors: list[FarshoreError] = []

    def _clip(self, start: int, end: int) -> tuple[int, int]:
        return max(0, start // LEAF - self.first), min(self.count, -(-end // LEAF) - self.first)

    def set(self, start: int, end: int, owner: int, digests: bytes | None) -> None:
        low, high = self._clip(start, end)
        if high <= low:
            return
        self.owner[low:high] = array("i", [owner]) * (high - low)
        if digests is None:
            self.entries[low * table.ENTRY : high * table.ENTRY] = bytes((high - low) * table.ENTRY)
        else:
            skip = (low + self.first - start // LEAF) * table.ENTRY
            self.entries[low * table.ENTRY : high * table.ENTRY] = digests[
                skip : skip + (high - low) * table.ENTRY
            ]

    def lay(self, ref: SegmentRef, index: Index) -> None:
        for chunk in index.chunks(self.start, self.end):
            if chunk.kind is ChunkKind.ZERO:
                self.set(chunk.offset, chunk.end, _ZERO, None)
            else:
                self.chunks.append((ref, index, chunk))
                self.set(chunk.offset, chunk.end, len(self.chunks) - 1, index.digests(chunk))

    def lose(self, start: int, end: int, error: FarshoreError) -> None:
        self.errors.append(error)
        self.set(start, end, _HOLE - (len(self.errors) - 1), None)

    def runs(self) -> Iterator[tuple[int, int, int]]:
        """(owner, first, end) in leaves of the region."""
        owner, count = self.owner, self.count
        at = 0
        while at < count:
            mine = owner[at]
            stop = at + 1
            while stop < count and owner[stop] == mine:
                stop += 1
            yield mine, at, stop
            at = stop


def _region(journal: Journal, line: Line, base_table: BaseTable | None, start: int, end: int) -> Region:
    first, count = start // LEAF, table.leaf_count(end) - start // LEAF
    known = bytearray(count * table.ENTRY)
    if base_table is not None:
        there = count if line.start_size is None else min(count, table.leaf_count(line.start_size) - first)
        if there > 0:  # a disk that grew: what was not there is zeros
            known[: there * table.ENTRY] = base_table(first, there)
    overlay = _Overlay(start, end, known)
    size = line.start_size
    for step in line.steps:
        disk = _disk(step, line)
        if size is not None and disk.state.size < size:
            overlay.set(
                -(-disk.state.size // LEAF) * LEAF, max(size, end), _ZERO, None
            )  # cut off, later grown
        size = disk.state.size
        try:
            for ref in journal.refs(disk, start, end):
                try:
                    overlay.lay(ref, journal.index(line.key, ref))
                except FarshoreError as error:
                    if error.code is not Code.REPLICA_DAMAGED:
                        raise
                    overlay.lose(ref.start, ref.end, error)
        except FarshoreError as error:
            if error.code is not Code.REPLICA_DAMAGED:
                raise
            # A page of references is gone: nobody knows any more what its cycle wrote, in what the page covered.
            overlay.lose(*_areas_of(error, start, end), error)
    return _finished(overlay, start, end)


def _areas_of(error: FarshoreError, start: int, end: int) -> tuple[int, int]:
    areas = error.info.details.get("areas")
    if isinstance(areas, Sequence) and len(areas) == 1:
        (offset, length) = areas[0]
        return int(offset), int(offset) + int(length)
    return start, end


def _finished(overlay: _Overlay, start: int, end: int) -> Region:
    region = Region(start, end, overlay.entries)
    groups: dict[str, dict[int, Piece]] = {}
    owners: dict[str, tuple[SegmentRef, Index]] = {}
    for owner, low, high in overlay.runs():
        begin = start + low * LEAF
        run = Extent(begin, min(end, start + high * LEAF) - begin)
        if owner >= 0:
            ref, index, chunk = overlay.chunks[owner]
            owners.setdefault(ref.name, (ref, index))
            pieces = groups.setdefault(ref.name, {})
            pieces.setdefault(chunk.position, Piece(chunk, [])).runs.append(run)
        elif owner == _ZERO:
            region.zeros.append(run)
        elif owner == _BASE:
            region.kept += _written(overlay.entries, low, high, start, end)
        else:
            region.holes.append((run, overlay.errors[_HOLE - owner]))
    for name, pieces in groups.items():
        ref, index = owners[name]
        region.groups.append(Group(ref, index, [piece for _, piece in sorted(pieces.items())]))
    return region


def _written(entries: bytearray, low: int, high: int, start: int, end: int) -> Iterator[Extent]:
    """Runs of leaves in [low, high) that are not zeros."""
    if table.all_zero(entries[low * table.ENTRY : high * table.ENTRY]):
        return
    run: int | None = None
    for leaf in range(low, high + 1):
        zero = leaf == high or bytes(entries[leaf * table.ENTRY : (leaf + 1) * table.ENTRY]) == table.ZERO
        if not zero and run is None:
            run = leaf
        elif zero and run is not None:
            begin = start + run * LEAF
            yield Extent(begin, min(end, start + leaf * LEAF) - begin)
            run = None
