"""A backend in memory that can crash and lose power, and a source that knows what each of its cuts held."""

from __future__ import annotations

import itertools
import random
import threading
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta

from farshore.domain.errors import Code, FarshoreError
from farshore.domain.points import Consistency
from farshore.replication.backend import Image, Kind, Snapshot, Stored, fenced
from farshore.replication.ports import LEAF, DiskState, Extent, FullCopyNeeded


class Crash(BaseException):
    """The process was killed here."""


class Fuse:
    """Burns down with every operation; then everything this process tries is a Crash."""

    def __init__(self) -> None:
        self.left: int | None = None
        self.dead = False
        self.after = False  # the fatal operation still takes effect
        self.lock = threading.Lock()

    def arm(self, left: int | None, *, after: bool = False) -> None:
        self.left, self.dead, self.after = left, False, after

    def burn(self) -> bool:
        """True: do the operation, then crash."""
        with self.lock:
            if self.dead:
                raise Crash
            if self.left is None:
                return False
            self.left -= 1
            if self.left > 0:
                return False
            self.dead = True
            if not self.after:
                raise Crash
            return True


class _MemoryImage:
    def __init__(self, size: int, fence: int) -> None:
        self.durable = bytearray(size)
        self.now = bytearray(size)
        self.unflushed: list[tuple[int, bytes]] = []
        self.fence = fence
        self.snapshots: dict[str, tuple[Snapshot, bytes]] = {}


class MemoryBackend:
    """Keeps `Backend`'s promises and not one more: what was not flushed can get lost in a power cut, in any order."""

    def __init__(self) -> None:
        self.objects: dict[str, tuple[bytes, int]] = {}
        self.store: dict[str, _MemoryImage] = {}
        self.lock = threading.RLock()
        self.versions = itertools.count(1)
        self.obey_fences = True
        self.operations = 0

    def power_cut(self, choose: random.Random) -> None:
        for image in self.store.values():
            for at, data in image.unflushed:
                if choose.random() < 0.5:
                    image.durable[at : at + len(data)] = data
            image.unflushed.clear()
            image.now = bytearray(image.durable)

    def create(self, name: str, data: bytes) -> bool:
        with self.lock:
            if name in self.objects:
                return False
            self.put(name, data)
            return True

    def put(self, name: str, data: bytes) -> None:
        with self.lock:
            self.objects[name] = (bytes(data), next(self.versions))

    def get(self, name: str) -> bytes | None:
        with self.lock:
            found = self.objects.get(name)
            return found[0] if found else None

    def part(self, name: str, offset: int, length: int) -> bytes | None:
        data = self.get(name)
        return None if data is None else data[offset : offset + length]

    def list(self, prefix: str) -> list[Stored]:
        with self.lock:
            return [Stored(n, str(v)) for n, (_, v) in sorted(self.objects.items()) if n.startswith(prefix)]

    def delete(self, name: str) -> None:
        with self.lock:
            self.objects.pop(name, None)

    def images(self, prefix: str) -> list[Image]:
        with self.lock:
            return [
                Image(name, image.fence, tuple(snapshot for snapshot, _ in image.snapshots.values()))
                for name, image in sorted(self.store.items())
                if name.startswith(prefix)
            ]

    def ensure_image(self, name: str, kind: Kind, size: int, fence: int) -> int:
        with self.lock:
            image = self.store.setdefault(name, _MemoryImage(size, fence))
            self.raise_fence(name, fence)
            self._check(name, fence)
            return len(image.now)

    def resize_image(self, name: str, kind: Kind, size: int, fence: int) -> None:
        with self.lock:
            image = self._check(name, fence)
            self.flush(name, fence)
            image.durable = bytearray(bytes(image.durable[:size]).ljust(size, b"\0"))
            image.now = bytearray(image.durable)

    def raise_fence(self, name: str, fence: int) -> None:
        with self.lock:
            if name in self.store:
                self.store[name].fence = max(self.store[name].fence, fence)

    def write(self, name: str, offset: int, data: bytes | memoryview, fence: int) -> None:
        with self.lock:
            image = self._check(name, fence)
            body = bytes(data)
            assert offset + len(body) <= len(image.now), "a write beyond the end"
            image.now[offset : offset + len(body)] = body
            image.unflushed.append((offset, body))

    def clear(self, name: str, offset: int, length: int, fence: int) -> None:
        self.write(name, offset, bytes(length), fence)

    def read(self, name: str, offset: int, length: int, snapshot: str = "") -> bytes:
        with self.lock:
            body = self._body(name, snapshot)
            if offset + length > len(body):
                raise FarshoreError(Code.REPLICA_DAMAGED, f"{name} is too short")
            return bytes(body[offset : offset + length])

    def data(self, name: str, snapshot: str = "") -> list[Extent]:
        with self.lock:
            return [Extent(0, len(self._body(name, snapshot)))]

    def flush(self, name: str, fence: int) -> None:
        with self.lock:
            image = self._check(name, fence)
            for at, data in image.unflushed:
                image.durable[at : at + len(data)] = data
            image.unflushed.clear()

    def freeze(self, name: str, cycle: int, epoch: int, fence: int) -> str:
        with self.lock:
            # No look at the fence: page blobs do not look either.
            image = self.store[name]
            identity = f"{cycle:010d}-{epoch}"
            while identity in image.snapshots:
                identity += "+"
            image.snapshots[identity] = (Snapshot(identity, epoch, cycle), bytes(image.durable))
            return identity

    def drop(self, name: str, snapshot: str) -> None:
        with self.lock:
            if name in self.store:
                self.store[name].snapshots.pop(snapshot, None)

    def delete_image(self, name: str, fence: int) -> None:
        with self.lock:
            if name in self.store and self.store[name].fence <= fence:
                del self.store[name]

    def close(self) -> None: ...

    def _body(self, name: str, snapshot: str) -> bytes | bytearray:
        try:
            image = self.store[name]
            return image.snapshots[snapshot][1] if snapshot else image.now
        except KeyError:
            raise FarshoreError(Code.REPLICA_DAMAGED, f"{name}@{snapshot} is missing") from None

    def _check(self, name: str, fence: int) -> _MemoryImage:
        image = self.store[name]
        if self.obey_fences and image.fence > fence:
            raise fenced(name, "fence")
        return image


class Through:
    """A backend seen through something that happens at every operation (`before` returns whether to crash after)."""

    def __init__(self, inner: object, before) -> None:
        self._inner = inner
        self._before = before

    def __getattr__(self, name: str):
        method = getattr(self._inner, name)

        def call(*args, **kwargs):
            crash = self._before(name, args)
            result = method(*args, **kwargs)
            if crash:
                raise Crash
            return result

        return call


def epoch_in(name: str) -> int:
    return int(name.rsplit("-", 2)[1])


START = datetime(2026, 1, 1, tzinfo=UTC)


def pattern(number: int) -> bytes:
    """A leaf's content; 0 is zeros."""
    return bytes([number]) * LEAF


class Disk:
    def __init__(self, leaves: int, tail: int = 0, identity: str = "a") -> None:
        self.content = bytearray(leaves * LEAF + tail)
        self.identity = identity
        self.changes: list[tuple[int, int]] = []  # (sequence, leaf)
        self.generation = 0


class ModelCut:
    def __init__(self, source: ModelSource, name: str, want: Consistency) -> None:
        self._source = source
        self.name = name
        self.taken_at = source.tick()
        self.consistency = want
        self.powered_off = source.powered_off
        self.frozen = {key: bytes(disk.content) for key, disk in source.machine.items()}
        self.sequence = source.sequence
        self.released = False
        self._changes = {key: list(disk.changes) for key, disk in source.machine.items()}
        self.disks = [
            DiskState(
                key, f"disk {key}", len(disk.content), disk.identity, f"{disk.generation}:{source.sequence}"
            )
            for key, disk in source.machine.items()
        ]

    @property
    def whole(self) -> bool:
        return self._source.whole

    @property
    def left_out(self) -> dict[str, str]:
        return dict(self._source.left_out)

    def changed(self, disk_key: str, since: DiskState | None) -> Iterator[Extent]:
        self._source.burn()
        state = next(disk for disk in self.disks if disk.key == disk_key)
        content = self.frozen[disk_key]
        if since is None:
            # Allocated areas only: what was given back since an earlier attempt is not reported.
            for at in range(0, len(content), LEAF):
                if content[at : at + LEAF].strip(b"\0"):
                    yield Extent(at, min(LEAF, len(content) - at))
            return
        generation, sequence = str(since.tracker).split(":")
        if generation != str(state.tracker).split(":")[0]:
            raise FullCopyNeeded("change tracking was reset")
        for at, leaf in sorted(self._changes[disk_key], key=lambda change: change[1]):
            if at > int(sequence) and leaf * LEAF < len(content):
                yield Extent(leaf * LEAF, 512)  # trackers are finer than leaves

    def read(self, disk_key: str, offset: int, length: int) -> bytes:
        self._source.burn()
        assert not self.released, "a read after the release"
        return self.frozen[disk_key][offset : offset + length]

    def confirm(self) -> None:
        assert not self.released, "a confirmation after the release"

    def release(self) -> None:
        self._source.burn()
        self._source.events.append("release")
        self.released = True
        self._source.cuts.pop(self.name, None)


class ModelSource:
    """A machine whose disks are written leaf by leaf, with an honest change tracker and a memory of every cut."""

    def __init__(self) -> None:
        self.machine: dict[str, Disk] = {}
        self.sequence = 0
        self.history: dict[str, dict[str, bytes]] = {}
        self.cuts: dict[str, ModelCut] = {}
        self.fuse = Fuse()
        self.events: list[str] = []
        self.lock = threading.Lock()
        self.fail_cuts: list[FarshoreError] = []
        self.powered_off = True
        self.left_out: dict[str, str] = {}
        self.whole = True

    def burn(self) -> None:
        if self.fuse.burn():
            raise Crash

    def tick(self) -> datetime:
        self.sequence += 1
        return START + timedelta(seconds=self.sequence)

    def add(self, key: str, leaves: int, tail: int = 0, identity: str = "a") -> None:
        self.machine[key] = Disk(leaves, tail, identity)

    def write(self, key: str, leaf: int, data: bytes) -> None:
        with self.lock:
            disk = self.machine[key]
            self.sequence += 1
            at = leaf * LEAF
            body = data[: len(disk.content) - at]
            disk.content[at : at + len(body)] = body
            disk.changes.append((self.sequence, leaf))

    def resize(self, key: str, leaves: int, tail: int) -> None:
        disk = self.machine[key]
        size = leaves * LEAF + tail
        disk.content = bytearray(bytes(disk.content[:size]).ljust(size, b"\0"))
        self.reset_tracking(key)

    def reset_tracking(self, key: str) -> None:
        self.machine[key].generation += 1
        self.machine[key].changes.clear()

    def cut(self, name: str, *, want: Consistency) -> ModelCut:
        self.burn()
        self.events.append("cut")
        if self.fail_cuts:
            raise self.fail_cuts.pop(0)
        with self.lock:
            cut = ModelCut(self, name, want)
            # Names repeat when a cycle is tried again in the same epoch; only one of them can be committed.
            self.history[name] = cut.frozen
            self.cuts[name] = cut
        return cut

    def reap(self, upto: str = "") -> list[str]:
        self.burn()
        self.events.append("reap")
        names = [name for name in self.cuts if not upto or epoch_in(name) <= epoch_in(upto)]
        for name in names:
            del self.cuts[name]
        return names

    def close(self) -> None: ...
