"""Scrub: reads everything that points need, a little at a time, and keeps what it finds damaged (`damage`).

The units are, in this order: the entries of the log, every segment of every entry, every base, every replica disk, the last
two in parts of one region. A round can be interrupted anywhere; `<machine>/u/scrub.json` keeps the cursor, when the round
began and when the last one ended, so that coverage and age can be told. What was deleted or came anew meanwhile is left to
the next round. Only the owner of the epoch may scrub replica disks, and only between redos.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace

from farshore.domain.errors import Code, FarshoreError
from farshore.replication.backend import Backend, parse_handle
from farshore.replication.extents import normalise, split
from farshore.replication.journal import compose, damage, segment, stream, table
from farshore.replication.journal.compose import Journal
from farshore.replication.journal.damage import Finding
from farshore.replication.journal.entries import BaseDisk, DiskEntry, Manifest, SegmentRef
from farshore.replication.journal.log import View
from farshore.replication.journal.mirror import HEADER, names, read_entries, read_header
from farshore.replication.journal.prune import Needs
from farshore.replication.journal.segment import ChunkKind
from farshore.replication.ports import LEAF, Extent

_IO = 4 << 20
_PART = 256 << 20  # bytes of an image read as one unit
Unit = tuple[str, Callable[[], int]]
"""Place in the order, and what reads it: returns the bytes read, or raises ReplicaDamaged."""


@dataclass(frozen=True, slots=True)
class Coverage:
    """How far scrub is. Bytes; unix seconds, 0: never."""

    cursor: str = ""
    round_began: float = 0.0
    checked: int = 0  # in this round
    found: int = 0  # in this round
    rounds: int = 0
    last_began: float = 0.0
    last_ended: float = 0.0
    last_checked: int = 0
    last_found: int = 0

    def age(self, now: float) -> float | None:
        """Seconds since the beginning of the last whole round: nothing that was there then was read longer ago. None: there
        was no whole round yet."""
        return now - self.last_began if self.rounds else None


@dataclass(frozen=True, slots=True)
class Scrubbed:
    """What one call did."""

    checked: int
    findings: tuple[Finding, ...]
    complete: bool  # the round ended
    coverage: Coverage


class Scrub:
    """Of one machine."""

    def __init__(
        self,
        backend: Backend,
        journal: Journal,
        clock: Callable[[], float],
        *,
        look: Callable[[], None] = lambda: None,
        take: Callable[[int], None] = lambda _: None,
    ) -> None:
        """`look` is called often and may raise to stop; `take` waits for the right to read so many bytes."""
        self._backend = backend
        self._journal = journal
        self._clock = clock
        self._look = look
        self._take = take

    # rounds -------------------------------------------------------------------------------------------------------

    def coverage(self) -> Coverage:
        """As it was kept."""
        data = self._backend.get(self._name)
        try:
            return Coverage(**json.loads(data)) if data is not None else Coverage()
        except (ValueError, TypeError):
            return Coverage()

    def run(self, view: View, needed: Needs, *, replicas: bool, budget: int | None = None) -> Scrubbed:
        """Go on where the last call ended, until the round is over or `budget` bytes were read. What is not `needed` is left
        out: a sweep that died in between has deleted a part of it."""
        now = self._clock()
        state = self.coverage()
        if not state.cursor:
            state = replace(state, round_began=now, checked=0, found=0)
        findings: list[Finding] = []
        checked, before = 0, state.found
        try:
            for place, check in self._units(view, needed, replicas=replicas, after=state.cursor):
                self._look()
                try:
                    read = check()
                except FarshoreError as error:
                    finding = damage.of_error(error, self._clock())
                    if finding is None:
                        raise
                    damage.note(self._backend, self._journal.prefix, finding)
                    findings.append(finding)
                    read = 0
                checked += read
                state = replace(
                    state,
                    cursor=place,
                    checked=state.checked + read,
                    found=before + len(findings),
                )
                if budget is not None and checked >= budget:
                    return Scrubbed(checked, tuple(findings), False, state)
            state = Coverage(
                rounds=state.rounds + 1,
                last_began=state.round_began,
                last_ended=self._clock(),
                last_checked=state.checked,
                last_found=state.found,
            )
            return Scrubbed(checked, tuple(findings), True, state)
        finally:
            self._backend.put(self._name, json.dumps(asdict(state)).encode())

    @property
    def _name(self) -> str:
        return f"{self._journal.prefix}u/scrub.json"

    def _units(self, view: View, needed: Needs, *, replicas: bool, after: str) -> Iterator[Unit]:
        for number in sorted(view.damaged):
            place = f"0/{number:010d}"
            if place > after:
                yield place, lambda number=number: self._entry(number)
        for cycle, (manifest, _) in view.manifests.items():
            if cycle in needed.cycles and f"1/{cycle:010d}/~" > after:
                yield from self._journal_units(manifest, after)
        for base in view.bases:
            for disk in base.disks if base.number in needed.bases else ():
                yield from self._image_units(f"2/{base.number:010d}/{disk.key}", disk, after)
        head = view.head
        for disk in head.disks if head is not None and replicas else ():
            found = self._replica(view, disk)
            if found is not None:
                yield from self._image_units(f"3/{disk.state.key}", found, after)

    def _entry(self, number: int) -> int:
        raise FarshoreError(
            Code.REPLICA_DAMAGED,
            f"Entry {number} of the log of {self._journal.machine} is damaged.",
            subject=self._journal.machine,
            details={"entry": number, "disk": ""},
        )

    # the journal --------------------------------------------------------------------------------------------------

    def _journal_units(self, manifest: Manifest, after: str) -> Iterator[Unit]:
        for disk in manifest.disks:
            try:
                for number, ref in enumerate(self._journal.refs(disk)):
                    place = f"1/{manifest.cycle:010d}/{disk.state.key}/{number:08d}"
                    if place > after:
                        yield place, lambda key=disk.state.key, ref=ref: self.segment(key, ref)
            except FarshoreError as error:
                if error.code is not Code.REPLICA_DAMAGED:
                    raise
                yield f"1/{manifest.cycle:010d}/{disk.state.key}/~", lambda error=error: _again(error)

    def segment(self, key: str, ref: SegmentRef) -> int:
        """Read and verify a whole segment."""
        self._take(ref.length)
        data = self._backend.part(self._journal.prefix + ref.name, 0, ref.length)
        index = self._journal.parse(key, ref, data[: ref.index] if data is not None else None)
        bad: list[Extent] = []
        for chunk in index.chunks():
            if chunk.kind is ChunkKind.ZERO or data is None:
                continue
            at = index.payload + chunk.position
            try:
                segment.open_chunk(
                    self._journal.keys, index, chunk, data[at : at + chunk.stored], name=ref.name
                )
            except FarshoreError as error:
                if error.code is not Code.REPLICA_DAMAGED:
                    raise
                bad.append(Extent(chunk.offset, chunk.length))
        if bad:
            first = bad[0]
            error = segment.damaged(ref.name, key, first.start, first.length)
            details = {"segment": ref.name, "disk": key, "areas": [[e.start, e.length] for e in bad]}
            raise FarshoreError(error.code, error.info.message, subject=ref.name, details=details)
        return ref.length

    # images -------------------------------------------------------------------------------------------------------

    def _replica(self, view: View, disk: DiskEntry) -> BaseDisk | None:
        """A replica disk seen as a base; None: there is none whose state is known."""
        image, leaves = names(self._journal.prefix, disk.state.key, disk.life)
        there = {one.name for one in self._backend.images(self._journal.prefix)}
        header = read_header(self._backend, leaves) if {image, leaves} <= there else None
        pair = view.manifests.get(header.applied) if header is not None else None
        then = pair[0].disk(disk.state.key) if pair is not None else None
        if header is None or header.life != disk.life or not header.applied:
            return None
        root = then.root if then is not None else ""  # its entry may be gone: then only leaves are compared
        return BaseDisk(disk.state.key, disk.life, header.size, root, image + "@", leaves + "@")

    def _image_units(self, place: str, disk: BaseDisk, after: str) -> Iterator[Unit]:
        if f"{place}/ table" > after:
            yield f"{place}/ table", lambda: self._table(disk)
        for number in range(-(-disk.size // _PART)):
            where = f"{place}/{number:08d}"
            if where > after:
                yield where, lambda number=number: self.part(disk, number)

    def _table(self, disk: BaseDisk) -> int:
        """The root of a leaf table."""
        image, snapshot = _parse(disk.table)
        count = table.leaf_count(disk.size)
        root = table.Root(self._journal.keys.leaf, disk.size)
        for first in range(0, count, table.PAGE):
            self._look()
            part = min(table.PAGE, count - first)
            self._take(part * table.ENTRY)
            with stream.blaming(image, snapshot, disk.key):
                root.update(read_entries(self._backend, image, first, part, snapshot))
        if disk.root and root.text() != disk.root:
            raise self._bad(disk, disk.table, [], "its leaf table is not what was committed")
        return HEADER + count * table.ENTRY

    def part(self, disk: BaseDisk, number: int) -> int:
        """One part of an image against its leaf table."""
        image, snapshot = _parse(disk.snapshot)
        with stream.blaming(image, snapshot, disk.key):
            return self._part(disk, number)

    def _part(self, disk: BaseDisk, number: int) -> int:
        image, snapshot = _parse(disk.snapshot)
        leaves, frozen = _parse(disk.table)
        start, end = number * _PART, min(disk.size, (number + 1) * _PART)
        first, count = start // LEAF, table.leaf_count(end) - start // LEAF
        wanted = bytearray(read_entries(self._backend, leaves, first, count, frozen))
        found = bytearray(len(wanted))
        read = 0
        extents = [
            Extent(max(e.start, start), min(e.start + e.length, end) - max(e.start, start))
            for e in self._backend.data(image, snapshot)
            if e.start < end and e.start + e.length > start
        ]
        for piece in split(normalise(extents, end), _IO):
            self._look()
            self._take(piece.length)
            data = self._backend.read(image, piece.start, piece.length, snapshot)
            entries = table.hashes(self._journal.keys.leaf, data)
            at = (piece.start - start) // LEAF * table.ENTRY
            found[at : at + len(entries)] = entries
            read += piece.length
        wrong = [
            Extent(e.start, min(e.length, end - e.start))
            for e in table.differing(first, bytes(found), bytes(wanted))
        ]
        if wrong:
            text = f"{wrong[0].length} bytes at {wrong[0].start} are not what was committed"
            raise self._bad(disk, disk.snapshot, wrong, text)
        return read

    def _bad(self, disk: BaseDisk, subject: str, areas: list[Extent], what: str) -> FarshoreError:
        image, snapshot = _parse(subject)
        details: dict[str, object] = {
            "image": image,
            "disk": disk.key,
            "areas": [[e.start, e.length] for e in areas],
        }
        if snapshot:
            details["snapshot"] = snapshot
        return FarshoreError(
            Code.REPLICA_DAMAGED,
            f"{subject} of disk {disk.key} is damaged: {what}.",
            subject=image,
            details=details,
        )

    # before a resync ----------------------------------------------------------------------------------------------

    def examine(self, view: View) -> list[Finding]:
        """Everything that the newest point needs: its journal since the base or since what the replica has applied, and the
        replica. What is found is kept, so that a cycle ships it again."""
        head = view.head
        found: list[Finding] = []
        for disk in head.disks if head is not None else ():
            checks: list[Callable[[], int]] = []
            replica = self._replica(view, disk)
            if replica is not None:
                count = -(-replica.size // _PART)
                checks += [lambda n=n, r=replica: self.part(r, n) for n in range(count)]
            steps = self._steps(view, disk)
            for step in steps:
                entry = step.disk(disk.state.key)
                for ref in self._journal.refs(entry) if entry is not None else ():
                    checks.append(lambda k=disk.state.key, r=ref: self.segment(k, r))
            for check in checks:
                self._look()
                try:
                    check()
                except FarshoreError as error:
                    finding = damage.of_error(error, self._clock())
                    if finding is None:
                        raise
                    damage.note(self._backend, self._journal.prefix, finding)
                    found.append(finding)
        return found

    def _steps(self, view: View, disk: DiskEntry) -> tuple[Manifest, ...]:
        head = view.head
        try:
            return compose.line(view, head.cycle, disk.state.key).steps if head is not None else ()
        except FarshoreError as error:
            if error.code is not Code.REPLICA_DAMAGED:
                raise
            return ()  # the disk will begin a new life


def _again(error: FarshoreError) -> int:
    raise error


def _parse(text: str) -> tuple[str, str]:
    """As `parse_handle`; nothing behind the @ means the live image."""
    return (text[:-1], "") if text.endswith("@") else parse_handle(text)
