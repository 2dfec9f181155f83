"""The bytes of a disk of a point: read at random, or written out as a whole.

Nothing leaves here unverified: chunks of the journal by their tags and leaf digests, leaves of a base by the leaf table
frozen with it, and the whole by its root, which the manifest has: an old, foreign or altered table cannot stand in.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence

from farshore.domain.errors import Code, FarshoreError
from farshore.replication.backend import Backend, parse_handle
from farshore.replication.extents import normalise, split
from farshore.replication.journal import compose, lanes, stream, table
from farshore.replication.journal.compose import Journal, Region
from farshore.replication.journal.damage import Finding, Part
from farshore.replication.journal.entries import Base, Manifest
from farshore.replication.journal.log import View
from farshore.replication.journal.mirror import base_table
from farshore.replication.journal.stream import Copy, Fetch, Sink
from farshore.replication.ports import LEAF, Extent

_REGIONS = 2  # composed regions kept for random reads


class PointReader:
    """See `replication.ports.PointReader`, and `write_out`."""

    def __init__(
        self,
        backend: Backend,
        journal: Journal,
        view: View,
        manifest: Manifest,
        key: str,
        usable: Callable[[Base], bool],
        *,
        workers: int = 0,
    ) -> None:
        entry = manifest.disk(key)
        if entry is None:
            raise ValueError(f"the point has no disk {key}")
        self._backend = backend
        self._journal = journal
        self._entry = entry
        self._workers = workers
        self.line = compose.line(view, manifest.cycle, key, usable=usable)
        self._base_table = base_table(backend, self.line)
        self._lock = threading.Lock()
        self._regions: dict[int, Region] = {}

    @property
    def size(self) -> int:
        """Bytes of the disk."""
        return self._entry.state.size

    @property
    def root(self) -> str:
        """What the manifest says that the leaf table's root is."""
        return self._entry.root

    @property
    def base(self) -> tuple[str, str] | None:
        """Image and id of the frozen state that the point starts from; None: zeros."""
        return parse_handle(self.line.base.snapshot) if self.line.base is not None else None

    @property
    def frozen(self) -> str:
        """Handle of a frozen state of the disk's very size onto which the journal can be written; "": there is none."""
        base = self.line.base
        return base.snapshot if base is not None and base.size == self.size else ""

    @property
    def is_frozen(self) -> bool:
        """Whether the point is that frozen state."""
        return bool(self.frozen) and not self.line.steps

    def _region(self, number: int) -> Region:
        with self._lock:
            known = self._regions.get(number)
            if known is None:
                known = next(compose.regions(self._journal, self.line, self._base_table, only=[number]))
                while len(self._regions) >= _REGIONS:
                    del self._regions[next(iter(self._regions))]
                self._regions[number] = known
            return known

    def data(self) -> Sequence[Extent]:
        """Extents that are not zeros, ordered."""
        found: list[Extent] = []
        for region in compose.regions(self._journal, self.line, self._base_table):
            zeros = bytes(len(region.table))
            first = region.start // LEAF
            found += table.differing(first, bytes(region.table), zeros)
            found += [extent for extent, _ in region.holes]
        return normalise(found, self.size)

    def read(self, offset: int, length: int) -> bytes:
        """Exactly these bytes. ReplicaDamaged."""
        if offset < 0 or offset + length > self.size:
            raise ValueError("beyond the end of the disk")
        result = bytearray(length)

        def sink(at: int, data: bytes | memoryview) -> None:
            low, high = max(at, offset), min(at + len(data), offset + length)
            if low < high:
                result[low - offset : high - offset] = memoryview(data)[low - at : high - at]

        for number in range(offset // compose.REGION, -(-(offset + length) // compose.REGION)):
            region = _clipped(self._region(number), offset, offset + length)
            for task in self._tasks(region):
                self._do(task, sink)
        return bytes(result)

    def leaves(self) -> bytes:
        """The leaf table of the disk (256 MiB a TiB)."""
        return b"".join(
            bytes(region.table) for region in compose.regions(self._journal, self.line, self._base_table)
        )

    def _tasks(self, region: Region) -> Iterator[Fetch | Copy]:
        for _, error in region.holes:
            raise error
        yield from stream.fetches(self.line.key, region)
        if self.line.base is not None:
            yield from stream.copies(region)

    def _do(self, task: Fetch | Copy, sink: Sink) -> None:
        if isinstance(task, Fetch):
            stream.deliver(self._journal, task, sink)
            return
        base = self.line.base
        if base is None:
            raise AssertionError("without a base nothing is copied from it")
        image, snapshot = parse_handle(base.snapshot)
        stream.copy_base(
            self._backend,
            self._journal.keys.leaf,
            image,
            snapshot,
            task,
            key=self.line.key,
            base_size=base.size,
            sink=sink,
        )

    def write_out(
        self,
        sink: Sink,
        *,
        clear: Callable[[int, int], None] | None = None,
        on_base: bool = False,
        look: Callable[[], None] = lambda: None,
        workers: int | None = None,
    ) -> None:
        """Hand every byte that is not zero to `sink`, from several threads, each once, in no order. The target holds zeros.

        With `on_base` the target holds a copy of the point's base instead (and is as large as the disk): only what the
        journal changed is written, and what became zeros goes to `clear`. The copy itself is the caller's to trust: its
        bytes are not read here.

        ReplicaDamaged before anything wrong is handed on, or at the end when the whole does not have the committed root: what
        was written may be used only if this returns.
        """
        root = table.Root(self._journal.keys.leaf, self.size)

        def tasks() -> Iterator[Fetch | Copy | Extent]:
            for region in compose.regions(self._journal, self.line, self._base_table):
                root.update(region.table)
                if not on_base:
                    yield from self._tasks(region)
                    continue
                for _, error in region.holes:
                    raise error
                yield from stream.fetches(self.line.key, region)
                yield from split(region.zeros, 4 << 20)

        def do(task: Fetch | Copy | Extent) -> None:
            if not isinstance(task, Extent):
                self._do(task, sink)
            elif clear is not None:
                clear(task.start, task.length)

        if on_base and clear is None:
            raise ValueError("a target that holds a base needs a way to clear")
        lanes.run(
            tasks(), do, workers=self._workers if workers is None else workers, look=look, name="restore"
        )
        if root.text() != self._entry.root:
            raise FarshoreError(
                Code.REPLICA_DAMAGED,
                f"Disk {self.line.key} of point {self._entry.state.key} does not have the committed root: a leaf table or "
                "entry of the log was exchanged.",
                subject=self._journal.machine,
                details=self._base_details(),
            )

    def _base_details(self) -> dict[str, object]:
        base = self.line.base
        if base is None:
            return {"disk": self.line.key}
        image, snapshot = parse_handle(base.table)
        return {"disk": self.line.key, "image": image, "snapshot": snapshot, "areas": []}

    def hurt_by(self, findings: Sequence[Finding]) -> str:
        """Which of these findings makes the disk unreadable; "": none."""
        by_segment = {f.subject: f for f in findings if f.part is Part.SEGMENT}
        for region in compose.regions(self._journal, self.line, self._base_table):
            for _, error in region.holes:
                return error.info.message
            for group in region.groups if by_segment else ():
                finding = by_segment.get(group.ref.name)
                if finding is None:
                    continue
                for piece in group.pieces:
                    if any(_meet(run, area) for run in piece.runs for area in finding.areas):
                        return finding.text
        return ""


def _meet(one: Extent, other: Extent) -> bool:
    return one.start < other.start + other.length and other.start < one.start + one.length


def _clipped(region: Region, start: int, end: int) -> Region:
    """Only what is needed for [start, end), widened to leaves."""
    low, high = start // LEAF * LEAF, -(-end // LEAF) * LEAF

    def clip(runs: Sequence[Extent]) -> list[Extent]:
        found: list[Extent] = []
        for run in runs:
            begin, stop = max(run.start, low), min(run.start + run.length, high)
            if begin < stop:
                found.append(Extent(begin, stop - begin))
        return found

    groups: list[compose.Group] = []
    for group in region.groups:
        pieces = [compose.Piece(p.chunk, runs) for p in group.pieces if (runs := clip(p.runs))]
        if pieces:
            groups.append(compose.Group(group.ref, group.index, pieces))
    holes = [(extent, error) for extent, error in region.holes if _meet(extent, Extent(low, high - low))]
    return compose.Region(
        region.start, region.end, region.table, kept=clip(region.kept), groups=groups, holes=holes
    )
