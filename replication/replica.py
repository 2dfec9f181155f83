"""The replica of machines in any backend: all that makes it safe, once.

For every disk two images: the replica disk B (byte n of the disk is byte n of B) and its leaf table T, which advances
with it. A recovery point is a frozen B and a frozen T of every disk, and a manifest that names them.

**The invariant.** Let m be the newest committed manifest that contains a disk. At any moment, also after any crash:

1. outside the *windows* younger than m, B is exactly what m froze;
2. outside the *open* windows, every entry of T is the hash of the leaf as it stands in B.

A window is a small object that lists extents. A cycle makes it durable *before* its first write into these extents
(`intend`), so that (1) holds: whatever a dead cycle touched lies in windows. Once data, and after it the table's
entries, are durable, the window may be marked as closed (`settle`), so that (2) holds: until then T may be ahead of B
(table stored, data lost: impossible here, data is flushed first) or behind it (data written, table not yet).

**Recovery.** The next cycle starts from the committed tracker of m, never from a later one, and visits everything the
source reports as changed since m *and* all windows younger than m; the second matters because a source may report less
than the dead cycle saw, e.g. a first copy of allocated areas of which some were given back since. In open windows T is
not consulted: the leaf is shipped whatever T says. In closed windows and elsewhere T is right, so equal leaves are
skipped: a first copy that died at 90 % goes on where it was, and a full comparison reads the source but ships only what
differs. At commit the windows up to that cycle mean nothing any more and are deleted.

Windows of a disk that the newest manifest does not contain are kept: they count when the disk comes back.

T is believed on opening only if its root is the digest that m has, or windows explain the difference. Otherwise it is
computed anew from B: that is the case after someone damaged T, and after a failover was committed to an older point.
Damage to B itself is found by `verify`; a resync then rebuilds T from B first, and so ships what differs.

**Fencing.** A new owner opens an epoch in the log (which ends the commits of the former one, see `log`), raises the
fence of every image (which ends its writes), and only then looks at windows and frozen states. It waits for nobody.
A freeze by a stale writer is possible in some backends and harmless: nothing will ever name it, and it is reaped. An
owner that was asked for before another one opened its epoch comes too late and is refused (`acquire`, `asked_at`); so
is one that wants to go on in a log that is gone, because its machine was removed.

**Reaping** on taking over: interrupted removals are finished; frozen states that no manifest names are dropped if they
carry an older epoch than ours (a successor's are never touched); images of disks that neither a point nor a window
names are deleted. The fences have to be raised; reaping may fail, the next owner does it again, and a promotion must
not wait for it. One thing must not be skipped: of an image pair that is being deleted one may be gone already, and the
other one alone tells lies. Such images are deleted before their disk is opened again.
"""

from __future__ import annotations

import contextlib
import json
import re
import time
from collections.abc import Callable, Generator, Sequence
from datetime import UTC, datetime
from itertools import pairwise
from typing import Any, cast

from farshore.domain.errors import Code, FarshoreError
from farshore.domain.points import RecoveryPoint
from farshore.replication import leaves
from farshore.replication.backend import Backend, Image, Kind
from farshore.replication.extents import bridge, coarsen, normalise, split
from farshore.replication.log import Log, View, safe_name
from farshore.replication.manifest import Opening, digest, encode, point_id, to_point
from farshore.replication.ports import (
    LEAF,
    DiskPoint,
    DiskState,
    Extent,
    Frozen,
    Leftover,
    Manifest,
    PointReader,
    ReplicaDisk,
)

_PAGE = 512
_IO = 4 << 20  # the most bytes of one request
_TABLE_GAP = 8192  # unchanged bytes of a table that are written along to save a request
_WINDOW_EXTENTS = 4096  # at most so many extents in a window; more are merged into a superset
_TOKEN = re.compile(r"#[0-9a-f]{12}$")  # what a leg adds to the owner that all attempts of its activity share
_OPENING_GRACE = 7 * 86400.0  # seconds an opening is kept after its epoch ended


def fenced(machine: str, what: str) -> FarshoreError:
    """The error of a writer that was overtaken."""
    return FarshoreError(
        Code.REPLICA_FENCED, f"Another writer took over the replica of {machine}: {what}.", subject=machine
    )


def handle(image: str, snapshot: str) -> str:
    """A frozen state as manifests name it."""
    return f"{image}@{snapshot}"


def parse_handle(text: str) -> tuple[str, str]:
    """Image name and id of the frozen state."""
    image, _, snapshot = text.rpartition("@")
    if not image or not snapshot:
        raise FarshoreError(Code.REPLICA_DAMAGED, f"{text!r} is not the name of a frozen disk.")
    return image, snapshot


class _Disk:
    """See `ReplicaDisk`."""

    def __init__(self, writer: BackendWriter, state: DiskState) -> None:
        self._backend = writer.backend
        self._writer = writer
        self._epoch = writer.epoch
        self.state = state
        self.image, self.table_image = writer.images_of(state.key)
        self._current = ""
        self._intended: list[Extent] = []
        self.windows: list[str] = []
        self._prepare()

    @property
    def size(self) -> int:
        return self.state.size

    def _prepare(self) -> None:
        size = self.state.size
        table_bytes = _padded(leaves.table_size(size))
        # The fence first: only what an older writer cannot change any more is worth reading.
        old_size = self._backend.ensure_image(self.image, Kind.DISK, size, self._epoch)
        old_table = self._backend.ensure_image(self.table_image, Kind.TABLE, table_bytes, self._epoch)
        touched, torn, self.windows, self._next = self._read_windows()
        if old_size != size or old_table != table_bytes:
            # Around the old and the new end, B and T may keep remnants of each other's padding (up to 32 leaves).
            edge = min(old_size, size)
            seam = normalise([Extent(edge // LEAF * LEAF, 33 * LEAF + 2 * leaves.ENTRY)], size)
            self.intend(seam)
            self._backend.resize_image(self.image, Kind.DISK, size, self._epoch)
            self._backend.resize_image(self.table_image, Kind.TABLE, table_bytes, self._epoch)
            touched += seam
            torn += seam
        self._table = bytearray(
            self._backend.read(self.table_image, 0, table_bytes)[: leaves.table_size(size)]
        )
        wrong = False
        base = self._writer.base(self.state.key)
        if base is not None and not touched:
            wrong = base.state.size != size or leaves.root(self._table, size) != base.digest
        self._leftover = Leftover(
            tuple(normalise(touched, size)), tuple(normalise(torn, size)), strayed=wrong
        )

    def _read_windows(self) -> tuple[list[Extent], list[Extent], list[str], int]:
        base = self._writer.base(self.state.key)
        head = self._writer.head()
        since = head.cycle if base is not None and head is not None else 0
        touched: list[Extent] = []
        torn: list[Extent] = []
        names: list[str] = []
        after = 0
        prefix = self._writer.log.prefix + "w/"
        for stored in self._backend.list(prefix):
            cycle, key, serial = stored.name[len(prefix) :].split("/")
            if key != safe_name(self.state.key):
                continue
            names.append(stored.name)
            if int(cycle) == self._writer.cycle:
                after = max(after, int(serial) + 1)
            if int(cycle) <= since:
                continue
            data = self._backend.get(stored.name)
            if data is None:
                continue
            is_open, extents = _parse_window(data, self.state.size)
            touched += extents
            if is_open:
                torn += extents
        return touched, torn, names, after

    def leftover(self) -> Leftover:
        return self._leftover

    def intend(self, extents: Sequence[Extent]) -> None:
        name = f"{self._writer.log.prefix}w/{self._writer.cycle:010d}/{safe_name(self.state.key)}/{self._next:06d}"
        self._next += 1
        self._intended = coarsen(extents, _WINDOW_EXTENTS)
        self._backend.put(name, _window(True, self._intended))
        self._current = name
        self.windows.append(name)

    def settle(self) -> None:
        if self._current:
            self._backend.put(self._current, _window(False, self._intended))
            self._current = ""

    def write(self, offset: int, data: bytes | memoryview) -> None:
        self._backend.write(self.image, offset, data, self._epoch)

    def clear(self, offset: int, length: int) -> None:
        self._backend.clear(self.image, offset, length, self._epoch)

    def read(self, offset: int, length: int) -> bytes:
        return self._backend.read(self.image, offset, length)

    def data(self) -> Sequence[Extent]:
        return self._backend.data(self.image)

    def leaves(self) -> bytearray:
        return self._table

    def put_leaves(self, changed: Sequence[Extent]) -> None:
        size = _padded(len(self._table))
        runs = bridge(normalise(changed, size, _PAGE), _TABLE_GAP)
        if not runs:
            return
        # A table has up to hundreds of megabytes: only a run past its end, into the padding, is copied.
        table = memoryview(self._table)
        for run in split(runs, _IO):
            part = table[run.start : run.start + run.length]
            data = part if len(part) == run.length else bytes(part).ljust(run.length, b"\0")
            self._backend.write(self.table_image, run.start, data, self._epoch)
        self._backend.flush(self.table_image, self._epoch)

    def flush(self) -> None:
        self._backend.flush(self.image, self._epoch)

    def freeze(self, cycle: int) -> Frozen:
        disk = self._backend.freeze(self.image, cycle, self._epoch, self._epoch)
        table = self._backend.freeze(self.table_image, cycle, self._epoch, self._epoch)
        return Frozen(handle(self.image, disk), handle(self.table_image, table))

    def committed(self) -> None:
        """The windows so far mean nothing any more."""
        done, self.windows, self._current = self.windows, [], ""
        self._leftover = Leftover((), ())
        self._next = 0
        # Deleting is tidiness: the commit stands, and the next owner ignores and deletes them.
        with contextlib.suppress(FarshoreError):
            for name in done:
                self._backend.delete(name)

    def table_rebuilt(self) -> None:
        self._leftover = Leftover(self._leftover.touched, ())


class BackendWriter:
    """See `ReplicaWriter`. Made by `BackendStore.acquire`."""

    def __init__(self, backend: Backend, log: Log, opening: Opening, view: View) -> None:
        self.backend = backend
        self.log = log
        self._opening = opening
        self._next = opening.number + 1
        self._parent = digest_of(opening)
        self._head = view.head
        self._disks: dict[str, _Disk] = {}
        self._dooms = 0
        self._unknown = False
        self._orphans: set[str] = set()  # images to be deleted that may still be there

    @property
    def epoch(self) -> int:
        return self._opening.epoch

    @property
    def cycle(self) -> int:
        return self._next

    @property
    def parent(self) -> str:
        return self._parent

    def head(self) -> Manifest | None:
        return self._head

    def base(self, disk_key: str) -> DiskPoint | None:
        """The disk as the newest committed manifest has it."""
        if self._head is None:
            return None
        return next((disk for disk in self._head.disks if disk.state.key == disk_key), None)

    def images_of(self, disk_key: str) -> tuple[str, str]:
        """Names of a disk's two images."""
        stem = f"{self.log.prefix}d/{safe_name(disk_key)}"
        return f"{stem}.vhd", f"{stem}.leaves"

    def open_disk(self, state: DiskState) -> ReplicaDisk:
        if self._unknown:
            raise fenced(
                self.log.machine, "the outcome of the last commit is unknown, the epoch has to be taken again"
            )
        known = self._disks.get(state.key)
        if known is not None and known.size == state.size:
            known.state = state
            return known
        for name in self._orphans & {*self.images_of(state.key)}:
            self.backend.delete_image(name, self.epoch)
            self._orphans.discard(name)
        disk = _Disk(self, state)
        self._disks[state.key] = disk
        return disk

    def rebuild_leaves(self, disk_key: str, should_stop: Callable[[], bool]) -> None:
        disk = self._disks[disk_key]
        size = disk.size
        whole = [Extent(0, size)]
        # Everything is in doubt until the new table is stored.
        disk.intend(whole)
        fresh = bytearray(leaves.table_size(size))
        for piece in split(normalise(disk.data(), size), _IO):
            if should_stop():
                raise InterruptedError
            data = disk.read(piece.start, piece.length)
            at = piece.start // LEAF * leaves.ENTRY
            entries = leaves.hashes(data)
            fresh[at : at + len(entries)] = entries
        disk.leaves()[:] = fresh
        disk.put_leaves([Extent(0, len(fresh))])
        disk.settle()
        disk.table_rebuilt()

    def forget(self) -> None:
        self._disks.clear()

    def freeze(self, cycle: int, disk_key: str) -> Frozen:
        return self._disks[disk_key].freeze(cycle)

    def commit(self, manifest: Manifest) -> RecoveryPoint:
        if (
            self._unknown
            or manifest.cycle != self._next
            or manifest.epoch != self.epoch
            or manifest.parent != self._parent
        ):
            raise fenced(self.log.machine, "the manifest does not continue the log of this epoch")
        data = encode(manifest)
        try:
            created = self.log.create(manifest)
        except FarshoreError:
            # The answer was lost, or the request. Only finding our own bytes proves anything: a request that is still
            # under way may arrive later, so absence proves nothing, and this epoch must not use the number again.
            self._unknown = True
            if self.log.get(manifest.cycle) != data:
                raise
            self._unknown = False
            created = True
        if not created and self.log.get(manifest.cycle) != data:
            raise fenced(self.log.machine, f"number {manifest.cycle} of the log is taken")
        entry_digest = digest_of(manifest)
        self._head = manifest
        self._parent = entry_digest
        self._next += 1
        kept = {disk.state.key for disk in manifest.disks}
        for key, disk in list(self._disks.items()):
            if key in kept:
                disk.committed()
            else:
                del self._disks[key]
        return to_point(manifest, entry_digest)

    def points(self) -> list[RecoveryPoint]:
        return self.log.read().listed()

    def remove_points(self, cycles: Sequence[int]) -> list[int]:
        self.keep_alive()
        head = self._head.cycle if self._head is not None else -1
        wanted = [cycle for cycle in cycles if cycle != head]
        return self.remove_any(wanted) if wanted else []

    def remove_any(self, cycles: Sequence[int]) -> list[int]:
        """As `remove_points`, the newest point included."""
        name = f"{self.log.prefix}x/{self.epoch}-{self._dooms:06d}"
        self._dooms += 1
        free, view = self.log.doom(name, cycles)
        _delete_points(self.backend, self.log, view, free)
        self.log.undoom(name)
        return free

    def keep_alive(self) -> None:
        if self.log.get(self._next) is not None:
            raise fenced(self.log.machine, f"number {self._next} of the log is taken")

    def close(self) -> None:
        self._disks.clear()

    # taking over --------------------------------------------------------------------------------------------------

    def take_over(self) -> None:
        """Fence every image, then clean up after former owners. Reading has to succeed, removing need not."""
        images = self.backend.images(self.log.prefix)
        for image in images:
            self.backend.raise_fence(image.name, self.epoch)
        view = self.log.read()
        for name, cycles in view.dooms.items():
            with _tidying():
                free, seen = self.log.doom(name, cycles)
                _delete_points(self.backend, self.log, seen, free)
                self.log.undoom(name)
        if view.dooms:
            view = self.log.read()
        self._head = view.head
        named = {
            text
            for manifest, _ in view.points
            for disk in manifest.disks
            for text in (disk.snapshot, disk.leaves)
        }
        live = {parse_handle(text)[0] for text in named}
        meaningless, windowed = self._windows()
        if not view.damaged and self._head is not None:
            self._orphans = {
                image.name
                for image in images
                if image.name not in live and image.name.rpartition(".")[0].rpartition("/")[2] not in windowed
            }
        with _tidying():
            self._reap(images, view, named, meaningless)

    def _reap(self, images: Sequence[Image], view: View, named: set[str], windows: Sequence[str]) -> None:
        """Stops at the first error: where one removal fails, hundreds would."""
        for name in windows:
            self.backend.delete(name)
        for image in images:
            if image.name in self._orphans:
                self.backend.delete_image(image.name, self.epoch)
                self._orphans.discard(image.name)
                continue
            for frozen in image.snapshots:
                if (
                    handle(image.name, frozen.id) in named
                    or frozen.epoch >= self.epoch
                    or frozen.cycle in view.damaged
                ):
                    continue
                self.backend.drop(image.name, frozen.id)
        self._tidy_openings(view)

    def _windows(self) -> tuple[list[str], set[str]]:
        """Windows that mean nothing any more, and the (safe) keys of disks that have others."""
        prefix = self.log.prefix + "w/"
        head = self._head
        current = {safe_name(disk.state.key) for disk in head.disks} if head is not None else set[str]()
        meaningless: list[str] = []
        left: set[str] = set()
        for stored in self.backend.list(prefix):
            cycle, key, _ = stored.name[len(prefix) :].split("/")
            if head is not None and key in current and int(cycle) <= head.cycle:
                meaningless.append(stored.name)
            else:
                left.add(key)
        return meaningless, left

    def _tidy_openings(self, view: View) -> None:
        used = {manifest.epoch for manifest, _ in view.points}
        openings = view.openings
        for opening, successor in pairwise(openings):
            ended = (self._opening.opened_at - successor.opened_at).total_seconds()
            if opening.epoch not in used and ended > _OPENING_GRACE:
                self.log.delete(opening.number)


class _Reader:
    """See `PointReader`."""

    def __init__(self, backend: Backend, disk: DiskPoint) -> None:
        self._backend = backend
        self._disk = disk
        self._image, self._snapshot = parse_handle(disk.snapshot)

    @property
    def size(self) -> int:
        return self._disk.state.size

    def data(self) -> Sequence[Extent]:
        return self._backend.data(self._image, self._snapshot)

    def read(self, offset: int, length: int) -> bytes:
        return self._backend.read(self._image, offset, length, self._snapshot)

    def leaves(self) -> bytes:
        image, snapshot = parse_handle(self._disk.leaves)
        return self._backend.read(image, 0, leaves.table_size(self.size), snapshot)


class BackendStore:
    """See `ReplicaStore`: all points of all machines of one backend."""

    def __init__(self, backend: Backend, *, clock: Callable[[], float] = time.time) -> None:
        self.backend = backend
        self._clock = clock
        self._logs: dict[str, Log] = {}

    def log(self, machine: str) -> Log:
        """The machine's log; one object a machine, so that entries are fetched once."""
        return self._logs.setdefault(machine, Log(self.backend, machine))

    def acquire(
        self, machine: str, owner: str, *, succeeding: int | None = None, asked_at: datetime | None = None
    ) -> BackendWriter:
        log = self.log(machine)
        for _ in range(16):
            view = log.read()
            # Decided on the same view whose next number is taken: who opens in between makes us look again.
            openings = view.openings
            _check_turn(machine, openings, owner, succeeding, asked_at)
            epochs = [opening.epoch for opening in openings] + [manifest.epoch for manifest, _ in view.points]
            now = self._clock()
            before = view.entries.get(view.top)
            opening = Opening(
                machine=machine,
                number=view.top + 1,
                epoch=max([*(epoch + 1 for epoch in epochs), int(now)]),
                parent=before[1] if before is not None else "",
                owner=owner,
                opened_at=datetime.fromtimestamp(now, UTC),
            )
            if not log.create(opening) and log.get(opening.number) != encode(opening):
                continue
            view = log.read()
            if view.top != opening.number:
                # Either a still newer owner, or we slept and the number had become free again.
                raise fenced(machine, f"the log goes on to number {view.top}")
            writer = BackendWriter(self.backend, log, opening, view)
            writer.take_over()
            return writer
        raise FarshoreError(
            Code.TARGET_BUSY,
            f"The log of {machine} grows faster than a new owner can enter it.",
            subject=machine,
        )

    def points(self, machine: str) -> list[RecoveryPoint]:
        return self.log(machine).read().listed()

    def manifest(self, machine: str, point_id: str) -> Manifest:
        return self.log(machine).manifest(point_id)

    def read_point(self, machine: str, point_id: str, disk_key: str) -> PointReader:
        manifest = self.manifest(machine, point_id)
        for disk in manifest.disks:
            if disk.state.key == disk_key:
                return _Reader(self.backend, disk)
        raise FarshoreError(
            Code.POINT_NOT_FOUND, f"Point {point_id} of {machine} has no disk {disk_key!r}.", subject=machine
        )

    def hold(self, machine: str, point_id: str, holder: str) -> None:
        self.log(machine).hold(point_id, holder)

    def release(self, machine: str, holder: str) -> None:
        self.log(machine).release(holder)

    def keep_only(self, machine: str, point_id: str) -> list[str]:
        self.manifest(machine, point_id)
        writer = self.acquire(machine, f"commit of {point_id}")
        ids = {point.cycle: point.id for point in writer.points() if point.id != point_id}
        removed = writer.remove_any(sorted(ids))
        return [ids[cycle] for cycle in removed]

    def remove_machine(self, machine: str) -> None:
        log = self.log(machine)
        if not self.backend.list(log.prefix) and not self.backend.images(log.prefix):
            return
        writer = self.acquire(machine, "removal")
        last = log.entry_name(writer.cycle - 1)
        names = [stored.name for stored in self.backend.list(log.prefix) if stored.name != last]
        # Points first, so that none is listed without its bytes; our opening last, so that a crash can be repeated.
        for name in sorted(names, key=lambda name: (not name.startswith(log.prefix + "m/"), name)):
            self.backend.delete(name)
        for image in self.backend.images(log.prefix):
            self.backend.delete_image(image.name, writer.epoch)
        self.backend.delete(last)

    def close(self) -> None:
        self.backend.close()


def same_activity(mine: str, other: str) -> bool:
    """Whether `other` is the owner string of a leg, i.e. has a token, and of the same activity as `mine`."""
    return bool(_TOKEN.search(other)) and _TOKEN.sub("", other) == _TOKEN.sub("", mine)


def _check_turn(
    machine: str, openings: Sequence[Opening], owner: str, succeeding: int | None, asked_at: datetime | None
) -> None:
    """ReplicaFenced unless it is this owner's turn. See `ReplicaStore.acquire`."""
    if not openings:
        if succeeding is not None:
            raise fenced(machine, f"its log, in which epoch {succeeding} was opened, was removed")
        return
    newest = openings[-1]
    if newest.owner == owner or newest.epoch == succeeding:
        return
    if succeeding is not None:
        raise fenced(machine, f"epoch {newest.epoch} was opened by {newest.owner}")
    if asked_at is None:
        return
    for opening in reversed(openings):
        if opening.opened_at > asked_at and not same_activity(owner, opening.owner):
            raise fenced(
                machine,
                f"a newer owner came after this leg was asked for, {opening.owner} at {opening.opened_at}",
            )


@contextlib.contextmanager
def _tidying() -> Generator[None]:
    """What is done here the next owner can do as well, so a failure does not count; being fenced does."""
    try:
        yield
    except FarshoreError as error:
        if error.code is Code.REPLICA_FENCED:
            raise


def digest_of(entry: Manifest | Opening) -> str:
    """The digest that the stored entry begins with."""
    return encode(entry)[11 : 11 + 67].decode()


def _delete_points(backend: Backend, log: Log, view: View, cycles: Sequence[int]) -> None:
    """Second half of a removal: manifests, then what they froze."""
    by_cycle = {manifest.cycle: manifest for manifest, _ in view.points}
    for cycle in cycles:
        if cycle in by_cycle:
            log.delete(cycle)
    for cycle in cycles:
        manifest = by_cycle.get(cycle)
        for disk in manifest.disks if manifest is not None else ():
            for text in (disk.snapshot, disk.leaves):
                backend.drop(*parse_handle(text))


def _padded(size: int) -> int:
    return max(_PAGE, -(-size // _PAGE) * _PAGE)


def _window(is_open: bool, extents: Sequence[Extent]) -> bytes:
    body = json.dumps(
        {"open": is_open, "extents": [[e.start, e.length] for e in extents]}, separators=(",", ":")
    )
    return (digest(body.encode()) + "\n" + body).encode()


def _parse_window(data: bytes, size: int) -> tuple[bool, list[Extent]]:
    stated, _, body = data.partition(b"\n")
    if digest(body).encode() != stated:
        return True, [Extent(0, size)]  # unreadable: everything is in doubt
    raw = cast("dict[str, Any]", json.loads(body))
    return bool(raw["open"]), [Extent(int(start), int(length)) for start, length in raw["extents"]]


__all__ = ["BackendStore", "BackendWriter", "fenced", "handle", "parse_handle", "point_id"]
