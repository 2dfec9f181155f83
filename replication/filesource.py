"""Plain files or images as a source: for tests, and for machines whose disks are files that can be paused.

A cut copies every file (a reflink where there is one) into a work folder while `barrier` is held; without a barrier
the copy is only as consistent as the files are quiet, and the caller vouches for it. Changes are found by hash: each
cut keeps a leaf table, named by its tracker, and two tables are compared. A tracker whose table is gone asks for a
full comparison.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path

from farshore.domain.errors import Code, FarshoreError
from farshore.domain.points import Consistency
from farshore.replication.journal import table
from farshore.replication.journal.entries import safe_name
from farshore.replication.ports import LEAF, DiskState, Extent, FullCopyNeeded

_IO = 4 << 20
_KEY = (
    b"farshore file source leaf hashes"  # no secret: the tables stay beside the files that they are made of
)
_KEPT_TABLES = 4  # generations of leaf tables kept for comparisons


class FileCut:
    """See `SourceCut`."""

    def __init__(
        self, name: str, folder: Path, tables: Path, disks: Sequence[DiskState], taken_at: datetime
    ) -> None:
        self._name = name
        self._folder = folder
        self._tables = tables
        self._disks = tuple(disks)
        self._taken_at = taken_at

    @property
    def name(self) -> str:
        return self._name

    @property
    def taken_at(self) -> datetime:
        return self._taken_at

    @property
    def consistency(self) -> Consistency:
        return Consistency.CRASH

    @property
    def powered_off(self) -> bool:
        """The caller vouches for quiet files, as with `barrier`."""
        return True

    @property
    def disks(self) -> Sequence[DiskState]:
        return self._disks

    @property
    def whole(self) -> bool:
        return True

    @property
    def left_out(self) -> Mapping[str, str]:
        return {}

    def changed(self, disk_key: str, since: DiskState | None) -> Iterator[Extent]:
        state = next(disk for disk in self._disks if disk.key == disk_key)
        now = self._table(disk_key, state.tracker)
        if since is None:
            then = bytes(len(now))  # of a disk of zeros
        elif since.size != state.size or since.identity != state.identity:
            raise FullCopyNeeded("the file was resized or replaced")
        else:
            try:
                then = self._table(disk_key, since.tracker)
            except FileNotFoundError:
                raise FullCopyNeeded("the hashes of the last point are gone") from None
        for at in range(0, len(now), table.ENTRY):
            if now[at : at + table.ENTRY] != then[at : at + table.ENTRY]:
                start = at // table.ENTRY * LEAF
                yield Extent(start, min(LEAF, state.size - start))

    def _table(self, disk_key: str, tracker: str | None) -> bytes:
        return (self._tables / f"{disk_key}.{tracker}").read_bytes()

    def read(self, disk_key: str, offset: int, length: int) -> bytes:
        try:
            with (self._folder / disk_key).open("rb") as file:
                data = os.pread(file.fileno(), length, offset)
        except OSError as error:
            raise FarshoreError(
                Code.SOURCE_READ_FAILED, f"Reading disk {disk_key} failed: {error}."
            ) from error
        if len(data) != length:
            raise FarshoreError(
                Code.SOURCE_READ_FAILED, f"Disk {disk_key} ends before byte {offset + length}."
            )
        return data

    def confirm(self) -> None:
        """Nothing to ask: see `read`."""

    def release(self) -> None:
        shutil.rmtree(self._folder, ignore_errors=True)


class FileSource:
    """See `Source`. `disks` maps a disk's key to its file; the first one is the boot disk."""

    def __init__(
        self,
        disks: Mapping[str, Path],
        work: Path,
        *,
        barrier: Callable[[], contextlib.AbstractContextManager[object]] = contextlib.nullcontext,
    ) -> None:
        self._files = dict(disks)
        self._cuts = work / "cuts"
        self._tables = work / "tables"
        self._barrier = barrier
        for folder in (self._cuts, self._tables):
            folder.mkdir(parents=True, exist_ok=True)

    def cut(self, name: str, *, want: Consistency) -> FileCut:
        folder = self._cuts / safe_name(name)
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        try:
            with self._barrier():
                taken_at = datetime.now(UTC)
                for key, path in self._files.items():
                    _copy(path, folder / key)
        except OSError as error:
            shutil.rmtree(folder, ignore_errors=True)
            raise FarshoreError(Code.SNAPSHOT_FAILED, f"Copying the files failed: {error}.") from error
        states: list[DiskState] = []
        for index, (key, path) in enumerate(self._files.items()):
            tracker = uuid.uuid4().hex
            size = (folder / key).stat().st_size
            (self._tables / f"{key}.{tracker}").write_bytes(_hash_file(folder / key, size))
            self._forget_old(key)
            states.append(DiskState(key, path.name, size, str(path), tracker, boot=index == 0))
        return FileCut(name, folder, self._tables, states, taken_at)

    def _forget_old(self, key: str) -> None:
        tables = sorted(self._tables.glob(f"{key}.*"), key=lambda path: path.stat().st_mtime_ns)
        for path in tables[:-_KEPT_TABLES]:
            path.unlink(missing_ok=True)

    def reap(self, upto: str = "") -> list[str]:
        names = sorted(
            path.name
            for path in self._cuts.iterdir()
            if not upto or _epoch_of(path.name) <= _epoch_of(safe_name(upto))
        )
        for name in names:
            shutil.rmtree(self._cuts / name, ignore_errors=True)
        return names

    def close(self) -> None:
        return None


def _epoch_of(name: str) -> int:
    """The epoch in a cut's name; -1 for names without one: nobody owns them."""
    parts = name.rsplit("-", 2)
    return int(parts[1]) if len(parts) == 3 and parts[1].isdecimal() else -1


def _copy(source: Path, target: Path) -> None:
    with source.open("rb") as reading, target.open("wb") as writing:
        size = os.fstat(reading.fileno()).st_size
        at = 0
        while at < size:
            done = os.copy_file_range(reading.fileno(), writing.fileno(), size - at, at, at)
            if done == 0:
                break
            at += done
        writing.truncate(size)


def _hash_file(path: Path, size: int) -> bytes:
    found = bytearray()
    with path.open("rb") as file:
        for at in range(0, size, _IO):
            found += table.hashes(_KEY, os.pread(file.fileno(), min(_IO, size - at), at))
    return bytes(found)
