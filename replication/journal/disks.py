"""The disks of a machine as a cycle finds them: leaf tables as of the head, and what dead cycles left.

The leaf table of the head is a cache. It is believed if its root is the one in the manifest. Otherwise it is put together from
the replica's table or from a base, and the journal since; and if none of these can be proved, the disk begins a new life.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from hashlib import sha256
from io import FileIO
from pathlib import Path
from typing import TYPE_CHECKING

from farshore.domain.errors import Code, FarshoreError
from farshore.replication.extents import normalise
from farshore.replication.journal import compose, damage, entries, prune
from farshore.replication.journal.compose import Line
from farshore.replication.journal.damage import Finding, Part
from farshore.replication.journal.entries import DiskEntry, Manifest, SegmentRef
from farshore.replication.journal.log import View
from farshore.replication.journal.mirror import (
    Header,
    Mirror,
    base_table,
    names,
    read_entries,
    unless_damaged,
    usable,
)
from farshore.replication.journal.packer import Packer
from farshore.replication.journal.segment import HEADER as SEGMENT_HEADER
from farshore.replication.journal.segment import Place, index_length
from farshore.replication.journal.table import PAGE, Root, Table, all_zero, leaf_count
from farshore.replication.ports import LEAF, DiskState, Extent

log = logging.getLogger(__name__)

_UNUSED = 30 * 86400.0  # seconds

if TYPE_CHECKING:
    from farshore.replication.journal.writer import Writer


@dataclass(slots=True)
class OpenDisk:
    """A disk as a cycle finds it."""

    state: DiskState
    life: str
    born: int
    table: Table  # as of the head
    base: DiskState | None  # the committed state that the table describes; None: zeros
    forced: list[Extent] = field(default_factory=list[Extent])  # to be shipped whatever the table says
    reason: str = ""  # why its past cannot be relied on
    adopted: list[SegmentRef] = field(default_factory=list[SegmentRef])
    origins: tuple[tuple[int, int], ...] = ()
    visit: list[Extent] = field(default_factory=list[Extent])  # what adopted segments cover
    findings: list[Finding] = field(default_factory=list[Finding])  # that this cycle will heal


class Disks:
    """Of a writer."""

    def __init__(self, writer: Writer) -> None:
        self._writer = writer
        self._tables: dict[str, tuple[str, Table]] = {}  # disk key → life, table
        self._open: dict[str, OpenDisk] = {}
        self._orphans = True  # whether there may be segments of dead cycles to adopt
        self._findings: list[Finding] | None = None  # as of this cycle
        self._locks: dict[Path, int] = {}

    def open(self, state: DiskState) -> OpenDisk:
        """The leaf table of a disk as of the head, and what has to be shipped whatever it says."""
        head = self._writer.head()
        entry = head.disk(state.key) if head is not None else None
        holes: list[Extent] | None = None
        table: Table | None = None
        if head is not None and entry is not None and not self._severed(head, entry):
            table, holes = self._table_at(head, entry)
        if entry is None or table is None or holes is None:
            life = entries.life_of(self._writer.cycle, self._writer.epoch)
            table = self._new_table(state, life)
            reason = "" if entry is None else "its past in the store is damaged"
            opened = OpenDisk(state, life, self._writer.cycle, table, None, reason=reason)
        else:
            opened = OpenDisk(state, entry.life, entry.born, table, entry.state, forced=holes)
        opened.table.begin()
        self._open[state.key] = opened  # before anything is written into the table: `forget` takes it back
        if state.size != opened.table.size:
            opened.table.resize(state.size)
        opened.findings = [
            f
            for f in self._known_damage()
            if f.disk == state.key and not f.healed and f.part in (Part.SEGMENT, Part.REPLICA)
        ]
        for finding in opened.findings:
            opened.forced += finding.areas
        if self._writer.options.adopt and self._orphans:
            self._adopt(opened)
        opened.forced = normalise(opened.forced, state.size)
        return opened

    def _known_damage(self) -> list[Finding]:
        if self._findings is None:
            self._findings = damage.read(self._writer.backend, self._writer.log.prefix)
        return self._findings

    def _severed(self, head: Manifest, entry: DiskEntry) -> bool:
        """Whether an entry of the log is known to be damaged without which the head cannot be had: then the disk begins a
        new life, even if we still have its leaf table."""
        if not any(f.part is Part.ENTRY for f in self._known_damage()):
            return False
        view, key = self._writer.view(), entry.state.key
        header = self._header_of(entry)
        ways = [(header.applied, header.size)] if header is not None and header.applied else []
        for stop_at, stop_size in [*ways, (None, None)]:
            with unless_damaged():
                line = compose.line(
                    view, head.cycle, key, stop_at=stop_at, stop_size=stop_size, usable=self._writer.sound()
                )
                if line.present or stop_at is None:
                    return False
        return True

    def _header_of(self, entry: DiskEntry) -> Header | None:
        images = {one.name for one in self._writer.backend.images(self._writer.log.prefix)}
        return Mirror(self._writer.backend, self._writer.journal, self._writer.epoch).applied(entry, images)

    def _new_table(self, state: DiskState, life: str) -> Table:
        table = self._table_file(state.key, life, state.size)
        table.clear()
        table.accept()
        return table

    def _table_file(self, key: str, life: str, size: int) -> Table:
        known = self._tables.pop(key, None)
        if known is not None:
            known[1].close()
        table = Table(self._writer.journal.keys.leaf, self._cache_file(key, life), size)
        self._tables[key] = (life, table)
        return table

    def _cache_file(self, key: str, life: str) -> FileIO:
        """A file of our own: the lasting one, if no other process has it; otherwise one without a name, which a kill leaves
        nowhere."""
        folder = self._writer.options.cache
        if folder is not None:
            name = sha256(f"{self._writer.log.prefix}{key}|{life}".encode()).hexdigest()[:32] + ".leaves"
            try:
                folder.mkdir(parents=True, exist_ok=True, mode=0o700)
                path = folder / name
                if path in self._locks or self._locked(path):
                    if not path.exists():
                        _tidy(folder)
                    return _opened(path)
                return _nameless(folder)
            except OSError as error:  # read-only, full, somebody else's: only time is lost
                log.warning("leaf tables cannot be kept in %s: %s", folder, error.strerror)
        return _nameless(None)

    def _locked(self, path: Path) -> bool:
        """Take a lasting file for as long as this writer lives; False: somebody else has it."""
        lock = _lock(path)
        if lock is not None:
            self._locks[path] = lock
        return lock is not None

    def _table_at(self, head: Manifest, entry: DiskEntry) -> tuple[Table | None, list[Extent] | None]:
        """The table of a disk at the head, with the areas that nobody knows; None: it cannot be had."""
        key, size = entry.state.key, entry.state.size
        known = self._tables.get(key)
        if known is not None and known[0] == entry.life and known[1].size == size and not known[1].lost:
            return known[1], []
        table = self._table_file(key, entry.life, size)
        if table.root() == entry.root:
            table.accept()
            return table, []
        view = self._writer.view()
        best: list[Extent] | None = None
        for line, entries_of, verified in self._ways(view, head, entry):
            table.clear()
            holes: list[Extent] = []
            try:
                for region in compose.regions(self._writer.journal, line, entries_of):
                    if not all_zero(region.table):
                        table.put(region.start // LEAF, bytes(region.table))
                    holes += [extent for extent, _ in region.holes]
                    for _, error in region.holes:
                        self._writer.note(error)
            except FarshoreError as error:
                if error.code is not Code.REPLICA_DAMAGED:
                    raise
                continue
            if not holes and table.root() == entry.root:
                table.accept()
                return table, []
            if holes and verified():
                best = holes
                break
        if best is not None:
            table.accept()
            return table, best
        return None, None

    def _ways(
        self, view: View, head: Manifest, entry: DiskEntry
    ) -> Iterable[tuple[Line, compose.BaseTable | None, Callable[[], bool]]]:
        """How the table may be had: (line, entries it starts from, whether these can be proved)."""
        key = entry.state.key
        _, leaves = names(self._writer.log.prefix, key, entry.life)
        header = usable(view, head, key, self._header_of(entry))
        if header is not None and header.applied:
            with unless_damaged():
                line = compose.line(view, head.cycle, key, stop_at=header.applied, stop_size=header.size)
                if line.present:
                    origin = view.manifests.get(header.applied)
                    then = origin[0].disk(key) if origin is not None else None

                    def stored(first: int, count: int) -> bytes:
                        return read_entries(self._writer.backend, leaves, first, count)

                    root = then.root if then is not None else ""
                    yield line, stored, lambda: self._root_of(stored, header.size) == root
        with unless_damaged():
            line = compose.line(view, head.cycle, key, usable=self._writer.sound())
            entries_of = base_table(self._writer.backend, line)
            base = line.base
            yield (
                line,
                entries_of,
                lambda: (
                    base is None
                    or (entries_of is not None and self._root_of(entries_of, base.size) == base.root)
                ),
            )

    def _root_of(self, entries_of: compose.BaseTable, size: int) -> str:
        root = Root(self._writer.journal.keys.leaf, size)
        count = leaf_count(size)
        for first in range(0, count, PAGE):
            root.update(entries_of(first, min(PAGE, count - first)))
        return root.text()

    def _adopt(self, opened: OpenDisk) -> None:
        """Use what dead cycles left of this disk: a first copy that died goes on where it was. Their chunks count as if
        they had been shipped first in this cycle; every leaf of them is visited, and shipped again where it differs."""
        view = self._writer.view()
        head = self._writer.head()
        since = head.cycle if head is not None else 0
        now, ended = self._writer.clock(), prune.ends(view)
        # What any entry names, also one that is being removed, goes when that entry goes.
        named = {pair for m, _ in view.manifests.values() for d in m.disks for pair in d.origins}
        named |= {(m.epoch, m.cycle) for m, _ in view.manifests.values()}
        safe = entries.safe_name(opened.state.key)
        origins: set[tuple[int, int]] = set()
        for stored in self._writer.backend.list(f"{self._writer.log.prefix}s/"):
            name = stored.name[len(self._writer.log.prefix) :]
            where = entries.origin(name)
            if (
                where is None
                or where[2] != safe
                or where[1] <= since
                or where[:2] in named
                or where[1] in view.damaged
            ):
                continue
            over = now if where[0] == self._writer.epoch else ended.get(where[0])
            if (
                over is None
                or where[0] > self._writer.epoch
                or now - over >= self._writer.options.grace * prune.ADOPT
            ):
                continue
            ref = self._dead_segment(opened, name)
            if ref is not None:
                opened.adopted.append(ref)
                origins.add(where[:2])
        for ref in opened.adopted:
            for chunk in self._writer.journal.index(opened.state.key, ref).chunks():
                opened.table.put(
                    chunk.offset // LEAF, self._writer.journal.index(opened.state.key, ref).digests(chunk)
                )
                opened.visit.append(Extent(chunk.offset, chunk.length))
        opened.visit = normalise(opened.visit, opened.state.size)
        opened.origins = tuple(sorted(origins))

    def _dead_segment(self, opened: OpenDisk, name: str) -> SegmentRef | None:
        """A reference to a whole segment of a disk of this size; None: it is none."""
        head = self._writer.backend.part(self._writer.log.prefix + name, 0, 64 << 10)
        if head is None or len(head) < SEGMENT_HEADER:
            return None
        try:
            length = index_length(head)
            data = head[:length]
            if length > len(head):
                data = self._writer.backend.part(self._writer.log.prefix + name, 0, length) or b""
            index = self._writer.journal.parse(opened.state.key, SegmentRef(name, 0, 0, 0, length), data)
        except (FarshoreError, ValueError) as error:
            if isinstance(error, FarshoreError) and error.code is not Code.REPLICA_DAMAGED:
                raise
            return None
        chunks = list(index.chunks())
        if index.place.size != opened.state.size or not chunks:
            return None
        stored = index.payload + sum(chunk.stored for chunk in chunks)
        start, end = min(chunk.offset for chunk in chunks), max(chunk.end for chunk in chunks)
        return SegmentRef(name, start, end, stored, length)

    def packer(self, opened: OpenDisk, take: Callable[[int], None] | None = None) -> Packer:
        """Where the chunks of this cycle go."""
        place = Place(
            self._writer.machine, opened.state.key, self._writer.epoch, self._writer.cycle, opened.state.size
        )
        return Packer(
            self._writer.backend,
            self._writer.log.prefix,
            place,
            self._writer.journal.keys,
            random=self._writer.options.random,
            adopted=opened.adopted,
            take=take,
        )

    def forget(self) -> None:
        """A cycle failed: the tables go back to the head."""
        self._orphans = True
        self._findings = None
        for key, opened in self._open.items():
            if opened.base is None or not opened.table.take_back() or opened.table.size != opened.base.size:
                known = self._tables.pop(key, None)
                if known is not None:
                    known[1].close()
        self._open.clear()

    def look_again(self) -> None:
        """There may be new findings."""
        self._findings = None

    def committed(self, manifest: Manifest) -> None:
        """The tables describe this point now."""
        self._orphans = False
        kept = {disk.state.key for disk in manifest.disks}
        for key, (_, table) in list(self._tables.items()):
            if key in kept:
                table.accept()
                table.trim()
            else:
                table.close()
                del self._tables[key]
        # Notes only: a finding that is not marked as healed is healed once more.
        with contextlib.suppress(FarshoreError):
            for opened in self._open.values():
                for finding in opened.findings:
                    damage.healed(self._writer.backend, self._writer.log.prefix, finding, manifest.cycle)
        self._open.clear()
        self._findings = None

    def close(self) -> None:
        """Give back files."""
        for _, table in self._tables.values():
            table.close()
        self._tables.clear()
        self._open.clear()
        for lock in self._locks.values():
            os.close(lock)
        self._locks.clear()


def _opened(path: Path) -> FileIO:
    return FileIO(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600), "r+")


def _nameless(folder: Path | None) -> FileIO:
    return tempfile.TemporaryFile(prefix="farshore-", suffix=".leaves", dir=folder, buffering=0)


def _lock(path: Path) -> int | None:
    """The descriptor that holds the lock of a lasting file, None when somebody else does."""
    lock = os.open(f"{path}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(lock)
        return None
    except BaseException:
        os.close(lock)
        raise
    return lock


def _tidy(folder: Path) -> None:
    """Remove tables that nobody has written to for long: of machines that are gone, or have moved to another worker."""
    for path in folder.glob("*.leaves"):
        with contextlib.suppress(OSError):
            if time.time() - path.stat().st_mtime < _UNUSED:
                continue
            lock = _lock(path)
            if lock is not None:
                # The lock's own file stays: whoever waits for it must not lock a file that has no name any more.
                path.unlink()
                os.close(lock)
