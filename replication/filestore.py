"""A replica store in a folder: a secondary site, and the store of tests.

Images are sparse files of exactly the disk's size; a frozen state is a reflink where the file system has them (XFS,
Btrfs), else a sparse copy. Everything that `backend` promises as durable is synced: file, then every folder whose
entry is new. Creation-if-absent is `link()` of a complete, synced temporary file. The fence of an image is a small
file beside it; a change holds a shared lock on it while it compares and writes, raising it takes the lock
exclusively, so that comparison and change are one step for all processes of this host. A folder that several hosts
mount would need a lock server: not supported.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from pathlib import Path

from farshore.domain.errors import Code, FarshoreError
from farshore.replication.backend import Image, Kind, Snapshot, Stored, fenced
from farshore.replication.journal.keys import Kek
from farshore.replication.journal.store import JournalStore
from farshore.replication.journal.writer import Options
from farshore.replication.ports import Extent

_FICLONE = 0x40049409
_FROZEN = re.compile(r"^(?P<image>.+)@(?P<id>(?P<cycle>\d+)-(?P<epoch>\d+)(-\d+)?)$")


_doubtful: set[Path] = set()
"""What this process created and could neither make durable nor take back. Of the process: a leg that begins anew with a store
of its own must not take it for durable either."""


class FileBackend:
    """See `Backend`. `durable=False` leaves out the syncs: for tests that do not cut the power."""

    def __init__(self, root: Path, *, durable: bool = True) -> None:
        self._root = root
        self._durable = durable
        self._made = 0
        with _errors(str(root)):
            root.mkdir(parents=True, exist_ok=True)

    # small objects ------------------------------------------------------------------------------------------------

    def create(self, name: str, data: bytes) -> bool:
        path = self._root / name
        with _errors(name):
            temporary = self._write_temporary(path, data)
            try:
                os.link(temporary, path)
            except FileExistsError:
                return False
            finally:
                temporary.unlink()
            try:
                self._sync_folder(path.parent)
            except OSError:
                # It can be read now, and may be gone after a reboot; asking for another sync proves nothing.
                _doubtful.add(path.absolute())
                with contextlib.suppress(OSError):
                    path.unlink()
                    _doubtful.discard(path.absolute())
                raise
        return True

    def put(self, name: str, data: bytes) -> None:
        path = self._root / name
        with _errors(name):
            self._write_temporary(path, data).replace(path)
            self._sync_folder(path.parent)

    def get(self, name: str) -> bytes | None:
        with _errors(name):
            self._refuse_doubt(name)
            try:
                return (self._root / name).read_bytes()
            except FileNotFoundError:
                return None

    def part(self, name: str, offset: int, length: int) -> bytes | None:
        with _errors(name):
            try:
                with _opened(self._root / name, os.O_RDONLY) as file:
                    return os.pread(file, length, offset)
            except FileNotFoundError:
                return None

    def list(self, prefix: str) -> list[Stored]:
        with _errors(prefix):
            found: list[Stored] = []
            for path, name in self._walk(prefix):
                if "/d/" in name:
                    continue
                with contextlib.suppress(FileNotFoundError):
                    stat = path.stat()
                    found.append(Stored(name, f"{stat.st_ino}-{stat.st_mtime_ns}-{stat.st_size}"))
            return sorted(found, key=lambda stored: stored.name)

    def delete(self, name: str) -> None:
        with _errors(name):
            (self._root / name).unlink(missing_ok=True)
            if (self._root / name).parent.is_dir():
                self._sync_folder((self._root / name).parent)

    # images -------------------------------------------------------------------------------------------------------

    def images(self, prefix: str) -> list[Image]:
        with _errors(prefix):
            bases: list[str] = []
            frozen: dict[str, list[Snapshot]] = {}
            for _, name in self._walk(prefix + "d/"):
                if name.endswith(".fence"):
                    continue
                match = _FROZEN.match(name)
                if match is None:
                    bases.append(name)
                else:
                    snapshot = Snapshot(match["id"], epoch=int(match["epoch"]), cycle=int(match["cycle"]))
                    frozen.setdefault(match["image"], []).append(snapshot)
            return [
                Image(name, _read_fence(self._root / f"{name}.fence"), tuple(frozen.get(name, ())))
                for name in sorted({*bases, *frozen})
            ]

    def ensure_image(self, name: str, kind: Kind, size: int, fence: int) -> int:
        path = self._root / name
        with _errors(name):
            self._make_folder(path.parent)
            self.raise_fence(name, fence)
            with self._guard(name, fence), _opened(path, os.O_RDWR | os.O_CREAT) as file:
                # A base that was never given a size is one whose maker died in between.
                if os.fstat(file).st_size == 0:
                    os.ftruncate(file, size)
                self._sync(file)
                present = os.fstat(file).st_size
            self._sync_folder(path.parent)
        return present

    def resize_image(self, name: str, kind: Kind, size: int, fence: int) -> None:
        with _errors(name), self._guard(name, fence), _opened(self._root / name, os.O_RDWR) as file:
            os.ftruncate(file, size)
            self._sync(file)

    def raise_fence(self, name: str, fence: int) -> None:
        path = self._root / f"{name}.fence"
        with _errors(name):
            self._make_folder(path.parent)
            with _opened(path, os.O_RDWR | os.O_CREAT) as file:
                fcntl.flock(file, fcntl.LOCK_EX)
                if fence > _parse_fence(os.pread(file, 32, 0)):
                    os.pwrite(file, f"{fence:020d}".encode(), 0)
                    self._sync(file)
            self._sync_folder(path.parent)

    def write(self, name: str, offset: int, data: bytes | memoryview, fence: int) -> None:
        with _errors(name), self._guard(name, fence), _opened(self._root / name, os.O_RDWR) as file:
            if offset + len(data) > os.fstat(file).st_size:
                raise FarshoreError(
                    Code.TARGET_REJECTED, f"A write goes beyond the end of {name}.", subject=name
                )
            view = memoryview(data)
            while view:
                done = os.pwrite(file, view, offset)
                view, offset = view[done:], offset + done

    def clear(self, name: str, offset: int, length: int, fence: int) -> None:
        while length:
            part = min(length, 1 << 20)
            self.write(name, offset, bytes(part), fence)
            offset, length = offset + part, length - part

    def read(self, name: str, offset: int, length: int, snapshot: str = "") -> bytes:
        with _errors(name), _opened(self._path(name, snapshot), os.O_RDONLY) as file:
            parts: list[bytes] = []
            while length:
                part = os.pread(file, length, offset)
                if not part:
                    raise FarshoreError(
                        Code.REPLICA_DAMAGED,
                        f"{name}@{snapshot} ends before byte {offset + length}.",
                        subject=name,
                    )
                parts.append(part)
                offset, length = offset + len(part), length - len(part)
            return parts[0] if len(parts) == 1 else b"".join(parts)

    def data(self, name: str, snapshot: str = "") -> Sequence[Extent]:
        with _errors(name), _opened(self._path(name, snapshot), os.O_RDONLY) as file:
            return list(_data(file))

    def flush(self, name: str, fence: int) -> None:
        with _errors(name), self._guard(name, fence), _opened(self._root / name, os.O_RDWR) as file:
            self._sync(file)

    def freeze(self, name: str, cycle: int, epoch: int, fence: int) -> str:
        with _errors(name):
            identity = f"{cycle:010d}-{epoch}"
            serial = 0
            while self._path(name, identity).exists():
                serial += 1
                identity = f"{cycle:010d}-{epoch}-{serial}"
            path = self._path(name, identity)
            temporary = path.with_name(f".{path.name}.{os.getpid()}")
            with (
                self._guard(name, fence),
                _opened(self._root / name, os.O_RDONLY) as source,
                _opened(temporary, os.O_RDWR | os.O_CREAT | os.O_TRUNC) as target,
            ):
                _copy(source, target)
                self._sync(target)
            temporary.replace(path)
            self._sync_folder(path.parent)
            return identity

    def drop(self, name: str, snapshot: str) -> None:
        with _errors(name):
            self._path(name, snapshot).unlink(missing_ok=True)

    def delete_image(self, name: str, fence: int) -> None:
        path = self._root / name
        with _errors(name):
            if not path.parent.is_dir():
                return
            try:
                with self._guard(name, fence):
                    for other in list(path.parent.iterdir()):
                        if other.name == path.name or other.name.lstrip(".").startswith(path.name + "@"):
                            other.unlink(missing_ok=True)
            except FarshoreError as error:
                if error.code is not Code.REPLICA_FENCED:
                    raise
                return
            path.with_name(path.name + ".fence").unlink(missing_ok=True)

    def close(self) -> None:
        return None

    # ours ---------------------------------------------------------------------------------------------------------

    def _refuse_doubt(self, name: str) -> None:
        if (self._root / name).absolute() in _doubtful:
            raise FarshoreError(
                Code.TARGET_UNREACHABLE,
                f"{name} was written, but its folder could not be synced: nobody knows whether it is there after a reboot.",
                subject=name,
                action="Look for errors of the file system that holds the store.",
            )

    def _path(self, name: str, snapshot: str) -> Path:
        return self._root / (f"{name}@{snapshot}" if snapshot else name)

    def _walk(self, prefix: str) -> Iterator[tuple[Path, str]]:
        folder = self._root / prefix.rpartition("/")[0]
        for at, _, files in os.walk(folder):
            for file in files:
                path = Path(at) / file
                name = path.relative_to(self._root).as_posix()
                if name.startswith(prefix) and not file.startswith("."):
                    yield path, name

    def _write_temporary(self, path: Path, data: bytes) -> Path:
        self._make_folder(path.parent)
        self._made += 1
        temporary = path.with_name(f".{path.name}.{os.getpid()}.{time.monotonic_ns()}.{self._made}")
        with _opened(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL) as file:
            view = memoryview(data)
            while view:
                view = view[os.write(file, view) :]
            self._sync(file)
        return temporary

    def _make_folder(self, folder: Path) -> None:
        missing: list[Path] = []
        at = folder
        while not at.is_dir():
            missing.append(at)
            at = at.parent
        for new in reversed(missing):
            new.mkdir(exist_ok=True)
            self._sync_folder(new.parent)

    def _sync(self, file: int) -> None:
        if self._durable:
            os.fsync(file)

    def _sync_folder(self, folder: Path) -> None:
        if self._durable:
            with _opened(folder, os.O_RDONLY | os.O_DIRECTORY) as handle:
                os.fsync(handle)

    @contextlib.contextmanager
    def _guard(self, name: str, fence: int) -> Generator[None]:
        with _opened(self._root / f"{name}.fence", os.O_RDONLY) as file:
            fcntl.flock(file, fcntl.LOCK_SH)
            present = _parse_fence(os.pread(file, 32, 0))
            if present > fence:
                raise fenced(name, f"its fence is {present}, ours {fence}")
            yield


class FileReplicaStore(JournalStore):
    """All points of all machines below one folder. See `ReplicaStore`."""

    def __init__(
        self,
        root: Path,
        *,
        durable: bool = True,
        kek: Kek | None = None,
        clock: Callable[[], float] = time.time,
        options: Options | None = None,
    ) -> None:
        super().__init__(FileBackend(root, durable=durable), kek=kek, clock=clock, options=options)


@contextlib.contextmanager
def _opened(path: Path, flags: int) -> Generator[int]:
    file = os.open(path, flags | os.O_CLOEXEC, 0o640)
    try:
        yield file
    finally:
        os.close(file)


@contextlib.contextmanager
def _errors(subject: str) -> Generator[None]:
    try:
        yield
    except FileNotFoundError as error:
        raise FarshoreError(Code.REPLICA_DAMAGED, f"{error.filename} is missing.", subject=subject) from error
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        code = Code.CAPACITY_EXHAUSTED if full else Code.TARGET_UNREACHABLE
        raise FarshoreError(code, f"The replica folder failed: {error}.", subject=subject) from error


def _parse_fence(text: bytes) -> int:
    return int(text) if text.isdigit() else 0


def _read_fence(path: Path) -> int:
    try:
        return _parse_fence(path.read_bytes())
    except FileNotFoundError:
        return 0


def _data(file: int) -> Iterator[Extent]:
    size = os.fstat(file).st_size
    at = 0
    while at < size:
        try:
            start = os.lseek(file, at, os.SEEK_DATA)
        except OSError as error:
            if error.errno == errno.ENXIO:  # only a hole is left
                return
            raise
        at = os.lseek(file, start, os.SEEK_HOLE)
        yield Extent(start, at - start)


def _copy(source: int, target: int) -> None:
    size = os.fstat(source).st_size
    try:
        fcntl.ioctl(target, _FICLONE, source)
        return
    except OSError:
        pass  # no reflinks here: copy what is not a hole
    os.ftruncate(target, size)
    for extent in _data(source):
        at, end = extent.start, extent.start + extent.length
        while at < end:
            done = os.copy_file_range(source, target, end - at, at, at)
            if done == 0:
                raise OSError(errno.EIO, "the file became shorter while it was copied")
            at += done
