"""One cycle: cut, ship what changed into segments, commit, release.

The order is what makes every moment safe to die in:

1. the source is cut, once over all disks;
2. per disk: read what may have changed, hash, drop what the leaf table says is the same, compress, encrypt, pack, store;
   every segment is durable when its storing returns;
3. the manifest is created if absent: only now the point exists;
4. only now the source may forget what changed before the cut: it is released, also after an error; a release that fails is
   reported and costs no point.

The replica disk is not touched: it follows later, by redo (`Writer.advance`).

Which bytes are visited: what the source reports since the newest committed state of the disk; what is known to be damaged
in the store; what dead cycles shipped and this one adopts; in a full comparison all of it; and some that the source reports
as unchanged (`Audit`), to catch a tracker that lies: one difference there, and the whole disk is compared.

Threads: each worker takes a piece of at most 1 MiB through all of it, so memory is bounded by the workers and one open
segment each. Without workers the calling thread does it, one piece after the other, always in the same order.
"""

from __future__ import annotations

import math
import threading
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime

from farshore.domain.errors import Code, FarshoreError
from farshore.domain.points import Consistency, RecoveryPoint
from farshore.replication.extents import bridge, normalise, split, total
from farshore.replication.journal import lanes, segment, table
from farshore.replication.journal.audit import Audit, Audited
from farshore.replication.journal.bandwidth import Bandwidth, Priority
from farshore.replication.journal.entries import DiskEntry, Manifest
from farshore.replication.journal.packer import Packer
from farshore.replication.journal.writer import OpenDisk, Writer
from farshore.replication.ports import (
    LEAF,
    Extent,
    FullCopyNeeded,
    Progress,
    ProgressSink,
    Source,
    SourceCut,
)

_SMALL = 4 << 20  # bytes to visit below which threads cost more than they bring


class Stopped(Exception):
    """The cycle was asked to stop before its commit. The segments it stored are adopted by the next cycle."""


@dataclass(frozen=True, slots=True)
class Pace:
    """How a cycle uses the machine it runs on. Sizes in bytes."""

    workers: int = 4  # threads; 0: the calling thread does it all, in an order that never varies
    piece: int = segment.CHUNK  # the most a worker reads at once; a multiple of 64 KiB, at most 1 MiB
    gap: int = 256 << 10  # bytes that did not change and are read along to save a request
    level: int = 1  # of zstd; 0: no compression
    limit: Bandwidth | None = None  # of bytes stored
    priority: Priority | None = None  # None: by what the cycle is
    audit: int = 0  # bytes a disk and cycle that are read although the source says they did not change
    audit_share: float = 0.0  # the same as a part of the disk; the larger of both counts
    poll: float = 0.25  # seconds between two looks at `should_stop`


@dataclass(frozen=True, slots=True)
class CycleResult:
    """What a cycle did. Bytes; times are aware UTC."""

    point: RecoveryPoint
    manifest: Manifest
    full: bool
    reason: str  # why full, else ""
    bytes_changed: int
    bytes_read: int
    bytes_shipped: int  # before compression
    bytes_cleared: int
    bytes_stored: int
    audited: tuple[Audited, ...] = ()
    release_error: str = ""  # the cut could not be released: the next owner reaps it


@dataclass(slots=True)
class _Counts:
    read: int = 0
    shipped: int = 0
    cleared: int = 0
    stored: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)

    def add(self, read: int, shipped: int, cleared: int) -> None:
        with self.lock:
            self.read += read
            self.shipped += shipped
            self.cleared += cleared


@dataclass(slots=True)
class _Task:
    """What is to be done with one disk."""

    opened: OpenDisk
    visit: list[Extent]
    full: str  # reason, "" for a delta
    changed: int
    audited: Audited | None = None

    @property
    def key(self) -> str:
        return self.opened.state.key


def never() -> bool:
    """The default of `should_stop`."""
    return False


def utc_now() -> datetime:
    """The default clock."""
    return datetime.now(UTC)


def run_cycle(
    source: Source,
    writer: Writer,
    *,
    machine: str,
    want: Consistency,
    cut: SourceCut | None = None,
    final: bool = False,
    resync: bool = False,
    tags: Mapping[str, str] | None = None,
    progress: ProgressSink | None = None,
    should_stop: Callable[[], bool] = never,
    pace: Pace | None = None,
    clock: Callable[[], datetime] = utc_now,
) -> CycleResult:
    """Make one recovery point of all disks of `machine`.

    With `cut` (of this cycle's name, e.g. one of a group's) none is made; it is released as any other, also after errors.
    `resync` compares the whole source with what the store says. Raises Stopped when `should_stop` said so, ReplicaFenced
    when a newer owner exists, whatever the source raises, and what `progress` raises. A `final` point needs a machine that
    was off at the cut, else FenceNotProven: what a running machine writes afterwards would be missing from what is called
    its last state. After any error the writer holds no state of the cycle and may be used again, unless the commit itself
    failed.
    """
    cycle = writer.cycle
    name = cut_name(machine, writer)
    sink = progress or _silent
    ready = cut is not None
    if cut is None:
        sink(Progress("cutting", "", 0, 0, cycle))
        cut = source.cut(name, want=want)
    release_error = ""
    try:
        try:
            if ready and cut.name != name:
                raise FarshoreError(Code.INTERNAL, f"{cut.name} is not the cut of {name}.", subject=machine)
            if final and not cut.powered_off:
                raise FarshoreError(
                    Code.FENCE_NOT_PROVEN,
                    f"{machine} was not off when it was cut for its final point: the point would miss what it writes next.",
                    subject=machine,
                    retryable=False,
                )
            _refuse_lost_disks(machine, cut, writer.head())
            run = _Run(writer, cut, cycle=cycle, sink=sink, should_stop=should_stop, pace=pace or Pace())
            manifest = run.copy(machine, final, resync, dict(tags or {}), clock)
            point = writer.commit(manifest)
        except BaseException:
            writer.forget()
            raise
    finally:
        # Only after the commit: until then the source must be able to answer from the former state. An error of the
        # release must hide neither the point nor the first error.
        try:
            cut.release()
        except FarshoreError as error:
            release_error = error.info.text()
    run.audits.keep(run.audited)
    return CycleResult(
        point=point,
        manifest=manifest,
        full=manifest.full,
        reason=manifest.reason,
        bytes_changed=manifest.bytes_changed,
        bytes_read=run.counts.read,
        bytes_shipped=run.counts.shipped,
        bytes_cleared=run.counts.cleared,
        bytes_stored=run.counts.stored,
        audited=tuple(run.audited),
        release_error=release_error,
    )


def cut_name(machine: str, writer: Writer) -> str:
    """What the cut of the writer's next cycle is called."""
    return f"farshore-{machine}-{writer.epoch}-{writer.cycle}"


def _refuse_lost_disks(machine: str, cut: SourceCut, head: Manifest | None) -> None:
    """A disk that is still there, but can be cut no more, ends protection in words; one that was taken away is no loss."""
    for disk in head.disks if head is not None else ():
        reason = cut.left_out.get(disk.state.key)
        if reason is not None:
            raise FarshoreError(
                Code.SOURCE_NOT_ELIGIBLE,
                f"{disk.state.label or disk.state.key} of {machine} was replicated so far and cannot be any more: {reason}.",
                subject=machine,
                action="Make the disk eligible again, or disable replication of the machine and protect it anew without it.",
                retryable=False,
            )


def _silent(_: Progress) -> None:
    return None


class _Lie(Exception):
    """The source reported a leaf as unchanged that is not what the newest point has."""

    def __init__(self, leaf: int) -> None:
        super().__init__(leaf)
        self.leaf = leaf


class _Run:
    """The copying part of a cycle."""

    def __init__(
        self,
        writer: Writer,
        cut: SourceCut,
        *,
        cycle: int,
        sink: ProgressSink,
        should_stop: Callable[[], bool],
        pace: Pace,
    ) -> None:
        self._writer = writer
        self._cut = cut
        self._cycle = cycle
        self._sink = sink
        self._should_stop = should_stop
        self._pace = pace
        self._halt = threading.Event()
        self._done = 0
        self._total = 0
        self._priority = Priority.DELTA
        self.counts = _Counts()
        self.audits = Audit(writer.backend, writer.log.prefix, writer.clock)
        self.audited: list[Audited] = []

    def copy(
        self, machine: str, final: bool, resync: bool, tags: dict[str, str], clock: Callable[[], datetime]
    ) -> Manifest:
        """Everything up to, and without, the commit."""
        first = self._writer.head() is None
        if resync:
            self._tell("reading the replica back", "")
            self._writer.examine(self._check)
        tasks = [self._plan(state.key, resync) for state in self._cut.disks]
        self._total = sum(total(task.visit) for task in tasks)
        self._priority = self._pace.priority or _priority(final, first, any(task.full for task in tasks))
        disks = [self._copy_disk(task) for task in tasks]
        self._check()
        self._tell("committing", "")
        self._cut.confirm()
        head = self._writer.head()
        reasons = [f"{task.opened.state.label or task.key}: {task.full}" for task in tasks if task.full]
        return Manifest(
            machine=machine,
            cycle=self._cycle,
            epoch=self._writer.epoch,
            parent=self._writer.parent,
            previous=head.cycle if head is not None else 0,
            taken_at=self._cut.taken_at,
            committed_at=clock(),
            consistency=self._cut.consistency,
            final=final,
            full=bool(reasons),
            reason="; ".join(reasons),
            cut=self._cut.name,
            bytes_changed=sum(task.changed for task in tasks),
            bytes_shipped=self.counts.shipped,
            bytes_stored=self.counts.stored,
            disks=tuple(disks),
            tags=tags,
        )

    def _plan(self, key: str, resync: bool) -> _Task:
        self._check()
        state = next(disk for disk in self._cut.disks if disk.key == key)
        self._tell("looking for changes", state.label)
        head = self._writer.head()
        entry = head.disk(key) if head is not None else None
        opened = self._writer.open_disk(state)
        base = opened.base
        full = ""
        if entry is not None and base is None:
            full = opened.reason
        elif base is not None and resync:
            full = "a resync was asked for"
        elif base is not None and base.size != state.size:
            full = f"the disk was resized from {base.size} to {state.size} bytes"
        elif base is not None and base.identity != state.identity:
            full = "the disk was replaced by another one"
        whole = [Extent(0, state.size)]
        changed: list[Extent] = whole
        if base is None or not full:
            try:
                changed = normalise(self._cut.changed(key, base), state.size)
            except FullCopyNeeded as needed:
                full = full or needed.reason
                changed = whole
        visit = normalise([*changed, *opened.forced, *opened.visit], state.size)
        if self._cut.whole:
            visit = bridge(visit, self._pace.gap)
        return _Task(opened, visit, full, total(changed))

    def _copy_disk(self, task: _Task) -> DiskEntry:
        packer = self._packer(task)
        audit = max(self._pace.audit, math.ceil(task.opened.state.size * self._pace.audit_share))
        if audit and self._cut.whole and not task.full and task.opened.base is not None:
            self._audit(task, audit)
        pieces = split(task.visit, self._pace.piece)
        forced = _Forced(task.opened.forced)
        workers = self._pace.workers if total(task.visit) > _SMALL else 0
        lanes.run(
            pieces,
            lambda piece: self._piece(task, piece, packer, forced),
            workers=workers,
            look=lambda: self._look(task),
            poll=self._pace.poll,
            name="copy",
        )
        segments, pages = packer.finish()
        self.counts.stored += packer.stored
        opened = task.opened
        root = opened.table.root()
        opened.table.trim()
        return DiskEntry(opened.state, opened.life, opened.born, root, segments, pages, opened.origins)

    def _packer(self, task: _Task) -> Packer:
        limit = self._pace.limit
        if limit is None:
            return self._writer.packer(task.opened)
        return self._writer.packer(
            task.opened, lambda amount: limit.take(amount, self._priority, self._halt.is_set)
        )

    def _piece(self, task: _Task, piece: Extent, packer: Packer, forced: _Forced) -> None:
        """Read, hash, compare, ship one piece."""
        data = self._read(task.key, piece)
        opened = task.opened
        first, count = piece.start // LEAF, table.leaf_count(piece.length)
        fresh = table.hashes(self._writer.journal.keys.leaf, data)
        stale = opened.table.get(first, count)
        marks = forced.within(first, count)
        shipped = cleared = 0
        if fresh != stale or marks:
            view = memoryview(data)
            for run, zero in _runs(piece, fresh, stale, marks):
                at = run.start - piece.start
                if zero:
                    packer.zeros(run.start, run.length)
                    cleared += run.length
                    continue
                body = view[at : at + run.length]
                kind, packed = segment.squeeze(body, self._pace.level)
                low = at // LEAF * table.ENTRY
                digests = fresh[low : low + table.leaf_count(run.length) * table.ENTRY]
                packer.chunk(run.start, run.length, kind, packed, digests)
                shipped += run.length
            opened.table.put(first, fresh)
        self.counts.add(piece.length, shipped, cleared)

    def _read(self, key: str, piece: Extent) -> bytes:
        data = self._cut.read(key, piece.start, piece.length)
        if len(data) != piece.length:
            raise AssertionError(f"the source returned {len(data)} bytes instead of {piece.length}")
        return data

    def _audit(self, task: _Task, amount: int) -> None:
        """Look at leaves that the source reports as unchanged. A difference makes the whole disk be compared."""
        opened, size = task.opened, task.opened.state.size
        audited, extents = self.audits.next(opened.state, opened.life, task.visit, amount)
        self._tell("auditing the source", opened.state.label)
        leaf_key = self._writer.journal.keys.leaf

        def compare(piece: Extent) -> None:
            first = piece.start // LEAF
            fresh = table.hashes(leaf_key, self._read(task.key, piece))
            for wrong in table.differing(
                first, fresh, opened.table.get(first, table.leaf_count(piece.length))
            ):
                raise _Lie(wrong.start // LEAF)
            self.counts.add(piece.length, 0, 0)

        try:
            workers = self._pace.workers if total(extents) > _SMALL else 0
            lanes.run(
                split(extents, self._pace.piece),
                compare,
                workers=workers,
                look=self._check,
                poll=self._pace.poll,
                name="audit",
            )
        except _Lie as lie:
            task.full = (
                f"the source reported the 64 KiB at {lie.leaf * LEAF} as unchanged, but they are not what the newest "
                "point has: its change tracking lies"
            )
            task.visit, task.changed = [Extent(0, size)], size
            self._total += size
            audited = replace(audited, lies=audited.lies + 1)
        self.audited.append(audited)

    def _look(self, task: _Task) -> None:
        self._check()
        self._done = self.counts.read
        self._tell("comparing all bytes" if task.full else "copying changes", task.opened.state.label)

    def _check(self) -> None:
        if self._should_stop():
            self._halt.set()
            raise Stopped

    def _tell(self, stage: str, disk: str) -> None:
        self._sink(Progress(stage, disk, self._done, self._total, self._cycle))


def _priority(final: bool, first: bool, full: bool) -> Priority:
    if final:
        return Priority.FINAL
    if first:
        return Priority.INITIAL
    return Priority.RESYNC if full else Priority.DELTA


class _Forced:
    """Leaves that are shipped whatever the table says."""

    def __init__(self, extents: Sequence[Extent]) -> None:
        self._spans = [
            (extent.start // LEAF, -(-(extent.start + extent.length) // LEAF)) for extent in extents
        ]
        self._starts = [start for start, _ in self._spans]

    def within(self, first: int, count: int) -> frozenset[int]:
        """Of these leaves, relative to the first."""
        if not self._spans:
            return frozenset()
        found: set[int] = set()
        at = max(0, bisect_right(self._starts, first) - 1)
        for start, end in self._spans[at:]:
            if start >= first + count:
                break
            found.update(range(max(start, first) - first, min(end, first + count) - first))
        return frozenset(found)


def _runs(piece: Extent, fresh: bytes, stale: bytes, forced: frozenset[int]) -> Iterator[tuple[Extent, bool]]:
    """Neighbouring leaves that have to be shipped in the same way: (extent, whether it is zeros)."""
    entry = table.ENTRY
    start, kind = piece.start, None
    for leaf in range(len(fresh) // entry):
        now = fresh[leaf * entry : (leaf + 1) * entry]
        differs = now != stale[leaf * entry : (leaf + 1) * entry] or leaf in forced
        this = (now == table.ZERO) if differs else None
        if this is not kind:
            here = piece.start + leaf * LEAF
            if kind is not None:
                yield Extent(start, here - start), kind
            start, kind = here, this
    if kind is not None:
        yield Extent(start, piece.start + piece.length - start), kind
