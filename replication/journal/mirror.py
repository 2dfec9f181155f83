"""L1: the replica disk and its leaf table, advanced by idempotent redo of the journal.

A disk's life has two images: `d/<disk>-<life>.vhd`, byte n of the disk is byte n of it, and `d/<disk>-<life>.leaves`: 8 KiB
of header, then the leaf table. The header says up to which point the redo got (`applied`). It is written last: data
flushed, table flushed, header written and flushed. Whatever a dead redo left is overwritten by the next one, which starts
at the same header: a torn replica needs no repair of its own. The header has two slots written in turn, so that a torn one
leaves the other.

Before its first write a redo notes the point that it is after (`target`): until it ends, parts of the replica are at that
point already. A long redo also notes how many regions are done, durably, so that it can be interrupted; the next one goes on
with the same target. A replica whose `applied` or `target` is not an ancestor of the newest point (after a failover was
committed to an older point, or when the header is gone) is emptied and filled again from the nearest base. Until that is
done its header says "nothing".

Images carry fences: a stale owner's redo fails with ReplicaFenced at its next write.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass, replace
from typing import Any, cast

from farshore.domain.errors import Code, FarshoreError
from farshore.replication.backend import Backend, Kind, handle, parse_handle
from farshore.replication.extents import bridge, normalise, split
from farshore.replication.journal import compose, lanes, stream, table
from farshore.replication.journal.compose import Journal, Line, Region
from farshore.replication.journal.entries import Base, DiskEntry, Manifest, digest, safe_name
from farshore.replication.journal.gather import Gather, Sink
from farshore.replication.journal.log import View
from farshore.replication.journal.stream import Copy, Fetch
from farshore.replication.ports import LEAF, Extent

HEADER = 8192  # bytes before the table
_SLOT = 4096
_PAGE = 512
_GAP = 8192  # bytes of table written along to save a request
_MOST = 1 << 20  # bytes of one read of a table
_LONG = 1 << 30  # bytes of journal above which a redo notes every region


@dataclass(frozen=True, slots=True)
class Header:
    """How far a replica disk is."""

    life: str
    applied: int  # number of the point; 0: nothing yet
    size: int  # of the disk then
    sequence: int
    clean: bool  # with nothing applied: only journal of this very life was ever written into zeros
    target: int = 0  # the point that a redo is after; 0: none is under way
    done: int = 0  # regions that are at the target


def names(prefix: str, key: str, life: str) -> tuple[str, str]:
    """The two images of a disk's life."""
    stem = f"{prefix}d/{safe_name(key)}-{life}"
    return f"{stem}.vhd", f"{stem}.leaves"


def table_bytes(size: int) -> int:
    """Size of the table's image."""
    return HEADER + max(_PAGE, -(-table.leaf_count(size) * table.ENTRY // _PAGE) * _PAGE)


def read_header(backend: Backend, image: str, snapshot: str = "") -> Header | None:
    """The valid header with the highest sequence; None: neither slot is."""
    best: Header | None = None
    for slot in (0, 1):
        found = _parse_header(backend.read(image, slot * _SLOT, _SLOT, snapshot))
        if found is not None and (best is None or found.sequence > best.sequence):
            best = found
    return best


def read_entries(backend: Backend, image: str, first: int, count: int, snapshot: str = "") -> bytes:
    """Entries of a stored table."""
    at, left = HEADER + first * table.ENTRY, count * table.ENTRY
    parts: list[bytes] = []
    while left:
        length = min(left, _MOST)
        parts.append(backend.read(image, at, length, snapshot))
        at, left = at + length, left - length
    return b"".join(parts)


def base_table(backend: Backend, line: Line) -> compose.BaseTable | None:
    """The entries of a line's base."""
    if line.base is None:
        return None
    image, snapshot = parse_handle(line.base.table)

    def entries(first: int, count: int) -> bytes:
        with stream.blaming(image, snapshot, line.key):
            return read_entries(backend, image, first, count, snapshot)

    return entries


def usable(view: View, head: Manifest, key: str, header: Header | None) -> Header | None:
    """The header, if replica and table can be brought to `head` from there; None: they have to be filled anew."""
    if header is None:
        return None
    try:
        line = compose.line(view, head.cycle, key, stop_at=header.applied, stop_size=header.size)
    except FarshoreError as error:
        if error.code is not Code.REPLICA_DAMAGED:
            raise
        # With nothing applied it may still be filled from a base: then only the target has to be an ancestor.
        return header if header.applied == 0 and _descends(view, head, header.target) else None
    if header.applied and not line.present:
        return None
    steps = {step.cycle for step in line.steps}
    return header if header.target == 0 or header.target in steps else None


def _descends(view: View, head: Manifest, cycle: int) -> bool:
    """Whether `head` descends from point `cycle`, as far as entries are kept; 0: from nothing."""
    at = head.cycle
    while at > cycle and at in view.manifests:
        at = view.manifests[at][0].previous
    return cycle in (at, 0)


@contextlib.contextmanager
def unless_damaged() -> Generator[None]:
    """Go on without what is damaged."""
    try:
        yield
    except FarshoreError as error:
        if error.code is not Code.REPLICA_DAMAGED:
            raise


def _journal_bytes(line: Line) -> int:
    return sum(step.bytes_stored for step in line.steps) + (line.size if line.base is not None else 0)


class Mirror:
    """The replica disks of a machine, under an epoch."""

    def __init__(
        self,
        backend: Backend,
        journal: Journal,
        epoch: int,
        *,
        workers: int = 0,
        look: Callable[[], None] = lambda: None,
        avoid: Callable[[Base], bool] = lambda _: True,
        take: Callable[[int], None] | None = None,
    ) -> None:
        """`look` is called often and may raise to end a redo. `avoid` says which bases may be used to fill a replica."""
        self._backend = backend
        self._journal = journal
        self._epoch = epoch
        self._workers = workers
        self._look = look
        self._usable = avoid
        self._take = take

    def applied(self, disk: DiskEntry, images: set[str]) -> Header | None:
        """The header of a disk's replica, None when there is none that counts."""
        image, leaves = names(self._journal.prefix, disk.state.key, disk.life)
        if image not in images or leaves not in images:
            return None
        header = read_header(self._backend, leaves)
        return header if header is not None and header.life == disk.life else None

    def advance(self, view: View, head: Manifest) -> None:
        """Bring every replica disk to point `head`. ReplicaDamaged when the journal cannot give it; nothing is recorded
        as applied then."""
        images = {image.name for image in self._backend.images(self._journal.prefix)}
        for disk in head.disks:
            self._advance(view, head, disk, images)

    def _advance(self, view: View, head: Manifest, disk: DiskEntry, images: set[str]) -> None:
        header = usable(view, head, disk.state.key, self.applied(disk, images))
        if header is not None and header.done and header.target != head.cycle:
            # Finish what a long redo began, rather than begin anew; whatever it wrote is on the way to the head.
            goal = view.manifests[header.target][0]
            entry = goal.disk(disk.state.key)
            with unless_damaged():
                if entry is not None:
                    self._redo(view, goal, entry, images, header)
            header = usable(view, head, disk.state.key, self.applied(disk, images))
        if header is None or header.applied != head.cycle or header.target:
            self._redo(view, head, disk, images, header)

    def _redo(
        self, view: View, goal: Manifest, disk: DiskEntry, images: set[str], header: Header | None
    ) -> Header:
        key, size = disk.state.key, disk.state.size
        image, leaves = names(self._journal.prefix, key, disk.life)
        line = self._line(view, goal, key, header)
        fresh = image not in images and leaves not in images
        before = self._backend.ensure_image(image, Kind.DISK, size, self._epoch)
        wanted = table_bytes(size)
        table_before = self._backend.ensure_image(leaves, Kind.TABLE, wanted, self._epoch)
        header = self._begin(
            line, goal, leaves, header, fresh=fresh, empty=lambda: self._empty(image, leaves, before)
        )
        if before != size:
            self._backend.resize_image(image, Kind.DISK, size, self._epoch)
        if table_before != wanted:
            self._backend.resize_image(leaves, Kind.TABLE, wanted, self._epoch)
        only = compose.touched(self._journal, line) if line.present else None
        todo = sorted(range(-(-size // compose.REGION)) if only is None else only)
        todo = [number for number in todo if number >= header.done]
        long = len(todo) > 1 and _journal_bytes(line) > _LONG
        for batch in [[number] for number in todo] if long else [todo]:
            self._regions(line, image, leaves, batch, fresh=fresh)
            self._backend.flush(image, self._epoch)
            self._backend.flush(leaves, self._epoch)
            if long:
                header = self._write_header(leaves, replace(header, done=batch[-1] + 1))
        return self._write_header(
            leaves, replace(header, applied=goal.cycle, size=size, clean=False, target=0, done=0)
        )

    def _begin(
        self,
        line: Line,
        goal: Manifest,
        leaves: str,
        header: Header | None,
        *,
        fresh: bool,
        empty: Callable[[], None],
    ) -> Header:
        """Note durably what the replica will be, before the first write; empty it where it must be."""
        if line.present and header is not None:
            if header.target == goal.cycle:
                return header
            return self._write_header(leaves, replace(header, target=goal.cycle, done=0))
        clean = line.base is None
        known = header is not None and header.applied == 0
        if header is not None and known and header.target == goal.cycle and (header.done or header.clean):
            return header  # nothing but this very point was ever written into an empty replica
        if header is None or not (known and header.clean and clean):
            # Also of an image whose partner is gone: sequences have to go on.
            former = None if fresh else read_header(self._backend, leaves)
            sequence = former.sequence if former is not None else 0
            header = Header(line.life, 0, line.size, sequence, clean and fresh)
            if not fresh:
                header = self._write_header(leaves, header)
                empty()
        return self._write_header(leaves, replace(header, clean=clean, target=goal.cycle, done=0))

    def _regions(self, line: Line, image: str, leaves: str, numbers: list[int], *, fresh: bool) -> None:
        regions = compose.regions(self._journal, line, base_table(self._backend, line), only=numbers)

        def write(offset: int, data: bytes | memoryview) -> None:
            if self._take is not None:
                self._take(len(data))
            self._backend.write(image, offset, data, self._epoch)

        gather = Gather(write)
        lanes.run(
            self._tasks(line.key, leaves, regions, line, fresh=fresh),
            lambda task: self._do(task, image, line, gather),
            workers=self._workers,
            look=self._look,
            name="redo",
        )
        gather.finish(workers=self._workers, look=self._look)

    def _line(self, view: View, head: Manifest, key: str, header: Header | None) -> Line:
        if header is not None and header.applied:
            try:
                line = compose.line(view, head.cycle, key, stop_at=header.applied, stop_size=header.size)
            except FarshoreError as error:
                if error.code is not Code.REPLICA_DAMAGED:
                    raise
            else:
                if line.present:
                    return line
        return compose.line(view, head.cycle, key, usable=self._usable)

    def _empty(self, image: str, leaves: str, size: int) -> None:
        """Back to zeros, durably, but for the header."""
        for run in split(normalise(self._backend.data(image), size, _PAGE), 4 << 20):
            self._look()
            self._backend.clear(image, run.start, run.length, self._epoch)
        body = [
            Extent(max(e.start, HEADER), e.start + e.length - max(e.start, HEADER))
            for e in self._backend.data(leaves)
        ]
        for run in split((e for e in body if e.length > 0), 4 << 20):
            self._backend.clear(leaves, run.start, run.length, self._epoch)
        self._backend.flush(image, self._epoch)
        self._backend.flush(leaves, self._epoch)

    def _tasks(
        self, key: str, leaves: str, regions: Iterator[Region], line: Line, *, fresh: bool
    ) -> Iterator[Fetch | Copy | Extent]:
        for region in regions:
            for _, error in region.holes:
                raise error
            self._write_table(leaves, region, whole=not line.present)
            if not fresh:
                yield from split(region.zeros, 4 << 20)
            yield from stream.fetches(key, region)
            if line.base is not None:
                yield from stream.copies(region)

    def _do(self, task: Fetch | Copy | Extent, image: str, line: Line, write: Sink) -> None:
        if isinstance(task, Extent):
            self._backend.clear(image, task.start, task.length, self._epoch)
        elif isinstance(task, Fetch):
            stream.deliver(self._journal, task, write)
        elif line.base is not None:
            base, snapshot = parse_handle(line.base.snapshot)
            stream.copy_base(
                self._backend,
                self._journal.keys.leaf,
                base,
                snapshot,
                task,
                key=line.key,
                base_size=line.base.size,
                sink=write,
            )

    def _write_table(self, leaves: str, region: Region, *, whole: bool) -> None:
        """Entries of the leaves that are written (`whole`: of all), and no others but their neighbours of a page."""
        offset = region.start // LEAF * table.ENTRY
        end = offset + len(region.table)
        if whole and table.all_zero(region.table):
            return
        runs = [Extent(offset, len(region.table))]
        if not whole:
            runs = [_entries_of(extent) for extent in region.written]
        for run in split(bridge(normalise(runs, end, _PAGE), _GAP), _MOST):
            length = -(-run.length // _PAGE) * _PAGE
            if whole and run.start >= offset and run.length == length:
                data = region.table[run.start - offset : run.start - offset + length]
            else:
                data = bytearray(self._backend.read(leaves, HEADER + run.start, length))
                for part in (
                    [Extent(offset, len(region.table))] if whole else map(_entries_of, region.written)
                ):
                    low, high = max(part.start, run.start), min(part.start + part.length, run.start + length)
                    if low < high:
                        data[low - run.start : high - run.start] = region.table[low - offset : high - offset]
            self._backend.write(leaves, HEADER + run.start, bytes(data), self._epoch)

    def _write_header(self, leaves: str, header: Header) -> Header:
        """Make it durable how far the replica is. What it says must be durable already."""
        header = replace(header, sequence=header.sequence + 1)
        self._backend.write(leaves, header.sequence % 2 * _SLOT, _encode_header(header), self._epoch)
        self._backend.flush(leaves, self._epoch)
        return header

    def reset(self, disk: DiskEntry) -> None:
        """Forget how far a replica is: the next redo empties it and fills it from a base."""
        _, leaves = names(self._journal.prefix, disk.state.key, disk.life)
        former = read_header(self._backend, leaves)
        sequence = former.sequence if former is not None else 0
        self._write_header(leaves, Header(disk.life, 0, disk.state.size, sequence, clean=False))

    def table_is_true(self, disk: DiskEntry) -> bool:
        """Whether the replica's leaf table has the root that the point has to which the replica was brought."""
        _, leaves = names(self._journal.prefix, disk.state.key, disk.life)
        root, count = table.Root(self._journal.keys.leaf, disk.state.size), table.leaf_count(disk.state.size)
        for first in range(0, count, table.PAGE):
            self._look()
            root.update(read_entries(self._backend, leaves, first, min(table.PAGE, count - first)))
        return root.text() == disk.root

    def freeze(self, head: Manifest) -> list[tuple[DiskEntry, str, str]]:
        """Freeze every replica disk and its table as of `head`, to which they must have been brought: (disk, handle of
        the image, handle of the table)."""
        images = {image.name for image in self._backend.images(self._journal.prefix)}
        frozen: list[tuple[DiskEntry, str, str]] = []
        for disk in head.disks:
            header = self.applied(disk, images)
            if header is None or header.applied != head.cycle or header.target:
                raise FarshoreError(
                    Code.TARGET_BUSY, f"The replica of disk {disk.state.key} is not at point {head.cycle}."
                )
            image, leaves = names(self._journal.prefix, disk.state.key, disk.life)
            ice = self._backend.freeze(image, head.cycle, self._epoch, self._epoch)
            cold = self._backend.freeze(leaves, head.cycle, self._epoch, self._epoch)
            frozen.append((disk, handle(image, ice), handle(leaves, cold)))
        return frozen


def _entries_of(extent: Extent) -> Extent:
    """Where the entries of an extent of the disk are in its table."""
    return Extent(extent.start // LEAF * table.ENTRY, -(-extent.length // LEAF) * table.ENTRY)


def _encode_header(header: Header) -> bytes:
    body = json.dumps(
        {
            "life": header.life,
            "applied": header.applied,
            "size": header.size,
            "sequence": header.sequence,
            "clean": header.clean,
            "target": header.target,
            "done": header.done,
        }
    ).encode()
    return (digest(body).encode() + b"\n" + body).ljust(_SLOT, b"\0")


def _parse_header(data: bytes) -> Header | None:
    stated, _, body = data.rstrip(b"\0").partition(b"\n")
    if not body or digest(body).encode() != stated:
        return None
    try:
        raw = cast("dict[str, Any]", json.loads(body))
        return Header(
            str(raw["life"]),
            int(raw["applied"]),
            int(raw["size"]),
            int(raw["sequence"]),
            bool(raw["clean"]),
            int(raw["target"]),
            int(raw["done"]),
        )
    except (ValueError, KeyError, TypeError):
        return None
