"""One cycle: cut, copy what changed, freeze, commit, release.

The order is what makes every moment safe to die in:

1. the source is cut, once over all disks;
2. per disk: windows, data, flush, leaf table (see `replica`);
3. every disk is frozen;
4. the manifest is created: only now the point exists, and only now the source may forget what changed before the cut;
5. the cut is released, also after an error; a release that fails is reported and costs no point.

Which bytes are visited: what the source reports since the newest *committed* state of the disk, and what dead cycles
may have left (`Leftover`). Without a committed state also every leaf that the replica holds and the source did not
mention: a disk that came back must not keep what it had before it left. In a full comparison: all of it. Of the visited
leaves those are shipped whose hash differs from the leaf table, and all in torn areas; zeros become clears.

Threads: a few workers each take a piece of at most 4 MiB through read, hash, compare and write, so memory is bounded by
workers x 4 MiB (and the leaf tables, 256 MiB per TiB). The calling thread reports progress and looks whether to stop.
Without workers (`Pace.workers` 0) it copies as well, one piece after the other: always in the same order.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from datetime import UTC, datetime

from farshore.domain.errors import Code, FarshoreError
from farshore.domain.points import Consistency, RecoveryPoint
from farshore.replication import leaves
from farshore.replication.bandwidth import TokenBucket
from farshore.replication.extents import batches, bridge, normalise, split, total
from farshore.replication.ports import (
    LEAF,
    DiskPoint,
    DiskState,
    Extent,
    FullCopyNeeded,
    Manifest,
    Progress,
    ProgressSink,
    ReplicaDisk,
    ReplicaWriter,
    Source,
    SourceCut,
)


class Stopped(Exception):
    """The cycle was asked to stop before its commit. What was copied so far is not lost: the next cycle skips it."""


@dataclass(frozen=True, slots=True)
class Pace:
    """How a cycle uses the machine it runs on. Sizes in bytes."""

    workers: int = 4  # threads; 0: the calling thread does it all, in an order that never varies
    piece: int = 4 << 20  # the most a worker holds, and the most of one write
    window: int = 256 << 20  # how much may have to be shipped again after a crash
    limit: TokenBucket | None = None  # of bytes shipped
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
    bytes_shipped: int
    bytes_cleared: int
    release_error: str = ""  # the cut could not be released: the next owner reaps it


@dataclass(slots=True)
class _Counts:
    read: int = 0
    shipped: int = 0
    cleared: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)

    def add(self, read: int, shipped: int, cleared: int) -> None:
        with self.lock:
            self.read += read
            self.shipped += shipped
            self.cleared += cleared


@dataclass(frozen=True, slots=True)
class _Task:
    """What is to be done with one disk."""

    state: DiskState
    disk: ReplicaDisk
    visit: list[Extent]
    torn: list[Extent]
    full: str  # reason, "" for a delta
    changed: int


def never() -> bool:
    """The default of `should_stop`."""
    return False


def utc_now() -> datetime:
    """The default clock."""
    return datetime.now(UTC)


def run_cycle(
    source: Source,
    writer: ReplicaWriter,
    *,
    machine: str,
    want: Consistency,
    final: bool = False,
    resync: bool = False,
    tags: Mapping[str, str] | None = None,
    progress: ProgressSink | None = None,
    should_stop: Callable[[], bool] = never,
    pace: Pace | None = None,
    clock: Callable[[], datetime] = utc_now,
) -> CycleResult:
    """Make one recovery point of all disks of `machine`.

    `resync` reads the replica itself back and compares the whole source with it: it heals a damaged replica. Raises
    Stopped when `should_stop` said so, ReplicaFenced when a newer owner exists, whatever the source raises, and what
    `progress` raises. A `final` point needs a machine that was off at the cut, else FenceNotProven: what a running machine
    writes afterwards would be missing from what is called its last state. After any error the writer holds no state of the cycle and may be used again, unless the commit
    itself failed.
    """
    cycle = writer.cycle
    sink = progress or _silent
    sink(Progress("cutting", "", 0, 0, cycle))
    cut = source.cut(f"farshore-{machine}-{writer.epoch}-{cycle}", want=want)
    release_error = ""
    try:
        try:
            if final and not cut.powered_off:
                raise FarshoreError(
                    Code.FENCE_NOT_PROVEN,
                    f"{machine} was not off when it was cut for its final point: the point would miss what it writes next.",
                    subject=machine,
                    retryable=False,
                )
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
    return CycleResult(
        point=point,
        manifest=manifest,
        full=manifest.full,
        reason=manifest.reason,
        bytes_changed=manifest.bytes_changed,
        bytes_read=run.counts.read,
        bytes_shipped=run.counts.shipped,
        bytes_cleared=run.counts.cleared,
        release_error=release_error,
    )


def _silent(_: Progress) -> None:
    return None


class _Run:
    """The copying part of a cycle."""

    def __init__(
        self,
        writer: ReplicaWriter,
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
        self.counts = _Counts()

    def copy(
        self, machine: str, final: bool, resync: bool, tags: dict[str, str], clock: Callable[[], datetime]
    ) -> Manifest:
        """Everything up to, and without, the commit."""
        tasks = [self._plan(state, resync) for state in self._cut.disks]
        self._total = sum(total(task.visit) for task in tasks)
        if self._pace.workers == 0:
            for task in tasks:
                self._copy_disk(None, task)
        else:
            with ThreadPoolExecutor(self._pace.workers, thread_name_prefix=f"copy-{machine}") as pool:
                try:
                    for task in tasks:
                        self._copy_disk(pool, task)
                except BaseException:
                    self._halt.set()
                    raise
        self._check()
        self._tell("freezing", "")
        frozen = [(task, self._writer.freeze(self._cycle, task.state.key)) for task in tasks]
        self._tell("committing", "")
        reasons = [f"{task.state.label or task.state.key}: {task.full}" for task in tasks if task.full]
        return Manifest(
            machine=machine,
            cycle=self._cycle,
            epoch=self._writer.epoch,
            parent=self._writer.parent,
            taken_at=self._cut.taken_at,
            committed_at=clock(),
            consistency=self._cut.consistency,
            final=final,
            full=bool(reasons),
            reason="; ".join(reasons),
            cut=self._cut.name,
            bytes_changed=sum(task.changed for task in tasks),
            bytes_shipped=self.counts.shipped,
            disks=tuple(
                DiskPoint(
                    state=task.state,
                    digest=leaves.root(task.disk.leaves(), task.state.size),
                    snapshot=ice.snapshot,
                    leaves=ice.leaves,
                )
                for task, ice in frozen
            ),
            tags=tags,
        )

    def _plan(self, state: DiskState, resync: bool) -> _Task:
        self._check()
        self._tell("looking for changes", state.label)
        head = self._writer.head()
        base = (
            next((disk.state for disk in head.disks if disk.state.key == state.key), None) if head else None
        )
        disk = self._writer.open_disk(state)
        left = disk.leftover()
        full = ""
        if resync:
            full = "a resync was asked for"
        elif left.strayed:
            full = "the replica is not what its newest point says"
        elif base is not None and base.size != state.size:
            full = f"the disk was resized from {base.size} to {state.size} bytes"
        elif base is not None and base.identity != state.identity:
            full = "the disk was replaced by another one"
        changed: list[Extent] = []
        if not full:
            try:
                changed = normalise(self._cut.changed(state.key, base), state.size)
            except FullCopyNeeded as needed:
                full = needed.reason
        if resync or left.strayed:
            self._tell("reading the replica back", state.label)
            try:
                self._writer.rebuild_leaves(state.key, self._should_stop)
            except InterruptedError as error:
                raise Stopped from error
            left = disk.leftover()
        whole = [Extent(0, state.size)]
        if full:
            visit = changed = whole
        elif base is None:
            visit = normalise(
                [*changed, *left.touched, *leaves.written(disk.leaves(), state.size)], state.size
            )
        else:
            visit = normalise([*changed, *left.touched], state.size)
        return _Task(state, disk, visit, normalise(left.torn, state.size), full, total(changed))

    def _copy_disk(self, pool: ThreadPoolExecutor | None, task: _Task) -> None:
        table = task.disk.leaves()
        torn = _leaf_marks(task.torn, task.state.size)
        groups = list(batches(task.visit, self._pace.window))
        for index, group in enumerate(groups):
            area = bridge(group, 0)
            task.disk.intend(area)
            changed: list[Extent] = []
            pieces = split(area, self._pace.piece)
            if pool is None:
                copied = self._one_by_one(pieces, task, table, torn)
            else:
                copied = self._through(pool, pieces, task, table, torn)
            for extents in copied:
                changed += extents
            task.disk.flush()
            task.disk.put_leaves(leaves.table_ranges(normalise(changed, task.state.size)))
            if index + 1 < len(groups):
                task.disk.settle()

    def _one_by_one(
        self, pieces: Iterator[Extent], task: _Task, table: bytearray, torn: bytearray | None
    ) -> Iterator[list[Extent]]:
        for piece in pieces:
            self._check()
            yield self._piece(task, piece, table, torn)
            self._done += piece.length
            self._tell_copying(task)

    def _through(
        self,
        pool: ThreadPoolExecutor,
        pieces: Iterator[Extent],
        task: _Task,
        table: bytearray,
        torn: bytearray | None,
    ) -> Iterator[list[Extent]]:
        """Run the pieces through the workers, never more than a few ahead."""
        waiting: dict[Future[list[Extent]], int] = {}
        try:
            while True:
                while len(waiting) < self._pace.workers + 1:
                    piece = next(pieces, None)
                    if piece is None:
                        break
                    waiting[pool.submit(self._piece, task, piece, table, torn)] = piece.length
                if not waiting:
                    return
                done, _ = wait(waiting, timeout=self._pace.poll, return_when=FIRST_COMPLETED)
                self._check()
                for future in done:
                    self._done += waiting.pop(future)
                    yield future.result()
                self._tell_copying(task)
        finally:
            for future in waiting:
                future.cancel()

    def _piece(self, task: _Task, piece: Extent, table: bytearray, torn: bytearray | None) -> list[Extent]:
        """Read, hash, compare, write one piece; returns what is different now."""
        if self._halt.is_set():
            return []
        data = self._cut.read(task.state.key, piece.start, piece.length)
        if len(data) != piece.length:
            raise AssertionError(f"the source returned {len(data)} bytes instead of {piece.length}")
        first = piece.start // LEAF
        fresh = leaves.hashes(data)
        stale = bytes(table[first * leaves.ENTRY : first * leaves.ENTRY + len(fresh)])
        if fresh == stale and (torn is None or not any(torn[first : first + len(fresh) // leaves.ENTRY])):
            self.counts.add(piece.length, 0, 0)
            return []
        changed: list[Extent] = []
        shipped = cleared = 0
        for run, zero in _runs(piece, fresh, stale, torn):
            changed.append(run)
            at = run.start - piece.start
            if zero:
                task.disk.clear(run.start, run.length)
                cleared += run.length
            else:
                if self._pace.limit is not None:
                    self._pace.limit.take(run.length)
                task.disk.write(run.start, memoryview(data)[at : at + run.length])
                shipped += run.length
        # In memory only: it is stored after the flush of the window.
        table[first * leaves.ENTRY : first * leaves.ENTRY + len(fresh)] = fresh
        self.counts.add(piece.length, shipped, cleared)
        return changed

    def _check(self) -> None:
        if self._should_stop():
            self._halt.set()
            raise Stopped

    def _tell_copying(self, task: _Task) -> None:
        self._tell("comparing all bytes" if task.full else "copying changes", task.state.label)

    def _tell(self, stage: str, disk: str) -> None:
        self._sink(Progress(stage, disk, self._done, self._total, self._cycle))


def _leaf_marks(extents: Sequence[Extent], size: int) -> bytearray | None:
    if not extents:
        return None
    marks = bytearray(leaves.leaf_count(size))
    for extent in extents:
        first, last = extent.start // LEAF, -(-(extent.start + extent.length) // LEAF)
        marks[first:last] = b"\x01" * (last - first)
    return marks


def _runs(piece: Extent, fresh: bytes, stale: bytes, torn: bytearray | None) -> Iterator[tuple[Extent, bool]]:
    """Neighbouring leaves that have to be changed in the same way: (extent, whether it is zeros)."""
    start, kind = piece.start, None
    end = piece.start + piece.length
    first = piece.start // LEAF
    for index in range(len(fresh) // leaves.ENTRY):
        at = index * leaves.ENTRY
        entry = fresh[at : at + leaves.ENTRY]
        differs = entry != stale[at : at + leaves.ENTRY] or (torn is not None and torn[first + index] != 0)
        now = (entry == leaves.ZERO) if differs else None
        if now is not kind:
            here = piece.start + index * LEAF
            if kind is not None:
                yield Extent(start, here - start), kind
            start, kind = here, now
    if kind is not None:
        yield Extent(start, end - start), kind
