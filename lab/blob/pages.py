"""Bytes of page blobs: slots of 64 KiB in one sparse file per store, versions per chunk, bitmaps of 512-byte pages.

A chunk of the blob has one version per generation that touched it. A snapshot closes a generation: it sees the
newest version not younger than itself. Bytes are never overwritten in place: a write takes a free slot, the
catalogue's transaction makes it current, and only then is the old slot (if no version needs it) free again.
So a write is atomic, a snapshot costs nothing, and a hole stays a hole.

Each version says which pages hold data (`valid`) and which were written in its generation (`written`). The
difference p → t of two generations is, page by page: changed if valid at t and written in (p, t]; cleared if
valid at p and no longer at t.
"""

from __future__ import annotations

import ctypes
import heapq
import os
import sqlite3
import threading
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

PAGE = 512
CHUNK = 64 * 1024
PAGES = CHUNK // PAGE
FULL = (1 << PAGES) - 1
NO_SLOT = -1

_libc = ctypes.CDLL(None, use_errno=True)
_PUNCH_KEEP_SIZE = 0x02 | 0x01


class Version(NamedTuple):
    gen: int
    slot: int
    valid: int
    written: int


class PageRange(NamedTuple):
    """Half-open byte range; `cleared` only in differences."""

    start: int
    end: int
    cleared: bool = False


@dataclass(slots=True)
class Change:
    """What a write does to the chunk table. Nothing of it is visible before `PageStore.apply`."""

    upserts: dict[int, Version] = field(default_factory=dict[int, Version])
    deletes: list[tuple[int, int]] = field(default_factory=list[tuple[int, int]])  # (chunk, gen)
    taken: list[int] = field(default_factory=list[int])  # slots to give back if the change is abandoned
    punch: bool = False

    def persist(self, db: sqlite3.Connection, store: int) -> None:
        """Write the change into an open transaction."""
        if self.deletes:
            db.executemany(
                "DELETE FROM chunks WHERE store=? AND chunk=? AND gen=?",
                [(store, c, g) for c, g in self.deletes],
            )
        if self.upserts:
            db.executemany(
                "INSERT OR REPLACE INTO chunks VALUES(?,?,?,?,?,?)",
                [
                    (
                        store,
                        c,
                        v.gen,
                        v.slot,
                        v.valid.to_bytes(16, "little"),
                        v.written.to_bytes(16, "little"),
                    )
                    for c, v in self.upserts.items()
                ],
            )


class PageStore:
    """The bytes of one base blob and those of its snapshots that share them. Callers hold `lock`."""

    def __init__(self, path: Path, store: int, rows: Iterable[Sequence[object]], *, durable: bool) -> None:
        self.lock = threading.RLock()
        self.store = store
        self._path = path
        self._durable = durable
        fresh = durable and not path.exists()
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        if fresh:
            sync_folder(path.parent)
        self._chunks: dict[int, list[Version]] = {}
        used: set[int] = set()
        for chunk, gen, slot, valid, written in rows:  # ordered by chunk, gen
            assert isinstance(chunk, int)
            assert isinstance(gen, int)
            assert isinstance(slot, int)
            assert isinstance(valid, bytes)
            assert isinstance(written, bytes)
            version = Version(gen, slot, int.from_bytes(valid, "little"), int.from_bytes(written, "little"))
            self._chunks.setdefault(chunk, []).append(version)
            if slot != NO_SLOT:
                used.add(slot)
        self._end = max(used, default=-1) + 1
        self._free = [s for s in range(self._end) if s not in used]  # ascending: already a heap

    def close(self) -> None:
        with self.lock:
            if self._fd >= 0:
                os.close(self._fd)
                self._fd = -1

    def remove(self) -> None:
        """Close and delete the slot file."""
        self.close()
        self._path.unlink(missing_ok=True)

    @property
    def allocated(self) -> int:
        """Bytes the slot file takes on disk, holes not counted."""
        return os.fstat(self._fd).st_blocks * 512

    # --- writing --------------------------------------------------------------------------------------------

    def plan_write(self, gen: int, start: int, data: bytes | bytearray | memoryview) -> Change:
        """Put `data` (page aligned) into fresh slots; the caller persists the change, then `apply`s it."""
        change = Change()
        view = memoryview(data)
        pieces: list[tuple[int, memoryview]] = []
        end = start + len(view)
        for chunk in range(start // CHUNK, (end + CHUNK - 1) // CHUNK):
            base = chunk * CHUNK
            lo, hi = max(start - base, 0), min(end - base, CHUNK)
            mask = _mask(lo // PAGE, hi // PAGE)
            old = self._latest(chunk)
            body = view[base + lo - start : base + hi - start]
            keep = (old.valid & ~mask) if old else 0
            slot = self._take(change)
            if keep and old:
                whole = bytearray(self._pread(CHUNK, old.slot * CHUNK))
                whole[lo:hi] = body
                pieces.append((slot * CHUNK, memoryview(whole)))
            else:
                pieces.append((slot * CHUNK + lo, body))
            before = old.written if old and old.gen == gen else 0
            change.upserts[chunk] = Version(gen, slot, keep | mask, before | mask)
        try:
            self._write(pieces)
        except BaseException:
            self.abandon(change)
            raise
        return change

    def plan_clear(self, gen: int, start: int, end: int) -> Change:
        """Forget the pages of [start, end); costs by what is there, not by the length."""
        change = Change(punch=True)
        for chunk in self._present(start, end):
            old = self._chunks[chunk][-1]
            base = chunk * CHUNK
            mask = _mask(max(start - base, 0) // PAGE, min(end - base, CHUNK) // PAGE)
            if not old.valid & mask:
                continue
            valid = old.valid & ~mask
            alone = all(v.gen == gen for v in self._chunks[chunk])
            if not valid and alone:
                change.deletes.append((chunk, gen))
                continue
            written = (old.written if old.gen == gen else 0) & ~mask
            change.upserts[chunk] = Version(gen, old.slot if valid else NO_SLOT, valid, written)
        return change

    def plan_drop(self, gen: int, heir: int | None) -> Change:
        """A generation's snapshot is gone: `heir`, the next living generation, inherits what it wrote."""
        change = Change(punch=True)
        for chunk, versions in self._chunks.items():
            mine = next((v for v in versions if v.gen == gen), None)
            if mine is None:
                continue
            change.deletes.append((chunk, gen))
            if heir is None:
                continue
            # Not simply the heir's version: another dead generation may lie between (many snapshots deleted at
            # once, or a crash in the middle of it), and then that one inherits.
            theirs = next((v for v in versions if gen < v.gen <= heir), None)
            if theirs is None:
                older = any(v.gen < gen for v in versions)
                if mine.valid or older:
                    change.upserts[chunk] = mine._replace(gen=heir)
            else:
                change.upserts[chunk] = theirs._replace(written=theirs.written | mine.written)
        return change

    def apply(self, change: Change) -> None:
        """Make a persisted change current and free the slots nobody needs any more."""
        loose: set[int] = set()
        for chunk, gen in change.deletes:
            versions = self._chunks[chunk]
            loose.update(v.slot for v in versions if v.gen == gen)
            versions[:] = [v for v in versions if v.gen != gen]
        for chunk, new in change.upserts.items():
            versions = self._chunks.setdefault(chunk, [])
            for i, v in enumerate(versions):
                if v.gen == new.gen:
                    loose.add(v.slot)
                    versions[i] = new
                    break
            else:
                versions.append(new)
                versions.sort(key=_by_gen)
        touched = {c for c, _ in change.deletes} | change.upserts.keys()
        for chunk in touched:
            versions = self._chunks[chunk]
            loose.difference_update(v.slot for v in versions)
            if not versions:
                del self._chunks[chunk]
        loose.discard(NO_SLOT)
        for slot in loose:
            heapq.heappush(self._free, slot)
        if change.punch:
            self._punch(sorted(loose))

    def abandon(self, change: Change) -> None:
        """The transaction failed: the slots taken are free again."""
        for slot in change.taken:
            heapq.heappush(self._free, slot)

    def gens(self) -> set[int]:
        """Generations that have a version of any chunk."""
        return {v.gen for versions in self._chunks.values() for v in versions}

    # --- reading --------------------------------------------------------------------------------------------

    def read(self, gen: int, start: int, length: int) -> bytes:
        """Bytes as generation `gen` sees them; pages without data read as zeros."""
        out = bytearray(length)
        view = memoryview(out)
        end = start + length
        jobs: list[tuple[int, int, int]] = []  # file offset, position in out, length
        for chunk in self._present(start, end):
            version = self._visible(chunk, gen)
            if version is None or not version.valid:
                continue
            base = chunk * CHUNK
            for a, b in _runs(version.valid):
                lo, hi = max(base + a * PAGE, start), min(base + b * PAGE, end)
                if lo >= hi:
                    continue
                where = version.slot * CHUNK + lo - base
                if jobs:
                    off, pos, size = jobs[-1]
                    if off + size == where and pos + size == lo - start:
                        jobs[-1] = (off, pos, size + hi - lo)
                        continue
                jobs.append((where, lo - start, hi - lo))
        for off, pos, size in jobs:
            self._read_into(view[pos : pos + size], off)
        return bytes(out)

    def ranges(self, gen: int, start: int, end: int) -> Iterator[PageRange]:
        """Pages that hold data in [start, end), merged, in order."""
        return _merge(self._ranges(gen, start, end))

    def diff(self, prev: int, gen: int, start: int, end: int) -> Iterator[PageRange]:
        """What changed or was cleared in (prev, gen], merged, in order."""
        return _merge(self._diff(prev, gen, start, end))

    def _ranges(self, gen: int, start: int, end: int) -> Iterator[PageRange]:
        for chunk in self._present(start, end):
            version = self._visible(chunk, gen)
            if version is not None:
                yield from _clip(chunk, version.valid, start, end, cleared=False)

    def _diff(self, prev: int, gen: int, start: int, end: int) -> Iterator[PageRange]:
        for chunk in self._present(start, end):
            written = 0
            for v in self._chunks[chunk]:
                if prev < v.gen <= gen:
                    written |= v.written
            then, now = self._visible(chunk, prev), self._visible(chunk, gen)
            if now is then:
                continue
            before, after = (then.valid if then else 0), (now.valid if now else 0)
            parts = [
                *_clip(chunk, after & written, start, end, cleared=False),
                *_clip(chunk, before & ~after, start, end, cleared=True),
            ]
            yield from sorted(parts)

    # --- inside ---------------------------------------------------------------------------------------------

    def _latest(self, chunk: int) -> Version | None:
        versions = self._chunks.get(chunk)
        return versions[-1] if versions else None

    def _visible(self, chunk: int, gen: int) -> Version | None:
        for version in reversed(self._chunks.get(chunk, ())):
            if version.gen <= gen:
                return version
        return None

    def _present(self, start: int, end: int) -> list[int]:
        """Chunks of [start, end) that have any version, in order."""
        first, last = start // CHUNK, (end + CHUNK - 1) // CHUNK
        if last - first <= len(self._chunks):
            return [c for c in range(first, last) if c in self._chunks]
        return sorted(c for c in self._chunks if first <= c < last)

    def _take(self, change: Change) -> int:
        if self._free:
            slot = heapq.heappop(self._free)
        else:
            slot = self._end
            self._end += 1
        change.taken.append(slot)
        return slot

    def _write(self, pieces: list[tuple[int, memoryview]]) -> None:
        i = 0
        while i < len(pieces):
            offset = pieces[i][0]
            batch = [pieces[i][1]]
            end = offset + len(batch[0])
            i += 1
            while i < len(pieces) and pieces[i][0] == end and len(batch) < 256:
                batch.append(pieces[i][1])
                end += len(pieces[i][1])
                i += 1
            written = os.pwritev(self._fd, batch, offset)
            if written < end - offset:  # a short write: finish the rest piece by piece
                rest = memoryview(b"".join(batch))
                while written < len(rest):
                    written += os.pwrite(self._fd, rest[written:], offset + written)
        if self._durable:
            os.fdatasync(self._fd)

    def _pread(self, length: int, offset: int) -> bytes:
        data = os.pread(self._fd, length, offset)
        return data if len(data) == length else data + bytes(length - len(data))

    def _read_into(self, view: memoryview, offset: int) -> None:
        done = 0
        while done < len(view):
            n = os.preadv(self._fd, [view[done:]], offset + done)
            if n == 0:
                raise OSError(f"slot file {self._path.name} is shorter than its catalogue")
            done += n

    def _punch(self, slots: list[int]) -> None:
        """Give the disk space of freed slots back. Best effort: not every file system can."""
        i = 0
        while i < len(slots):
            j = i + 1
            while j < len(slots) and slots[j] == slots[j - 1] + 1:
                j += 1
            _libc.fallocate(
                self._fd,
                _PUNCH_KEEP_SIZE,
                ctypes.c_long(slots[i] * CHUNK),
                ctypes.c_long((j - i) * CHUNK),
            )
            i = j


def sync_folder(folder: Path) -> None:
    """Make the names of new files last over a power cut."""
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _by_gen(version: Version) -> int:
    return version.gen


def _mask(lo: int, hi: int) -> int:
    return ((1 << (hi - lo)) - 1) << lo


def _runs(bits: int) -> Iterator[tuple[int, int]]:
    """Half-open runs of set bits."""
    position = 0
    while bits:
        skip = (bits & -bits).bit_length() - 1
        bits >>= skip
        position += skip
        length = (~bits & (bits + 1)).bit_length() - 1
        yield position, position + length
        bits >>= length
        position += length


def _clip(chunk: int, bits: int, start: int, end: int, *, cleared: bool) -> Iterator[PageRange]:
    base = chunk * CHUNK
    for a, b in _runs(bits):
        lo, hi = max(base + a * PAGE, start), min(base + b * PAGE, end)
        if lo < hi:
            yield PageRange(lo, hi, cleared)


def _merge(ranges: Iterable[PageRange]) -> Iterator[PageRange]:
    held: PageRange | None = None
    for r in ranges:
        if held is not None and held.end == r.start and held.cleared == r.cleared:
            held = PageRange(held.start, r.end, r.cleared)
            continue
        if held is not None:
            yield held
        held = r
    if held is not None:
        yield held
